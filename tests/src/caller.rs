//! Processes in a cgroup of their own that make connections: the kubelet, other processes of a node, impostors.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
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
