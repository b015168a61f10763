//! Where the measurements of connections happen: one node, and for each arm a pod with clients and a pod with a server.
//!
//! ```text
//!             client's pod        server's pod       proxy in both pods
//! floor       –                   –                  theirs, dialled directly
//! none        –                   –                  –
//! ebpf        enrolled            enrolled           ours: told by the agent
//! iptables    rules               rules              theirs: told by the mesh
//! nft         rules               rules              theirs
//! ```
//!
//! Ours and theirs are two processes of the same program. Clients, servers and the proxy of the other arms are outside of
//! the cgroup that our programs are attached to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::listener::{Listener, Owner};
use super::mesh::Mesh;
use super::place::{APPLICATIONS, PROXIES, Place};
use super::proxies::{Proxies, Serving};
use super::rules::Netfilter;
use crate::cgroup::Cgroup;
use crate::process::Process;
use crate::proxy::Tunnelled;
use crate::{Families, Node, NodeOptions, Pod, Session};

/// The servers' port.
pub const PORT: u16 = 9000;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// Straight to the proxy's listener.
    Floor,
    /// Straight to the server.
    None,
    /// This project.
    Ebpf,
    /// iptables and ip6tables.
    Iptables,
    /// nftables.
    Nft,
}

impl Arm {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Floor, Self::None, Self::Ebpf, Self::Iptables, Self::Nft];

    /// The rules that redirect.
    #[must_use]
    pub fn netfilter(self) -> Option<Netfilter> {
        match self {
            Self::Iptables => Some(Netfilter::Iptables),
            Self::Nft => Some(Netfilter::Nft),
            Self::Floor | Self::None | Self::Ebpf => None,
        }
    }

    /// As reports call it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::None => "none",
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
            Self::Nft => "nft",
        }
    }
}

/// The pods of an arm. The servers end before their pods.
#[derive(Debug)]
pub struct Pair {
    server_process: Process,
    /// Where clients are.
    pub client: Pod,
    /// Where a server listens.
    pub server: Pod,
}

impl Pair {
    /// The server's process.
    #[must_use]
    pub fn server_process(&self) -> u32 {
        self.server_process.pid()
    }
}

/// The world of an experiment. Fields are dropped in this order.
#[derive(Debug)]
pub struct World {
    proxies: Option<Proxies>,
    pairs: BTreeMap<Arm, Pair>,
    outside: Pod,
    /// What hands pods to the proxy of the other arms.
    pub mesh: Mesh,
    proxy_cgroup: Cgroup,
    cgroup: Cgroup,
    node: Arc<Node>,
}

impl World {
    /// Makes it, with this kind of proxy.
    pub fn new(session: &Arc<Session>, serving: Serving, agent: &[String]) -> Result<Self> {
        let agent_arguments = agent.to_vec();
        let node =
            Node::with(session, NodeOptions { proxy: false, agent_arguments, ..NodeOptions::default() })?;
        let cgroup = Cgroup::beside_this_process("others")?;
        let proxy_cgroup = session.cgroup().child("measured-proxy")?;
        let mesh = Mesh::start(&node.dir().join("mesh"))?;
        let outside = node.plain("outside", Families::Dual)?;
        let mut world =
            Self { proxies: None, pairs: BTreeMap::new(), outside, mesh, proxy_cgroup, cgroup, node };
        world.start_proxies(serving)?;
        for arm in Arm::ALL {
            let pair = world.pair(arm)?;
            world.pairs.insert(arm, pair);
        }
        Ok(world)
    }

