//! Waiting for something to become true, with a deadline.

use std::sync::LazyLock;
use std::time::{Duration, Instant};
use std::{env, io, thread};

use anyhow::{Result, bail};

use crate::signals;

/// How long to wait for something that should happen at once, on a busy machine.
pub const SOON: Duration = Duration::from_secs(5);

/// How long a child needs from fork to exec on a busy machine.
const MOMENT: Duration = Duration::from_secs(1);

/// The variable with the factor for all deadlines, e.g. in a virtual machine.
const PATIENCE: &str = "REDIRECT_TEST_PATIENCE";

/// A deadline, on this machine.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: LazyLock<u32> =
        LazyLock::new(|| env::var(PATIENCE).ok().and_then(|factor| factor.parse().ok()).unwrap_or(1));
    limit * *FACTOR
}

const INTERVAL: Duration = Duration::from_millis(5);

/// Polls `ready` until it has an answer. `what` completes the sentence "no … within 5 s".
pub fn until<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (start, limit) = (Instant::now(), patient(limit));
    loop {
        signals::check()?;
        if let Some(answer) = ready()? {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            bail!("no {what} within {limit:?}");
        }
        thread::sleep(INTERVAL);
    }
}

/// Waits for something that must be over before the next guard may act. Signals do not interrupt it.
pub fn for_cleanup(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let (start, limit) = (Instant::now(), patient(limit));
    while !done() {
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(INTERVAL);
    }
    true
}

/// Retries a bind while the address is in use, for a moment: until a child that another test just forked executes
/// its program, it holds copies of this process's sockets, even closed ones.
pub fn until_bound<T>(mut bind: impl FnMut() -> Result<io::Result<T>>) -> Result<io::Result<T>> {
    let start = Instant::now();
    loop {
        match bind()? {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && start.elapsed() < patient(MOMENT) => {
                thread::sleep(INTERVAL);
            }
            bound => return Ok(bound),
        }
    }
}

/// As [`until`], for a condition.
pub fn until_true(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(ready()?.then_some(())))
}
