//! The load generator: a process in a client's namespace that executes orders from its standard input block by block, and
//! answers each with its measurements as one line of JSON.
//!
//! There is one for each arm, and they take turns. So no block pays for starting a process, and long-lived connections stay
//! open between blocks.

use std::collections::HashMap;
use std::io::{BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use socket2::{Socket, Type};

use super::place::Place;
use super::protocol::{Kind, MESSAGE, Sight, VOLUME};
use crate::stack::Stack;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Connections one after the other: connect, one request, close.
    Connections,
    /// The round trip on an open connection.
    PingPong,
    /// Throughput of one connection.
    Bulk,
}

/// Settings of the load generator.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

/// An order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Measure for a while.
    Block(Block),
    /// Report how a server sees a connection.
    Identify(Stack, SocketAddr),
    /// Close all connections, and report the latencies since the last time.
    Finish,
}

/// A few milliseconds of one kind of work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Block {
    /// What to do.
    pub work: Work,
    /// The kind of socket.
    pub stack: Stack,
    /// How many clients at once.
    pub clients: usize,
    /// The servers, used in turn.
    pub to: Vec<SocketAddr>,
    /// How long.
    pub length: Length,
}

/// The duration of a block, in microseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Length {
    /// Measured.
    pub measured: u64,
    /// Before the measurement, to refill caches that other arms have displaced.
    pub warm_up: u64,
}

/// The result of a block.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Length of the measurement.
    pub nanoseconds: u64,
    /// Operations in it: connections, round trips, or bytes.
    pub count: u64,
    /// Operations including the warm-up.
    pub all: u64,
    /// CPU time of the load generator for all of them, in nanoseconds.
    pub cpu: u64,
    /// Connections that failed.
    pub errors: u64,
}

/// Latency of an operation in nanoseconds: median, 99th and 99.9th percentile.
pub type Latency = [u64; 3];

/// How long a block may exceed its length before the process is killed, so that one stuck connection does not block the
/// run.
const PATIENCE: u64 = 40;

/// Carries out orders until there are no more.
pub fn run(options: &Options) -> Result<()> {
    options.place.take()?;
    let mut generator = Generator { open: HashMap::new(), latency: histogram()? };
    let mut answers = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Order::Block(block) => {
                let length = (block.length.measured + block.length.warm_up) / 1_000_000 + PATIENCE;
                nix::unistd::alarm::set(u32::try_from(length)?);
                let outcome = generator.measure(&block)?;
                nix::unistd::alarm::cancel();
                serde_json::to_string(&outcome)?
            }
            Order::Identify(stack, to) => serde_json::to_string(&identify(stack, to)?)?,
            Order::Finish => serde_json::to_string(&generator.finish()?)?,
        };
        writeln!(answers, "{answer}")?;
    }
    Ok(())
}

fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

/// State that lasts from block to block.
struct Generator {
    /// Long-lived connections, by purpose.
    open: HashMap<(Work, Stack, SocketAddr), TcpStream>,
    latency: Histogram<u64>,
}

impl Generator {
    fn measure(&mut self, block: &Block) -> Result<Outcome> {
        let mut open = match block.work {
            Work::Connections => None,
            Work::PingPong | Work::Bulk => Some(self.opened(block)?),
        };
        let before = cpu_time()?;
        let tally = match (&mut open, block.work) {
            (Some(stream), Work::Bulk) => bulk(stream, block)?,
            (Some(stream), _) => ping_pong(stream, block)?,
            (None, _) if block.clients == 1 => connections(block)?,
            (None, _) => at_once(block)?,
        };
        let cpu = cpu_time()? - before;
        if let (Some(stream), Some(&to)) = (open, block.to.first()) {
            self.open.insert((block.work, block.stack, to), stream);
        }
        self.latency.add(&tally.latency)?;
        let Tally { count, all, errors, nanoseconds, .. } = tally;
        Ok(Outcome { nanoseconds, count, all, cpu, errors })
    }

