//! A node proxy process.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::access_log::AccessLog;
use crate::agent;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Process;
use crate::session::Session;

/// A running proxy, in a cgroup of its own by which the agent recognises it.
#[derive(Debug)]
pub struct Proxy {
    process: Process,
}

impl Proxy {
    /// Starts a proxy in a node's namespace. It keeps to the access log of the node across restarts. DNS questions go to
    /// these servers.
    pub fn start(
        session: &Session,
        netns: &Netns,
        cgroup: &Cgroup,
        dir: &Path,
        dns_servers: &[SocketAddr],
    ) -> Result<Self> {
        let mut command = Command::new(&session.binaries().proxy);
        if session.binaries().proxy == session.binaries().redirect {
            command.arg("proxy");
            let servers: Vec<_> = dns_servers.iter().map(ToString::to_string).collect();
            command.arg("--dns-upstream").arg(servers.join(","));
        }
        command.arg("--zds-socket").arg(agent::zds_socket(dir));
        command.arg("--access-log").arg(access_log(dir).path());
        command.args(["--drain", "0"]);
        let name = format!("proxy of {}", netns.name());
        Ok(Self { process: Process::spawn(&name, command, netns, cgroup, &dir.join("proxy.log"))? })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The access log of a node's proxies.
#[must_use]
pub fn access_log(dir: &Path) -> AccessLog {
    AccessLog::new(dir.join("access.log"))
}
