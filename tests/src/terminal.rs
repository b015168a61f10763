//! A program on a terminal of its own, and the contents of its screen.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::pty::{Winsize, openpty};

use crate::wait::{self, SOON};

const ROWS: u16 = 40;
const COLUMNS: u16 = 140;

/// The program; killed with this value.
pub struct Pty {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<vt100::Parser>>,
    reader: Option<JoinHandle<()>>,
}

impl Pty {
    /// Starts it.
    pub fn start(mut command: Command) -> Result<Self> {
        let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        let ends = openpty(&size, None).context("a terminal")?;
        command.stdin(ends.slave.try_clone()?).stdout(ends.slave.try_clone()?).stderr(ends.slave);
        let take = || {
            nix::unistd::setsid()?;
            // SAFETY: the call takes integers only. The terminal is the standard input.
            let taken = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
            if taken == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: the closure runs between fork and exec and makes system calls only.
        unsafe { command.pre_exec(take) };
        let child = command.spawn().context("a program on a terminal")?;
        // The command holds this process's copies of the terminal's end: without them the terminal ends with the
        // program.
        drop(command);
        let mut output = File::from(ends.master);
        let keyboard = output.try_clone()?;
        let screen = Arc::new(Mutex::new(vt100::Parser::new(ROWS, COLUMNS, 0)));
        let into = Arc::clone(&screen);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal reports its end as an error.
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                into.lock().unwrap_or_else(PoisonError::into_inner).process(&buffer[..length]);
            }
        });
        Ok(Self { child, keyboard, screen, reader: Some(reader) })
    }

    /// What the screen shows.
    #[must_use]
    pub fn shown(&self) -> String {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner).screen().contents()
    }

    /// Whether the program uses the alternate screen.
    #[must_use]
    pub fn is_full_screen(&self) -> bool {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner).screen().alternate_screen()
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    /// Waits for the end, until all is on the screen.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let status =
            wait::until("end of the program on the terminal", SOON, || Ok(self.child.try_wait()?))?;
        if let Some(reader) = self.reader.take() {
            reader.join().map_err(|_| anyhow::anyhow!("the reader of the terminal panicked"))?;
        }
        Ok(status)
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
