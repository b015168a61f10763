//! The place of a measurement's process: its CPU, its priority, and whether it is in the cgroup that our programs are attached
//! to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::cgroup;

/// The processor of clients and servers.
pub const APPLICATIONS: usize = 0;

/// The processor of node proxies.
pub const PROXIES: usize = 1;

/// Where the process runs.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// The processor.
    #[arg(long)]
    pub cpu: usize,
    /// The cgroup; the parent's by default.
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
}

impl Place {
    /// Moves this process there, before any thread is started.
    pub fn take(&self) -> Result<()> {
        pin(0, self.cpu)?;
        self.cgroup.as_deref().map_or(Ok(()), cgroup::enter)
    }

    /// As arguments.
    #[must_use]
    pub fn arguments(cpu: usize, cgroup: Option<&Path>) -> Vec<String> {
        let mut arguments = vec!["--cpu".to_owned(), cpu.to_string()];
        if let Some(cgroup) = cgroup {
            arguments.extend(["--cgroup".to_owned(), cgroup.display().to_string()]);
        }
        arguments
    }
}

/// Pins a thread to a CPU with real-time priority. Threads that it starts inherit both.
pub fn pin(thread: i32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("processor {cpu}"))?;
    sched_setaffinity(Pid::from_raw(thread), &set).with_context(|| format!("to processor {cpu}"))?;
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads the structure, which outlives it.
    let changed = unsafe { libc::sched_setscheduler(thread, libc::SCHED_RR, &raw const first) };
    Errno::result(changed).map(drop).context("real-time scheduling")
}
