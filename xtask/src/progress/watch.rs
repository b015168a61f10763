//! The progress of commands, from their own output.

use std::fs::File;
use std::io::{self, BufReader, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often the elapsed time is shown.
const TICK: Duration = Duration::from_secs(1);

/// The kind of progress output of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watch {
    /// None: only the time is shown.
    Clock,
    /// cargo's progress bar.
    Cargo,
    /// apt's status messages, on a separate descriptor.
    Apt,
}

impl Watch {
    /// Runs a command with its output in a log, and forwards its progress.
    pub(super) fn follow(
        self,
        command: &mut Command,
        log: &File,
        mut show: impl FnMut(&str),
    ) -> io::Result<ExitStatus> {
        command.stdin(Stdio::null()).stdout(log.try_clone()?);
        let (reader, writer) = io::pipe()?;
        // apt passes it to dpkg; the reader must exist until that has ended.
        let mut inherited = None;
        match self {
            Self::Clock => {
                command.stderr(log.try_clone()?);
                drop(writer);
            }
            Self::Cargo => {
                command.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "100");
                command.stderr(writer);
            }
            Self::Apt => {
                command.stderr(log.try_clone()?);
                let descriptor = inheritable(writer)?;
                command.args(["-o", &format!("APT::Status-Fd={}", descriptor.as_raw_fd())]);
                inherited = Some(descriptor);
            }
        }
        let child = command.spawn();
        // Closes the write ends in this process, because otherwise the pipe would never end.
        drop(inherited);
        command.stderr(Stdio::null());
        let mut child = child?;
        let (sender, states) = channel();
        let rest = log.try_clone()?;
        thread::spawn(move || {
            // The log lacks lines if the disk is full, which the command notices as well.
            let _ = self.read(reader, rest, |state| drop(sender.send(state)));
        });
        let mut last = String::new();
        let mut shown = Instant::now();
        loop {
            let next = states.recv_timeout(TICK);
            let is_silent = matches!(next, Err(RecvTimeoutError::Disconnected));
            let is_news = next.map(|state| last = state).is_ok();
            if is_news || shown.elapsed() >= TICK {
                show(&last);
                shown = Instant::now();
            }
            if !is_news && let Some(status) = child.try_wait()? {
                // The last output may still be in the pipe; a service that it started may hold the pipe forever.
                while let Ok(state) = states.recv_timeout(TICK) {
                    show(&state);
                }
                return Ok(status);
            }
            if is_silent {
                thread::sleep(TICK / 20);
            }
        }
    }

    /// Reads a command's output; lines without progress go to the log.
    fn read(self, reader: PipeReader, mut log: File, mut news: impl FnMut(String)) -> io::Result<()> {
        let mut line = Vec::new();
        for byte in BufReader::new(reader).bytes() {
            match byte? {
                end @ (b'\n' | b'\r') => {
                    let text = String::from_utf8_lossy(&line).replace("\x1b[K", "");
                    match self.parse(&text) {
                        Some(state) => news(state),
                        None if text.is_empty() && end == b'\r' => {}
                        None => writeln!(log, "{text}")?,
                    }
                    line.clear();
                }
                byte => line.push(byte),
            }
        }
        log.write_all(&line)
    }

    /// The progress in a command's line.
    fn parse(self, line: &str) -> Option<String> {
        match self {
            Self::Clock => None,
            Self::Cargo => cargo(line.trim()),
            Self::Apt => apt(line),
        }
    }
}

/// A descriptor that commands inherit.
fn inheritable(writer: io::PipeWriter) -> io::Result<std::os::fd::OwnedFd> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(writer.into())
}

/// `Building [====>   ] 17/402: syn, tokio`
fn cargo(line: &str) -> Option<String> {
    if line.starts_with("Blocking waiting for file lock") {
        return Some("waiting for another cargo".into());
    }
    let (what, rest) = line.split_once('[')?;
    let (_, counts) = rest.split_once(']')?;
    let (counts, names) = counts.split_once(':').unwrap_or((counts, ""));
    let (done, all) = counts.trim().split_once('/')?;
    let (done, all): (u32, u32) =
        (done.parse().ok()?, all.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()?);
    match what.trim() {
        "Building" => {
            let names = names.trim();
            let names = if names.is_empty() { String::new() } else { format!(" ({names})") };
            Some(format!("{done} of {all} crates{names}"))
        }
        _ => None,
    }
}