    /// The connection of such blocks.
    fn opened(&mut self, block: &Block) -> Result<TcpStream> {
        let &[to] = block.to.as_slice() else { bail!("one server, not {}", block.to.len()) };
        if let Some(stream) = self.open.remove(&(block.work, block.stack, to)) {
            return Ok(stream);
        }
        let stream =
            connect(block.stack, block.stack.spell(to)).with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn finish(&mut self) -> Result<Latency> {
        self.open.clear();
        let latency = std::mem::replace(&mut self.latency, histogram()?);
        Ok([50.0, 99.0, 99.9].map(|percentile| latency.value_at_percentile(percentile)))
    }
}

#[derive(Debug)]
struct Tally {
    latency: Histogram<u64>,
    count: u64,
    all: u64,
    errors: u64,
    nanoseconds: u64,
}

impl Tally {
    fn new() -> Result<Self> {
        Ok(Self { latency: histogram()?, count: 0, all: 0, errors: 0, nanoseconds: 0 })
    }

    fn add(&mut self, other: &Self) -> Result<()> {
        self.latency.add(&other.latency)?;
        self.count += other.count;
        self.all += other.all;
        self.errors += other.errors;
        self.nanoseconds = self.nanoseconds.max(other.nanoseconds);
        Ok(())
    }
}

fn at_once(block: &Block) -> Result<Tally> {
    let total = Mutex::new(Tally::new()?);
    let barrier = Barrier::new(block.clients);
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..block.clients)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    barrier.wait();
                    let tally = connections(block)?;
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(&tally)
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })?;
    Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The CPU time of this process's threads, in nanoseconds.
fn cpu_time() -> Result<u64> {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?);
    Ok(nanoseconds(time))
}

/// Repeats an operation for the warm-up and for the measurement.
fn repeat(length: Length, mut operation: impl FnMut() -> Result<bool>) -> Result<Tally> {
    let mut tally = Tally::new()?;
    let start = Instant::now();
    let warm = start + Duration::from_micros(length.warm_up);
    let mut began = start;
    while began < warm {
        operation()?;
        tally.all += 1;
        began = Instant::now();
    }
    let (first, end) = (began, began + Duration::from_micros(length.measured));
    while began < end {
        let succeeded = operation()?;
        let ended = Instant::now();
        tally.latency.saturating_record(nanoseconds(ended - began));
        tally.all += 1;
        tally.count += u64::from(succeeded);
        tally.errors += u64::from(!succeeded);
        began = ended;
    }
    tally.nanoseconds = nanoseconds(began - first);
    Ok(tally)
}

fn connections(block: &Block) -> Result<Tally> {
    let mut servers = block.to.iter().map(|&server| block.stack.spell(server)).cycle();
    repeat(block.length, || {
        let Some(server) = servers.next() else { return Ok(false) };
        Ok(one_request(block.stack, server).is_ok())
    })
}

fn one_request(stack: Stack, server: SocketAddr) -> std::io::Result<()> {
    let mut stream = connect(stack, server)?;
    stream.write_all(&Kind::Request.request())?;
    let mut response = [0; MESSAGE + 1];
    stream.read_exact(&mut response[..MESSAGE])?;
    // The server closes first.
    if stream.read(&mut response)? == 0 { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

fn ping_pong(stream: &mut TcpStream, block: &Block) -> Result<Tally> {
    let mut response = [0; MESSAGE];
    repeat(block.length, || {
        stream.write_all(&Kind::PingPong.request())?;
        stream.read_exact(&mut response)?;
        Ok(true)
    })
}

/// An operation is a volume and the server's answer to it, so that data in flight belongs to the measurement.
fn bulk(stream: &mut TcpStream, block: &Block) -> Result<Tally> {
    const CHUNK: usize = 64 * 1024;
    let chunk = [Kind::Bulk as u8; CHUNK];
    let mut response = [0; MESSAGE];
    let mut tally = repeat(block.length, || {
        for _ in 0..VOLUME / CHUNK {
            stream.write_all(&chunk)?;
        }
        stream.read_exact(&mut response)?;
        Ok(true)
    })?;
    tally.count *= VOLUME as u64;
    tally.all *= VOLUME as u64;
    Ok(tally)
}

fn connect(stack: Stack, server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(stack.domain(), Type::STREAM.cloexec(), None)?;
    socket.connect(&server.into())?;
    Ok(socket.into())
}

/// How the server at the end of a connection sees it.
fn identify(stack: Stack, server: SocketAddr) -> Result<Sight> {
    let mut stream = connect(stack, stack.spell(server)).with_context(|| format!("connect to {server}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&Kind::Identify.request())?;
    let mut line = String::new();
    stream.read_to_string(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("answer of {server}: {line:?}"))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
