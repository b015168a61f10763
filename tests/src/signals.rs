//! Ctrl-C and SIGTERM end the run in order: every wait fails, and every guard restores what it changed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Takes over SIGINT and SIGTERM. To be called before any other thread is started, because threads inherit the mask.
pub fn install() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("block SIGINT and SIGTERM")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                eprintln!("interrupted twice: leaving at once");
                std::process::exit(130);
            }
            eprintln!("interrupted: cleaning up");
        }
    })?;
    Ok(())
}

/// Whether a signal requested the end.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Fails if a signal requested the end.
pub fn check() -> Result<()> {
    if interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

/// For a child between fork and exec: back to an empty mask, which exec would otherwise inherit.
pub(crate) fn reset_mask() -> nix::Result<()> {
    SigSet::empty().thread_set_mask()
}
