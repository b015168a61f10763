//! Installs the plugin's binary, and calls it with VERSION and STATUS before a configuration names it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::FcntlArg::F_SETFL;
use nix::fcntl::{OFlag, fcntl};
use serde::Deserialize;
use serde_json::json;

use super::error::Error;
use super::files::{self, Attributes, Files};
use super::{Options, PLUGIN};
use redirect_cni::SpecVersion;
use redirect_protocol::input::read_file;
use redirect_protocol::wire::{Request, client};

/// Copies the plugin unless it is current. Returns whether it was copied.
pub(super) fn install(options: &Options, files: &mut impl Files) -> Result<bool, Error> {
    if is_current(options)? {
        return Ok(false);
    }
    let source = source(options)?;
    // Checked before it replaces a working one.
    versions(&source)?;
    let bytes = fs::read(&source).map_err(|error| Error::read(&source, error))?;
    let target = options.directories.installed_plugin();
    let owner = fs::metadata(&options.directories.cni_bin_dir)
        .map_err(|error| Error::read(&options.directories.cni_bin_dir, error))?;
    let attributes = Attributes { mode: 0o755, uid: owner.uid(), gid: owner.gid() };
    files::replace(files, &target, &bytes, attributes).map_err(|error| Error::write(&target, error))?;
    Ok(true)
}

/// Whether the installed plugin is the right one.
pub(super) fn is_current(options: &Options) -> Result<bool, Error> {
    let (source, target) = (source(options)?, options.directories.installed_plugin());
    let wanted = fs::read(&source).map_err(|error| Error::read(&source, error))?;
    match fs::symlink_metadata(&target) {
        Ok(metadata) if !metadata.is_file() || metadata.mode() & 0o111 != 0o111 => return Ok(false),
        // Not read, because it may be of any size.
        Ok(metadata) if metadata.len() != wanted.len() as u64 => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::read(&target, error)),
    }
    match read_file(&target, wanted.len()) {
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Ok(false),
        found => Ok(found.map_err(|error| Error::read(&target, error))? == wanted),
    }
}

fn source(options: &Options) -> Result<PathBuf, Error> {
    match &options.cni_plugin {
        Some(path) => Ok(path.clone()),
        None => {
            let own = Path::new("/proc/self/exe");
            let own = fs::read_link(own).map_err(|error| Error::read(own, error))?;
            Ok(own.with_file_name(PLUGIN))
        }
    }
}

/// The specification versions that the plugin reports.
pub(super) fn versions(plugin: &Path) -> Result<Vec<SpecVersion>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        supported_versions: Vec<String>,
    }
    let wrong = |problem: String| Error::Plugin { path: plugin.into(), problem };
    let output = ask(plugin, "VERSION", "{}").map_err(|error| wrong(format!("cannot run it: {error}")))?;
    if !output.status.success() {
        return Err(wrong(format!("VERSION fails: {}", said(&output))));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|error| wrong(format!("VERSION answers {}: {error}", said(&output))))?;
    let known =
        |version: &SpecVersion| answer.supported_versions.iter().any(|known| known == version.as_str());
    Ok(SpecVersion::ALL.into_iter().filter(known).collect())
}

/// An error if no pod could start with the plugin in the chain; a warning if only enrolled ones could not.
pub(super) fn ready(options: &Options) -> Result<Option<String>, Error> {
    client::call(&options.cni_agent_socket, &Request::Status, None, Options::PATIENCE)?;
    let path = options.directories.installed_plugin();
    let mut config = options.entry();
    config.insert("cniVersion".into(), SpecVersion::LATEST.as_str().into());
    config.insert("name".into(), "status".into());
    config.insert("timeoutSeconds".into(), json!(Options::PATIENCE.as_secs()));
    let output = ask(&path, "STATUS", &json!(config).to_string())
        .map_err(|error| Error::Plugin { path: path.clone(), problem: format!("cannot run it: {error}") })?;
    if output.status.success() {
        return Ok(None);
    }
    #[derive(Deserialize)]
    struct Answer {
        code: u32,
        msg: String,
    }
    match serde_json::from_slice(&output.stdout) {
        // The agent answers: pods that are not enrolled can start, the others wait.
        Ok(Answer { code: 50, msg }) => Ok(Some(msg)),
        _ => Err(Error::Plugin { path, problem: format!("STATUS fails: {}", said(&output)) }),
    }
}

