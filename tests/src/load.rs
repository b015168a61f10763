//! Clients that connect repeatedly while something happens, and the result of every attempt.

use std::fmt;
use std::net::SocketAddr;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::connection::dial;
use crate::{Connection, Netns, Stack, signals};

/// Clients for each target.
const CLIENTS: usize = 2;

/// Between the end of a client's connection and its next.
const PAUSE: Duration = Duration::from_millis(2);

/// The clients' namespace, sockets and destination.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Where the clients are.
    pub from: &'a Netns,
    /// Their sockets.
    pub stack: Stack,
    /// The server.
    pub to: SocketAddr,
}

/// The results of the attempts.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How many there were.
    pub tried: usize,
    /// Those that failed.
    pub failed: Vec<Failure>,
    /// Attempts in which the client itself reached the server.
    pub bypassed: usize,
    /// The slowest that succeeded.
    pub slowest: Duration,
}

/// An attempt that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When it began.
    pub start: Instant,
    /// When it failed.
    pub end: Instant,
    /// Why.
    pub error: String,
}

impl Tally {
    /// Those that succeeded.
    #[must_use]
    pub fn succeeded(&self) -> usize {
        self.tried - self.failed.len()
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.tried += other.tried;
        self.failed.extend(other.failed);
        self.bypassed += other.bypassed;
        self.slowest = self.slowest.max(other.slowest);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tried, failed, bypassed, slowest } = self;
        write!(
            f,
            "{tried} connections tried, {} failed, {bypassed} bypassed, slowest {slowest:?}",
            failed.len()
        )
    }
}

/// Runs `act` while clients connect to the targets. An attempt that takes longer than `limit` has failed.
pub fn during(targets: &[Target<'_>], limit: Duration, act: impl FnOnce() -> Result<()>) -> Result<Tally> {
    paced(targets, limit, PAUSE, act)
}

/// As [`during`], with another pause between the end of a client's connection and its next.
pub fn paced(
    targets: &[Target<'_>],
    limit: Duration,
    pause: Duration,
    act: impl FnOnce() -> Result<()>,
) -> Result<Tally> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let over = &over;
        let clients: Vec<_> = targets
            .iter()
            .flat_map(|target| [target; CLIENTS])
            .map(|target| scope.spawn(move || target.from.run(|| client(target, limit, pause, over))))
            .collect();
        let acted = act();
        over.store(true, Ordering::Relaxed);
        let mut sum = Tally::default();
        for client in clients {
            sum += client.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        acted.with_context(|| sum.to_string())?;
        Ok(sum)
    })
}

fn client(target: &Target<'_>, limit: Duration, pause: Duration, over: &AtomicBool) -> Tally {
    let mut tally = Tally::default();
    while !over.load(Ordering::Relaxed) && !signals::interrupted() {
        let start = Instant::now();
        tally.tried += 1;
        match attempt(target, limit) {
            Ok(direct) => {
                tally.bypassed += usize::from(direct);
                tally.slowest = tally.slowest.max(start.elapsed());
            }
            Err(error) => {
                tally.failed.push(Failure { start, end: Instant::now(), error: format!("{error:#}") });
            }
        }
        thread::sleep(pause);
    }
    tally
}

/// Connects, exchanges a line, and closes. Returns whether there was no proxy in between.
fn attempt(target: &Target<'_>, limit: Duration) -> Result<bool> {
    let stream = dial(target.stack, target.to, limit).context("connect")?;
    let mut connection = Connection::greeted(stream).context("greeting")?;
    connection.exchange("hello").context("exchange")?;
    let direct = connection.is_direct();
    connection.finish().context("end")?;
    Ok(direct)
}

/// Connects, and exchanges lines until it is over. Counts them, even if there is an error in the end.
pub fn talk(target: &Target<'_>, limit: Duration, over: impl Fn() -> bool, lines: &mut usize) -> Result<()> {
    /// Between two lines.
    const PAUSE: Duration = Duration::from_millis(20);
    let stream = target.from.run(|| dial(target.stack, target.to, limit))?.context("connect")?;
    let mut connection = Connection::greeted(stream).context("greeting")?;
    while !over() {
        connection.exchange(&format!("line {lines}")).with_context(|| format!("exchange of line {lines}"))?;
        *lines += 1;
        thread::sleep(PAUSE);
    }
    connection.finish().context("end").map(drop)
}
