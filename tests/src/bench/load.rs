//! The load generator: a process in a client's namespace, which prints what it measured as JSON.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use socket2::{Socket, Type};

use super::place::Place;
use super::protocol::{Kind, MESSAGE, Sight};
use crate::stack::Stack;
use crate::testbed::SocketKind;

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
    /// What to do.
    #[arg(long)]
    pub work: Work,
    /// The kind of socket.
    #[arg(long)]
    pub family: SocketKind,
    /// The server. Several are taken in turn.
    #[arg(long, required = true)]
    pub to: Vec<SocketAddr>,
    /// How many clients at once.
    #[arg(long, default_value_t = 1)]
    pub clients: usize,
    /// How long to measure.
    #[arg(long)]
    pub milliseconds: u64,
    /// How long to do the same before, unmeasured.
    #[arg(long, default_value_t = 20)]
    pub warm_up: u64,
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Length of the measurement.
    pub nanoseconds: u64,
    /// Operations in it: connections, round trips, or bytes.
    pub count: u64,
    /// Latency of an operation: median, 99th and 99.9th percentile.
    pub latency: [u64; 3],
    /// Operations with the warm-up.
    pub all: u64,
    /// CPU time of the load generator for all of them, in nanoseconds.
    pub cpu: u64,
    /// Connections that failed.
    pub errors: u64,
}

/// How long a run may take beyond its length before the process is killed: a connection that hangs must not hang all.
const PATIENCE: u64 = 40;

/// Runs it and prints the outcome.
pub fn run(options: &Options) -> Result<()> {
    options.place.take()?;
    let length = (options.milliseconds + options.warm_up) / 1000 + PATIENCE;
    nix::unistd::alarm::set(u32::try_from(length)?);
    println!("{}", serde_json::to_string(&measure(options)?)?);
    Ok(())
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
        Ok(Self {
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
            count: 0,
            all: 0,
            errors: 0,
            nanoseconds: 0,
        })
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

fn measure(options: &Options) -> Result<Outcome> {
    let total = Mutex::new(Tally::new()?);
    let barrier = Barrier::new(options.clients);
    let before = cpu_time()?;
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..options.clients)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    barrier.wait();
                    let tally = match options.work {
                        Work::Connections => connections(options)?,
                        Work::PingPong => ping_pong(options)?,
                        Work::Bulk => bulk(options)?,
                    };
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(&tally)
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })?;
    let cpu = cpu_time()? - before;
    let total = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Outcome {
        nanoseconds: total.nanoseconds,
        count: total.count,
        latency: [50.0, 99.0, 99.9].map(|percentile| total.latency.value_at_percentile(percentile)),
        all: total.all,
        cpu,
        errors: total.errors,
    })
}

fn cpu_time() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok((usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds()).cast_unsigned())
}

/// Repeats an operation for the warm-up and for the measurement.
fn repeat(options: &Options, mut operation: impl FnMut() -> Result<bool>) -> Result<Tally> {
    let mut tally = Tally::new()?;
    let start = Instant::now();
    let warm = start + Duration::from_millis(options.warm_up);
    let mut began = start;
    while began < warm {
        operation()?;
        tally.all += 1;
        began = Instant::now();
    }
    let (first, end) = (began, began + Duration::from_millis(options.milliseconds));
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

fn connections(options: &Options) -> Result<Tally> {
    let stack = Stack::from(options.family);
    let mut servers = options.to.iter().map(|&server| stack.spell(server)).cycle();
    repeat(options, || {
        let Some(server) = servers.next() else { return Ok(false) };
        Ok(one_request(stack, server).is_ok())
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

fn ping_pong(options: &Options) -> Result<Tally> {
    let mut stream = connect_to(options)?;
    stream.set_nodelay(true)?;
    let mut response = [0; MESSAGE];
    repeat(options, || {
        stream.write_all(&Kind::PingPong.request())?;
        stream.read_exact(&mut response)?;
        Ok(true)
    })
}

fn bulk(options: &Options) -> Result<Tally> {
    const CHUNK: usize = 256 * 1024;
    let chunk = vec![Kind::Bulk as u8; CHUNK];
    let mut stream = connect_to(options)?;
    let mut tally = repeat(options, || {
        stream.write_all(&chunk)?;
        Ok(true)
    })?;
    // What is still on its way belongs to the measurement.
    let drained = Instant::now();
    stream.shutdown(Shutdown::Write)?;
    let mut response = [0; MESSAGE];
    stream.read_exact(&mut response)?;
    tally.nanoseconds += nanoseconds(drained.elapsed());
    tally.count *= CHUNK as u64;
    tally.all *= CHUNK as u64;
    Ok(tally)
}

fn connect_to(options: &Options) -> Result<TcpStream> {
    let stack = Stack::from(options.family);
    let server = *options.to.first().context("a server")?;
    connect(stack, stack.spell(server)).with_context(|| format!("connect to {server}"))
}

fn connect(stack: Stack, server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(stack.domain(), Type::STREAM.cloexec(), None)?;
    socket.connect(&server.into())?;
    Ok(socket.into())
}

/// How the server at the end of a connection sees it.
pub fn identify(stack: Stack, server: SocketAddr) -> Result<Sight> {
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