    fn pair(&self, arm: Arm) -> Result<Pair> {
        let [client, server] = ["client", "server"].map(|role| self.pod(arm, role));
        let (client, server) = (client?, server?);
        let mut command = own_program()?;
        command.args(["serve", "--port", &PORT.to_string()]);
        let cgroup = if arm == Arm::Ebpf { self.node.session().applications() } else { &self.cgroup };
        command.args(Place::arguments(APPLICATIONS, None));
        let log = self.node.dir().join(format!("server-{}.log", arm.label()));
        let name = format!("server of {}", arm.label());
        let mut server_process = Process::spawn(&name, command, server.netns(), cgroup, &log)?;
        server_process.wait_until("listening server", || {
            Ok(std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")))
        })?;
        Ok(Pair { server_process, client, server })
    }

    fn pod(&self, arm: Arm, role: &str) -> Result<Pod> {
        let spec = self.node.numbered(&format!("{}-{role}", arm.label()), Families::Dual);
        let spec = if arm == Arm::Ebpf { spec } else { spec.not_enrolled() };
        let pod = Pod::start(&self.node, spec)?;
        if let Some(netfilter) = arm.netfilter() {
            netfilter.apply(pod.netns())?;
        }
        if !matches!(arm, Arm::Ebpf | Arm::None) {
            self.mesh.add(&pod)?;
        }
        // Short connections of many seconds need more ports than the 28,000 that there are by default.
        pod.netns().set_sysctl("net.ipv4.ip_local_port_range", "16384 65535")?;
        Ok(pod)
    }

    /// Replaces the proxies.
    pub fn start_proxies(&mut self, serving: Serving) -> Result<()> {
        self.start_proxies_with(serving, &[])
    }

    /// Replaces the proxies by some that tunnel to every pod.
    pub fn start_tunnels(&mut self) -> Result<()> {
        let pods = self.pairs.values().flat_map(|pair| [&pair.client, &pair.server]);
        let tunnelled =
            |pod: &Pod| Tunnelled { name: pod.identity().name.clone(), addresses: pod.addresses().to_vec() };
        let tunnelled: Vec<Tunnelled> = pods.map(tunnelled).collect();
        self.start_proxies_with(Serving::Pass, &tunnelled)
    }

    fn start_proxies_with(&mut self, serving: Serving, tunnelled: &[Tunnelled]) -> Result<()> {
        if self.proxies.take().is_some() {
            self.node.with_agent(|agent| agent.wait_for_no_proxy())?;
            self.mesh.wait_for_no_proxy()?;
        }
        let cgroups = [&self.proxy_cgroup, &self.cgroup];
        let proxies = Proxies::start(serving, tunnelled, &self.node, &self.mesh, cgroups)?;
        self.proxies = Some(proxies);
        Ok(())
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The pods of an arm.
    pub fn of(&self, arm: Arm) -> Result<&Pair> {
        self.pairs.get(&arm).with_context(|| format!("pods of {}", arm.label()))
    }

    /// A pod without a proxy, from which inbound connections come.
    #[must_use]
    pub fn outside(&self) -> &Pod {
        &self.outside
    }

    /// The cgroup of clients of an arm, if it is not this process's own.
    #[must_use]
    pub fn cgroup_of(&self, arm: Arm) -> Option<PathBuf> {
        (arm != Arm::Ebpf).then(|| self.cgroup.path().to_owned())
    }

    /// The CPU time of everything that belongs to the experiment so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        Ok(self.cgroup.cpu_time()? + self.node.session().cgroup().cpu_time()?)
    }

    /// The processes that serve the connections of an arm: the server, and the proxy.
    pub fn processes(&self, arm: Arm) -> Result<Vec<u32>> {
        let proxies = self.proxies.as_ref().context("no proxy runs")?;
        let server = self.of(arm)?.server_process();
        Ok(match arm {
            Arm::None => vec![server],
            Arm::Ebpf => vec![server, proxies.ours()],
            Arm::Floor | Arm::Iptables | Arm::Nft => vec![server, proxies.theirs()],
        })
    }
}

/// The program that this process runs.
pub fn own_program() -> Result<Command> {
    Ok(Command::new(std::env::current_exe()?))
}

/// Settings of a server.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeOptions {
    /// The port.
    #[arg(long)]
    port: u16,
    /// Where it runs.
    #[command(flatten)]
    place: Place,
}

/// A server, until a signal ends the process.
pub fn serve(options: &ServeOptions) -> Result<()> {
    options.place.take()?;
    let _listener = Listener::start(options.port, Owner::Application)?;
    println!("listening");
    loop {
        std::thread::park();
    }
}

/// The processor of a proxy, for its command line.
#[must_use]
pub fn proxy_place() -> Vec<String> {
    Place::arguments(PROXIES, None)
}
