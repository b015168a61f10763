//! A node proxy process: the embedded one or a ztunnel.

mod embedded;
mod kind;
mod ztunnel;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use redirect_protocol::placement::Placement;

use crate::agent;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Process;
use crate::session::Session;

pub use kind::ProxyKind;

/// A running proxy, in a cgroup of its own by which the agent recognises it.
#[derive(Debug)]
pub struct Proxy {
    process: Process,
    /// A ztunnel has its own, as in Kubernetes: two of them would conflict on the node.
    _netns: Option<Netns>,
}

/// What a proxy is started with.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Distinguishes the proxies of a node.
    pub number: u32,
    /// The node's namespace.
    pub netns: &'a Netns,
    /// The proxy's cgroup.
    pub cgroup: &'a Cgroup,
    /// The node's directory of sockets and logs.
    pub dir: &'a Path,
    /// The upstream DNS servers.
    pub dns_servers: [SocketAddr; 2],
    /// Pods that are reached through the mesh's tunnel.
    pub tunnelled: &'a [Tunnelled],
    /// Variables of its environment.
    pub environment: &'a [(String, String)],
    /// How long open connections may continue after SIGTERM, in seconds.
    pub drain: u64,
    /// Its placement.
    pub placement: Placement,
}

/// A pod that a ztunnel knows before it is created. The embedded proxy has no tunnel and ignores it.
#[derive(Clone, Debug)]
pub struct Tunnelled {
    /// Its Kubernetes name, in the namespace `default`.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Proxy {
    /// Starts a proxy of the session's kind. The node's access log continues across restarts.
    pub fn start(session: &Session, setup: &Setup<'_>) -> Result<Self> {
        let name = format!("proxy {} of {}", setup.number, setup.netns.name());
        let binary = &session.binaries().proxy;
        let log = setup.dir.join(format!("proxy-{:03}.log", setup.number));
        let (command, netns) = match session.binaries().kind {
            ProxyKind::Embedded => (embedded::command(binary, setup, agent::spelled(setup.placement)), None),
            ProxyKind::Ztunnel => (ztunnel::command(binary, setup)?, Some(Netns::new(&name)?)),
        };
        let home = netns.as_ref().unwrap_or(setup.netns);
        let process = Process::spawn(&name, command, home, setup.cgroup, &log)?;
        Ok(Self { process, _netns: netns })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
