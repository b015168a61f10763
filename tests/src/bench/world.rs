//! The world of the connection measurements: for each arm a pod with clients and a pod with a server.
//!
//! ```text
//!             client's pod        server's pod       proxy in both pods
//! floor       –                   –                  theirs, dialled directly
//! again       –                   –                  theirs, dialled directly
//! none        –                   –                  –
//! ebpf        enrolled            enrolled           ours: told by the agent
//! against     enrolled            enrolled           of another node, whose agent is another build
//! iptables    rules               rules              theirs: told by the mesh
//! nft         rules               rules              theirs
//! ```
//!
//! All proxies are processes of the same program. Clients, servers and the proxy of the arms without an agent are outside of
//! the cgroups that our programs are attached to.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::listener::{Listener, Owner};
use super::mesh::Mesh;
use super::place::{APPLICATIONS, PROXIES, Place};
use super::proxies::{Running, Serving, Theirs, serve_node};
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
    /// The same with other pods: what differs between the two is how much the measurement errs.
    Again,
    /// Straight to the server.
    None,
    /// This project.
    Ebpf,
    /// Another build of it.
    Against,
    /// iptables and ip6tables.
    Iptables,
    /// nftables.
    Nft,
}

impl Arm {
    /// The rules that redirect.
    #[must_use]
    pub fn netfilter(self) -> Option<Netfilter> {
        match self {
            Self::Iptables => Some(Netfilter::Iptables),
            Self::Nft => Some(Netfilter::Nft),
            Self::Floor | Self::Again | Self::None | Self::Ebpf | Self::Against => None,
        }
    }

    /// Whether its clients dial the proxy directly.
    #[must_use]
    pub fn is_floor(self) -> bool {
        matches!(self, Self::Floor | Self::Again)
    }

    /// Whether an agent enrolls its pods.
    #[must_use]
    pub fn is_enrolled(self) -> bool {
        matches!(self, Self::Ebpf | Self::Against)
    }

    /// As reports call it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Again => "floor again",
            Self::None => "none",
            Self::Ebpf => "ebpf",
            Self::Against => "against",
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

/// A node with an agent. Fields are dropped in this order.
#[derive(Debug)]
struct Site {
    proxy: Option<Running>,
    outside: Pod,
    node: Arc<Node>,
    proxy_cgroup: Cgroup,
    applications: Cgroup,
    cgroup: Cgroup,
}

impl Site {
    fn new(session: &Arc<Session>, name: &str, agent: &[String]) -> Result<Self> {
        let cgroup = Cgroup::beside_this_process(name)?;
        let (proxy_cgroup, applications) = (cgroup.child("proxy")?, cgroup.child("applications")?);
        let mut agent_arguments = agent.to_vec();
        agent_arguments.extend(["--cgroup".to_owned(), cgroup.path().display().to_string()]);
        let node =
            Node::with(session, NodeOptions { proxy: false, agent_arguments, ..NodeOptions::default() })?;
        let outside = node.plain("outside", Families::Dual)?;
        Ok(Self { proxy: None, outside, node, proxy_cgroup, applications, cgroup })
    }
}

/// The world of an experiment. Fields are dropped in this order.
#[derive(Debug)]
pub struct World {
    theirs: Option<Theirs>,
    pairs: BTreeMap<Arm, Pair>,
    /// The server that hands pods to the proxy of the arms without an agent.
    mesh: Mesh,
    against: Option<Site>,
    home: Site,
    applications: Cgroup,
    cgroup: Cgroup,
}

impl World {
    /// Makes it, with this kind of proxy; with the arm of another build where there is one.
    pub fn new(
        session: &Arc<Session>,
        against: Option<&Arc<Session>>,
        serving: Serving,
        agent: &[String],
    ) -> Result<Self> {
        let home = Site::new(session, "ours", agent)?;
        let against = against.map(|session| Site::new(session, "against", agent)).transpose()?;
        let cgroup = Cgroup::beside_this_process("others")?;
        let applications = cgroup.child("applications")?;
        let mesh = Mesh::start(&home.node.dir().join("mesh"))?;
        let mut world =
            Self { theirs: None, pairs: BTreeMap::new(), mesh, against, home, applications, cgroup };
        world.start_proxies(serving)?;
        for arm in world.arms() {
            let pair = world.pair(arm)?;
            world.pairs.insert(arm, pair);
        }
        Ok(world)
    }

