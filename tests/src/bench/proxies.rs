//! The node proxies of an experiment: one that gets its pods from an agent, and one of the same program for the arms
//! without an agent.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::mesh::Mesh;
use super::place::{PROXIES, pin};
use super::world::{own_program, proxy_place};
use crate::cgroup::Cgroup;
use crate::process::Process;
use crate::proxy::{Proxy, ProxyKind, Setup, Tunnelled};
use crate::{Node, agent};

/// The behavior of a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serving {
    /// Answers connections itself.
    Sink,
    /// Only acknowledges pods.
    Nothing,
    /// Forwards connections: the session's proxy.
    Pass,
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

    /// Pins all of its threads to the proxies' CPU.
    fn keep_in_place(&self) -> Result<()> {
        threads(self.process)?.into_iter().try_for_each(|thread| pin(thread, PROXIES))
    }
}

/// Starts a node's proxy, and waits until it serves every pod.
pub(super) fn serve_node(
    serving: Serving,
    tunnelled: &[Tunnelled],
    node: &Node,
    cgroup: &Cgroup,
) -> Result<Running> {
    let proxy = spawn(serving, tunnelled, node, cgroup, node.dir(), Redirection::Socket)?;
    node.with_agent(|agent| agent.wait_for_proxy(proxy.process))?;
    proxy.keep_in_place()?;
    Ok(proxy)
}

/// The proxy of the arms without an agent.
#[derive(Debug)]
pub struct Theirs(Running);

impl Theirs {
    /// Starts it, and waits until it serves every pod.
    pub fn start(
        serving: Serving,
        tunnelled: &[Tunnelled],
        node: &Node,
        mesh: &Mesh,
        cgroup: &Cgroup,
    ) -> Result<Self> {
        let proxy = spawn(serving, tunnelled, node, cgroup, mesh.dir(), Redirection::Conntrack)?;
        mesh.wait_for_proxy(proxy.process)?;
        proxy.keep_in_place()?;
        Ok(Self(proxy))
    }

    /// Its process ID.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.0.process
    }
}

/// How a proxy finds the original destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redirection {
    /// At the socket.
    Socket,
    /// In conntrack.
    Conntrack,
}

/// Starts a proxy that gets its pods from the socket in a directory.
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

/// The CPU time of a process so far, in nanoseconds.
pub fn cpu_time(process: u32) -> Result<u64> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(process)?))?;
    Ok(u64::try_from(Duration::from(clock_gettime(clock)?).as_nanos())?)
}
