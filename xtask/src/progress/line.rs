//! The line of a step. A terminal shows one that is written over; elsewhere a step that takes long says now and then how
//! far it is.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often something is written where lines stay.
const PAUSE: Duration = Duration::from_secs(20);

pub(super) struct Line {
    what: String,
    started: Instant,
    is_terminal: bool,
    /// Where lines stay: when the last one was written, if one was.
    written: Option<Instant>,
}

impl Line {
    pub(super) fn start(what: &str) -> Self {
        write(&format!("{what} ... "));
        let is_terminal = io::stderr().is_terminal();
        Self { what: what.to_owned(), started: Instant::now(), is_terminal, written: None }
    }

    /// Says how far it is.
    pub(super) fn show(&mut self, state: &str) {
        let elapsed = self.started.elapsed();
        let seconds = elapsed.as_secs();
        if self.is_terminal {
            write(&format!("\r{} ... {}\x1b[K", self.what, joined(state, seconds)));
        } else if self.written.map_or(elapsed, |written| written.elapsed()) >= PAUSE {
            // The first one ends the line that the step began with.
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
    // Nobody is left to tell if stderr is closed.
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}
