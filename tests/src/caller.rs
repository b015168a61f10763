//! Processes in cgroups of their own that open connections: the kubelet, other processes of a node, impostors.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Process;
use crate::session::Session;
use crate::stack::Stack;
use crate::testbed::{Answer, SocketKind};

/// A cgroup, and what runs in it: every call is a process of its own.
#[derive(Debug)]
pub struct Caller {
    cgroup: Cgroup,
    testbed: PathBuf,
}

impl Caller {
    /// Makes the cgroup, inside the session's.
    pub fn new(session: &Session, name: &str) -> Result<Self> {
        Self::within(session, session.cgroup(), name)
    }

    /// Makes the cgroup inside another one, which has to outlive it.
    pub fn within(session: &Session, parent: &Cgroup, name: &str) -> Result<Self> {
        Ok(Self { cgroup: parent.child(name)?, testbed: session.binaries().testbed.clone() })
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Connects to a test server.
    pub fn call(&self, netns: &Netns, stack: Stack, to: SocketAddr) -> Result<Answer> {
        self.run(netns, stack, to, &[])
    }

    /// As [`Caller::call`], with a socket that is marked before.
    pub fn call_with_mark(&self, netns: &Netns, stack: Stack, to: SocketAddr, mark: u32) -> Result<Answer> {
        self.run(netns, stack, to, &["--mark", &mark.to_string(), "--limit", "1"])
    }

    /// Connects to test servers in turn, as a kubelet probes them, until the value is dropped or ended.
    pub fn probe(&self, netns: &Netns, stack: Stack, to: &[SocketAddr], log: &Path) -> Result<Probes> {
        let mut command = Command::new(&self.testbed);
        command.args(["client", "--family", SocketKind::of(stack), "--count", &usize::MAX.to_string()]);
        command.args(["--pause", "10", "--limit", "10"]);
        command.args(to.iter().flat_map(|to| ["--to".to_owned(), to.to_string()]));
        Process::spawn("prober", command, netns, &self.cgroup, log).map(Probes)
    }

    fn run(&self, netns: &Netns, stack: Stack, to: SocketAddr, options: &[&str]) -> Result<Answer> {
        let mut command = Command::new(&self.testbed);
        command.args(["client", "--family", SocketKind::of(stack), "--to", &to.to_string()]).args(options);
        let entrance = self.cgroup.entrance()?;
        // SAFETY: the closure runs between fork and exec and makes system calls only.
        unsafe { command.pre_exec(move || (&entrance).write_all(b"0")) };
        let output = netns.output(command, b"")?;
        serde_json::from_slice(&output).context("answer of the client")
    }
}

/// Connections that are made one after the other.
#[derive(Debug)]
pub struct Probes(Process);

impl Probes {
    /// Ends them. Returns the result of each.
    pub fn end(mut self) -> Result<Vec<Answer>> {
        self.0.must_run()?;
        self.0.kill()?;
        let log = self.0.log();
        // The last line may have been cut.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
    }
}