/// `dlstatus:3:12.5:Retrieving file 3 of 20 (1s remaining)`, `pmstatus:libc6:40:Unpacking libc6 (amd64)`
fn apt(line: &str) -> Option<String> {
    let mut parts = line.splitn(4, ':');
    let kind = parts.next()?;
    let (_, percent, text) = (parts.next()?, parts.next()?, parts.next()?);
    let percent = percent.parse::<f32>().ok()?;
    match kind {
        "dlstatus" | "pmstatus" => Some(format!("{text}, {percent:.0} %")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn cargo_says_how_many_crates_are_built() {
        let cases = [
            (
                "    Building [====>          ] 17/402: syn, tokio(build)",
                Some("17 of 402 crates (syn, tokio(build))"),
            ),
            ("Building [                  ] 0/3", Some("0 of 3 crates")),
            ("Downloading [==>  ] 3/9: x", None),
            ("   Compiling syn v2.0.1", None),
            ("error[E0308]: mismatched types", None),
            ("Blocking waiting for file lock on build directory", Some("waiting for another cargo")),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(Watch::Cargo.parse(line).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn apt_says_what_it_fetches() {
        let cases = [
            (
                "dlstatus:3:12.5:Retrieving file 3 of 20 (1s remaining)",
                Some("Retrieving file 3 of 20 (1s remaining), 12 %"),
            ),
            ("pmstatus:libc6:40.4:Unpacking libc6:amd64", Some("Unpacking libc6:amd64, 40 %")),
            ("pmerror:libc6:40:failed", None),
            ("Get:1 http://deb.debian.org/debian bookworm InRelease", None),
        ];
        for (line, expected) in cases {
            assert_eq!(Watch::Apt.parse(line).as_deref(), expected, "{line}");
        }
    }

    fn follow(watch: Watch, script: &str) -> (bool, Vec<String>, String) {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("xtask-watch-{}-{number}", std::process::id()));
        let log = File::create(&path).unwrap();
        let mut states = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]);
        let status = watch.follow(&mut command, &log, |state| states.push(state.to_owned())).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        (status.success(), states, text)
    }

    #[test]
    fn progress_is_shown_and_the_rest_is_logged() {
        let script = "printf '  Building [=> ] 1/2: a\\r\\033[K   Compiling b\\n  Building [==>] 2/2: b\\r\\033[Kwarning: c\\n' >&2; echo out";
        let (success, states, log) = follow(Watch::Cargo, script);
        assert!(success);
        assert_eq!(states, ["1 of 2 crates (a)", "2 of 2 crates (b)"]);
        for line in ["   Compiling b\n", "warning: c\n", "out\n"] {
            assert!(log.contains(line), "{log}");
        }
        assert!(!log.contains("Building"), "{log}");
    }

    #[test]
    fn apts_messages_come_on_a_descriptor_of_their_own() {
        // The descriptor is in the last argument.
        let script = "fd=${2#APT::Status-Fd=}; echo 'dlstatus:1:50:Retrieving file 1 of 2' >/proc/self/fd/$fd; echo noise; echo bad >&2; exit 3";
        let (success, states, log) = follow(Watch::Apt, script);
        assert!(!success);
        assert_eq!(states, ["Retrieving file 1 of 2, 50 %"]);
        assert_eq!(log, "noise\nbad\n");
    }

    #[test]
    fn a_command_that_says_nothing_is_awaited() {
        let (success, states, log) = follow(Watch::Clock, "sleep 1.5; echo done");
        assert!(success);
        assert!(states.iter().all(String::is_empty), "{states:?}");
        assert_eq!(log, "done\n");
    }
}
