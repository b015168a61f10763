//! The node proxies of an experiment: one that our agent tells its pods, and one of the same program for the other arms.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::mesh::Mesh;
use super::place::{PROXIES, pin};
use super::world::{own_program, proxy_place};
use crate::cgroup::Cgroup;
use crate::process::Process;
use crate::proxy::{Proxy, ProxyKind, Setup, Tunnelled};
use crate::{Node, agent};

/// What a proxy does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serving {
    /// Answers itself.
    Sink,
    /// Does nothing but acknowledge pods.
    Nothing,
    /// Passes them on: the session's proxy.
    Pass,
}

/// The two processes.
#[derive(Debug)]
pub struct Proxies {
    ours: Running,
    theirs: Running,
}

/// A process that runs as long as the value lives.
#[derive(Debug)]
pub(super) struct Running {
    process: u32,
    _guard: Guard,
}

#[derive(Debug)]
#[expect(dead_code, reason = "dropping them ends the processes")]
enum Guard {
    Process(Process),
    Proxy(Proxy),
}

impl Running {
    /// Its process ID.
    pub(super) fn process(&self) -> u32 {
        self.process
    }
}

impl Proxies {
    /// Starts them and waits until they serve every pod. The first cgroup is that of ours.
    pub fn start(
        serving: Serving,
        tunnelled: &[Tunnelled],
        node: &Node,
        mesh: &Mesh,
        cgroups: [&Cgroup; 2],
    ) -> Result<Self> {
        let [ours, theirs] = cgroups;
        let ours = spawn(serving, tunnelled, node, ours, node.dir(), Redirection::Socket)?;
        node.with_agent(|agent| agent.wait_for_proxy(ours.process))?;
        let theirs = spawn(serving, tunnelled, node, theirs, mesh.dir(), Redirection::Conntrack)?;
        mesh.wait_for_proxy(theirs.process)?;
        for process in [&ours, &theirs] {
            for thread in threads(process.process)? {
                pin(thread, PROXIES)?;
            }
        }
        Ok(Self { ours, theirs })
    }

    /// The proxy of enrolled pods.
    #[must_use]
    pub fn ours(&self) -> u32 {
        self.ours.process
    }

    /// The proxy of the other arms.
    #[must_use]
    pub fn theirs(&self) -> u32 {
        self.theirs.process
    }
}

/// Where a proxy finds the original destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redirection {
    /// At the socket.
    Socket,
    /// In conntrack.
    Conntrack,
}

/// Starts a proxy that takes its pods from the socket in a directory.
pub(super) fn spawn(
    serving: Serving,
    tunnelled: &[Tunnelled],
    node: &Node,
    cgroup: &Cgroup,
    dir: &Path,
    redirection: Redirection,
) -> Result<Running> {
    let session = node.session();
    let servers =
        [SocketAddr::from(([192, 0, 2, 53], 53)), SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 53], 53))];
    let mut command = match serving {
        Serving::Sink | Serving::Nothing => {
            let mut command = own_program()?;
            command.arg("sink").args(proxy_place());
            if serving == Serving::Nothing {
                command.arg("--acknowledge-only");
            }
            command
        }
        Serving::Pass if session.binaries().kind == ProxyKind::Ztunnel => {
            let setup = Setup {
                number: redirection as u32,
                netns: node.netns(),
                cgroup,
                dir,
                dns_servers: servers,
                tunnelled,
                environment: &[("RUST_LOG".to_owned(), "error".to_owned())],
                drain: 0,
                placement: session.placement(),
            };
            let mut proxy = Proxy::start(session, &setup)?;
            return Ok(Running { process: proxy.process().pid(), _guard: Guard::Proxy(proxy) });
        }
        // Without an access log, which would be half of the work.
        Serving::Pass => {
            let mut command = Command::new(&session.binaries().redirect);
            command.args(["proxy", "--drain", "0", "--worker-threads", "1"]);
            command.args(["--dns-upstream", &servers[0].to_string()]);
            if redirection == Redirection::Conntrack {
                command.args(["--original-destination", "conntrack"]);
            }
            command
        }
    };
    command.arg("--zds-socket").arg(agent::zds_socket(dir));
    let process = Process::spawn("proxy", command, node.netns(), cgroup, &dir.join("measured-proxy.log"))?;
    Ok(Running { process: process.pid(), _guard: Guard::Process(process) })
}

/// The threads of a process.
pub(super) fn threads(process: u32) -> Result<Vec<i32>> {
    let directory = format!("/proc/{process}/task");
    let entries = fs::read_dir(&directory).with_context(|| directory.clone())?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// The CPU time of a process's living threads, in nanoseconds.
pub fn cpu_time(process: u32) -> Result<u64> {
    let mut sum = 0;
    for thread in threads(process)? {
        // A thread may end in between.
        let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/schedstat")).unwrap_or_default();
        sum += text.split(' ').next().and_then(|first| first.parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(sum)
}