/// The plugin's deadline, longer than its own wait for the agent.
const DEADLINE: Duration = Duration::from_secs(10);

/// The maximum length of its output.
const MOST: usize = 64 * 1024;

fn ask(plugin: &Path, command: &str, config: &str) -> io::Result<Output> {
    ask_within(DEADLINE, plugin, command, config)
}

/// Runs the plugin, and kills it if it exceeds the deadline or the length. Does not wait for its children.
fn ask_within(patience: Duration, plugin: &Path, command: &str, config: &str) -> io::Result<Output> {
    let deadline = Instant::now() + patience;
    let mut child = loop {
        match start(plugin, command) {
            // Another thread has forked while the binary was being written, and has not called exec yet.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                thread::sleep(PAUSE);
            }
            started => break started?,
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        // It fits in the pipe, so this does not block. A plugin that does not read is judged by its answer.
        let _ = stdin.write_all(config.as_bytes());
    }
    let outcome = listen(&mut child, deadline);
    if outcome.is_err() {
        // Fails if it has ended meanwhile.
        let _ = child.kill();
        let _ = child.wait();
    }
    outcome.map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => {
            let what = format!("{command} did not end within {} s", patience.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, what)
        }
        _ => error,
    })
}

/// Reads a process's output until it ends.
fn listen(child: &mut Child, deadline: Instant) -> io::Result<Output> {
    let mut pipes = (child.stdout.take(), child.stderr.take());
    for descriptor in [pipes.0.as_ref().map(AsFd::as_fd), pipes.1.as_ref().map(AsFd::as_fd)] {
        descriptor.map(|descriptor| fcntl(descriptor, F_SETFL(OFlag::O_NONBLOCK))).transpose()?;
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        // Checked before the output is read, so that nothing is missed.
        let ended = child.try_wait()?;
        if let Some(pipe) = &mut pipes.0 {
            take(pipe, &mut stdout)?;
        }
        if let Some(pipe) = &mut pipes.1 {
            take(pipe, &mut stderr)?;
        }
        match ended {
            Some(status) => return Ok(Output { status, stdout, stderr }),
            None if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            None => thread::sleep(PAUSE),
        }
    }
}

/// Reads what is available.
fn take(pipe: &mut impl Read, said: &mut Vec<u8>) -> io::Result<()> {
    let room = MOST.saturating_sub(said.len());
    match pipe.take(room as u64 + 1).read_to_end(said) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ if said.len() > MOST => Err(io::Error::other(format!("it says more than {MOST} bytes"))),
        _ => Ok(()),
    }
}

const PAUSE: Duration = Duration::from_millis(10);

fn start(plugin: &Path, command: &str) -> io::Result<Child> {
    Command::new(plugin)
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_PATH", plugin.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

fn said(output: &Output) -> String {
    let text = [output.stdout.as_slice(), b" ", &output.stderr].concat();
    format!("{}, {}", output.status, String::from_utf8_lossy(&text).trim())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    fn plugin(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("plugin");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o755).open(&path).unwrap();
        file.write_all(format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{script}").as_bytes()).unwrap();
        path
    }

    #[test]
    fn a_plugin_has_a_deadline_and_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let ask = |script: &str| {
            ask_within(Duration::from_secs(2), &plugin(directory.path(), script), "VERSION", "{}")
        };
        let answer = ask("cat; echo $CNI_COMMAND; echo no >&2; exit 3").unwrap();
        assert_eq!((answer.stdout, answer.stderr), (b"{}VERSION\n".to_vec(), b"no\n".to_vec()));
        assert_eq!(answer.status.code(), Some(3));
        // It has ended, although its child holds the pipes.
        let began = Instant::now();
        assert_eq!(ask("sleep 5 & echo yes").unwrap().stdout, b"yes\n");
        assert!(began.elapsed() < Duration::from_secs(5));
        // It never ends, with or without output.
        for script in ["exec sleep 1000", "while :; do echo; sleep 0.1; done"] {
            let error = ask(script).unwrap_err();
            assert_eq!(error.to_string(), "VERSION did not end within 2 s", "{script}");
        }
        assert!(ask("exec yes").unwrap_err().to_string().contains("65536 bytes"));
        assert_eq!(ask("head -c 65536 /dev/zero").unwrap().stdout.len(), MOST);
    }
}
