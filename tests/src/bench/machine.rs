//! The machine that was measured on, and its other load.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use serde::Serialize;

use crate::netns::Netns;
use crate::{signals, wait};

/// A run is noisy above this load of other processes, running or runnable.
const QUIET: f64 = 0.6;

/// The deadline for the kernel to remove namespaces.
const NAMESPACES: Duration = Duration::from_secs(120);

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// `uname -r`.
    pub kernel: String,
    /// The processor's name.
    pub processor: String,
    /// How many.
    pub processors: usize,
    /// Memory in MiB.
    pub memory: u64,
    /// The version of iptables, with its back end.
    pub iptables: String,
    /// The version of nftables.
    pub nftables: String,
    /// Load average of a minute before the run.
    pub load_before: f64,
    /// The share of both processors' time that other processes took during the measurements of connections.
    pub disturbance: f64,
}

impl Machine {
    /// Reads the facts that are known before a run.
    pub fn look() -> Result<Self> {
        let processor = fs::read_to_string("/proc/cpuinfo")?;
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = fs::read_to_string("/proc/meminfo")?;
        let memory =
            memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        Ok(Self {
            kernel: nix::sys::utsname::uname()?.release().to_string_lossy().into_owned(),
            processor: processor.map_or("unknown", |(_, name)| name).to_owned(),
            processors: thread::available_parallelism()?.get(),
            memory: memory.and_then(|text| text.parse::<u64>().ok()).unwrap_or_default() / 1024,
            iptables: version("iptables"),
            nftables: version("nft"),
            load_before: load()?,
            disturbance: 0.0,
        })
    }

    /// Whether other load disturbed the run.
    #[must_use]
    pub fn is_noisy(&self) -> bool {
        self.disturbance > 0.15
    }
}

fn version(program: &str) -> String {
    let output = std::process::Command::new(program).arg("--version").output();
    let line = output.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    line.map_or_else(|| "absent".to_owned(), |line| line.trim().to_owned())
}

fn load() -> Result<f64> {
    Ok(fs::read_to_string("/proc/loadavg")?.split(' ').next().unwrap_or_default().parse()?)
}

/// Waits until the machine is quiet, up to a limit. Returns the load average.
pub fn wait_for_quiet(patience: Duration) -> Result<f64> {
    let start = Instant::now();
    loop {
        let load = load()?;
        if load < QUIET || start.elapsed() >= patience {
            return Ok(load);
        }
        signals::check()?;
        thread::sleep(Duration::from_secs(1));
    }
}

/// Steal time of this machine so far, in ticks of 10 ms.
pub fn stolen() -> Result<u64> {
    let text = fs::read_to_string("/proc/stat")?;
    let field = text.lines().next().and_then(|line| line.split_whitespace().nth(8));
    field.context("no stolen time in /proc/stat")?.parse().context("stolen time")
}

/// Waits until the kernel has removed the namespaces that ended before: it does so one after the other, for seconds if
/// there are many, under global locks.
pub fn wait_for_namespaces() -> Result<()> {
    let (last, watch) = (Netns::new("last")?, Netns::new("watch")?);
    last.ip_batch(&[format!("link add eth0 type veth peer name last netns {}", watch.path().display())])?;
    drop(last);
    let gone = || Ok(watch.run(|| if_nametoindex("last"))?.is_err());
    wait::until_true("end of earlier namespaces", NAMESPACES, gone)
}

/// Processor time of the machine, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    busy: u64,
    all: u64,
}

impl Busy {
    /// So far.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let fields = text.lines().next().unwrap_or_default().split_whitespace().skip(1).take(8);
        let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        let all: u64 = ticks.iter().sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        Ok(Self { busy: all - idle, all })
    }

    /// The share of other processes in the time since then, if `own` CPU time was ours.
    #[must_use]
    pub fn disturbance(self, later: Self, own: Duration) -> f64 {
        const TICK: f64 = 0.01;
        let busy = (later.busy - self.busy) as f64 * TICK;
        let all = (later.all - self.all).max(1) as f64 * TICK;
        ((busy - own.as_secs_f64()) / all).max(0.0)
    }
}