    /// The arms that there are.
    #[must_use]
    pub fn arms(&self) -> Vec<Arm> {
        let all = Arm::value_variants().iter().copied();
        all.filter(|&arm| arm != Arm::Against || self.against.is_some()).collect()
    }

    fn site(&self, arm: Arm) -> Result<&Site> {
        if arm == Arm::Against { self.against.as_ref().context("no other build") } else { Ok(&self.home) }
    }

    /// The cgroup of an arm's clients and servers.
    pub fn applications(&self, arm: Arm) -> Result<&Path> {
        Ok(if arm.is_enrolled() { self.site(arm)?.applications.path() } else { self.applications.path() })
    }

    fn pair(&self, arm: Arm) -> Result<Pair> {
        let [client, server] = ["client", "server"].map(|role| self.pod(arm, role));
        let (client, server) = (client?, server?);
        let mut command = own_program()?;
        command.args(["serve", "--port", &PORT.to_string()]);
        let site = self.site(arm)?;
        let cgroup = if arm.is_enrolled() { &site.applications } else { &self.applications };
        command.args(Place::arguments(APPLICATIONS, None));
        let log = site.node.dir().join(format!("server-{}.log", arm.label()));
        let name = format!("server of {}", arm.label());
        let mut server_process = Process::spawn(&name, command, server.netns(), cgroup, &log)?;
        server_process.wait_until("listening server", || {
            Ok(std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")))
        })?;
        Ok(Pair { server_process, client, server })
    }

    fn pod(&self, arm: Arm, role: &str) -> Result<Pod> {
        let node = &self.site(arm)?.node;
        let spec = node.numbered(&format!("{}-{role}", arm.label().replace(' ', "-")), Families::Dual);
        let spec = if arm.is_enrolled() { spec } else { spec.not_enrolled() };
        let pod = Pod::start(node, spec)?;
        if let Some(netfilter) = arm.netfilter() {
            netfilter.apply(pod.netns())?;
        }
        if !arm.is_enrolled() && arm != Arm::None {
            self.mesh.add(&pod)?;
        }
        // Many seconds of short connections need more than the default 28,000 ports.
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
        for site in [Some(&mut self.home), self.against.as_mut()].into_iter().flatten() {
            if site.proxy.take().is_some() {
                site.node.with_agent(|agent| agent.wait_for_no_proxy())?;
            }
            site.proxy = Some(serve_node(serving, tunnelled, &site.node, &site.proxy_cgroup)?);
        }
        if self.theirs.take().is_some() {
            self.mesh.wait_for_no_proxy()?;
        }
        self.theirs = Some(Theirs::start(serving, tunnelled, &self.home.node, &self.mesh, &self.cgroup)?);
        Ok(())
    }

    /// The node whose agent is the build that is measured.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.home.node
    }

    /// The pods of an arm.
    pub fn of(&self, arm: Arm) -> Result<&Pair> {
        self.pairs.get(&arm).with_context(|| format!("pods of {}", arm.label()))
    }

    /// A pod without a proxy, from which inbound connections of an arm come.
    pub fn outside(&self, arm: Arm) -> Result<&Pod> {
        Ok(&self.site(arm)?.outside)
    }

    /// The CPU time of everything that belongs to the experiment so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        let sites = [Some(&self.home), self.against.as_ref()].into_iter().flatten();
        let cgroups = sites.map(|site| &site.cgroup).chain([&self.cgroup, self.node().session().cgroup()]);
        cgroups.map(Cgroup::cpu_time).sum()
    }

    /// The processes that serve the connections of an arm: the server, and the proxy.
    pub fn processes(&self, arm: Arm) -> Result<Vec<u32>> {
        let server = self.of(arm)?.server_process();
        let proxy = match arm {
            Arm::None => return Ok(vec![server]),
            Arm::Ebpf | Arm::Against => self.site(arm)?.proxy.as_ref().map(Running::process),
            Arm::Floor | Arm::Again | Arm::Iptables | Arm::Nft => self.theirs.as_ref().map(Theirs::process),
        };
        Ok(vec![server, proxy.context("no proxy runs")?])
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
