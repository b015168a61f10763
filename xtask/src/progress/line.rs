//! The line of a step. A terminal shows one line that is overwritten; elsewhere a long step reports its progress from
//! time to time.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// The interval between lines that can't be overwritten.
const PAUSE: Duration = Duration::from_secs(20);

pub(super) struct Line {
    what: String,
    started: Instant,
    is_terminal: bool,
    /// For such output: when the last line was written, if any.
    written: Option<Instant>,
}

impl Line {
    pub(super) fn start(what: &str) -> Self {
        write(&format!("{what} ... "));
        let is_terminal = io::stderr().is_terminal();
        Self { what: what.to_owned(), started: Instant::now(), is_terminal, written: None }
    }

    /// Shows the progress.
    pub(super) fn show(&mut self, state: &str) {
        let elapsed = self.started.elapsed();
        let seconds = elapsed.as_secs();
        if self.is_terminal {
            write(&format!("\r{} ... {}\x1b[K", self.what, joined(state, seconds)));
        } else if self.written.map_or(elapsed, |written| written.elapsed()) >= PAUSE {
            // The first one ends the step's initial line.
            let begin = if self.written.is_none() { "\n" } else { "" };
            write(&format!("{begin}  {}\n", joined(state, seconds)));
            self.written = Some(Instant::now());
        }
    }

    pub(super) fn end(self, is_ok: bool) {
        let took = format!("{:.1} s", self.started.elapsed().as_secs_f32());
        let result = if is_ok { took } else { format!("failed after {took}") };
        let what = &self.what;
        write(&match (self.is_terminal, self.written) {
            (true, _) => format!("\r{what} ... {result}\x1b[K\n"),
            (false, Some(_)) => format!("{what}: {result}\n"),
            (false, None) => format!("{result}\n"),
        });
    }
}

fn joined(state: &str, seconds: u64) -> String {
    if state.is_empty() { format!("{seconds} s") } else { format!("{state}, {seconds} s") }
}

fn write(text: &str) {
    let mut stderr = io::stderr();
    // If stderr is closed, there is no reader anyway.
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}
