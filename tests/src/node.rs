//! A node: a network namespace with a bridge, an agent and a proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use redirect_ebpf::Family;
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::{PodReport, Status};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::access_log::{AccessLog, Register};
use crate::agent::{self, Agent};
use crate::cgroup::Cgroup;
use crate::cni::{Chain, REDIRECT};
use crate::dns::{self, DnsServer};
use crate::faults::Faults;
use crate::netns::Netns;
use crate::pod::{Pod, PodSpec};
use crate::proxy::{Proxy, Setup, Tunnelled};
use crate::session::{NodeNumber, Session};
use crate::stack::Families;
use crate::wait;

/// The part of the subnet from which addresses can be chosen; the other parts have the numbers of
/// [`Families`].
const CHOSEN: u8 = 3;

/// The programs on a node.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Whether there is an agent.
    pub agent: bool,
    /// Arguments for it.
    pub agent_arguments: Vec<String>,
    /// Whether there is a proxy.
    pub proxy: bool,
    /// Whether faults can be injected into agents, plugins and `redirect uninstall`.
    pub faults: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { agent: true, agent_arguments: Vec::new(), proxy: true, faults: false }
    }
}

/// The options of a proxy.
#[derive(Debug, Default)]
pub struct ProxyOptions<'a> {
    /// Its cgroup, which has to outlive it; by default the one of all proxies of the node.
    pub cgroup: Option<&'a Cgroup>,
    /// Pods that are reached through the mesh's tunnel.
    pub tunnelled: Vec<Tunnelled>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// How long its open connections may continue after SIGTERM, in seconds.
    pub drain: u64,
    /// Its placement; by default the session's.
    pub placement: Option<Placement>,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    pods: AtomicU32,
    names: AtomicU32,
    proxies: AtomicU32,
    register: Arc<Register>,
    dns: Mutex<Option<Arc<DnsServer>>>,
    // Dropped in this order: proxy, agent, the agent's leftovers, their cgroups, the directory, the
    // namespace.
    proxy: Mutex<Option<Proxy>>,
    agent: Mutex<Option<Agent>>,
    faults: Option<Faults>,
    _leftovers: Leftovers,
    proxy_cgroup: Cgroup,
    agent_cgroup: Cgroup,
    dir: TempDir,
    netns: Netns,
    session: Arc<Session>,
    number: NodeNumber,
}

impl Node {
    /// A node with agent and proxy.
    pub fn start(session: &Arc<Session>) -> Result<Arc<Self>> {
        Self::with(session, NodeOptions::default())
    }

    /// A node with these options.
    pub fn with(session: &Arc<Session>, options: NodeOptions) -> Result<Arc<Self>> {
        let node_number = session.next_node()?;
        let number = node_number.get();
        let netns = Netns::new(&format!("node-{number}"))?;
        netns.set_sysctl("net.ipv4.ip_forward", "1")?;
        netns.set_sysctl_if_any("net.ipv6.conf.all.forwarding", "1")?;
        for family in ["iptables", "ip6tables", "arptables"] {
            netns.set_sysctl_if_any(&format!("net.bridge.bridge-nf-call-{family}"), "0")?;
        }
        let dir = tempfile::Builder::new().prefix("node-").tempdir_in(session.directory())?;
        let node = Self {
            number: node_number,
            pods: AtomicU32::new(0),
            names: AtomicU32::new(0),
            proxies: AtomicU32::new(0),
            register: Arc::default(),
            dns: Mutex::default(),
            proxy: Mutex::default(),
            agent: Mutex::default(),
            faults: options
                .faults
                .then(|| Faults::new(agent::state_dir(dir.path()), agent::pin_dir(session, dir.path()))),
            _leftovers: Leftovers {
                session: session.clone(),
                netns: NetNs::open(&netns.path())?,
                dir: dir.path().to_owned(),
            },
            proxy_cgroup: session.cgroup().child(&format!("proxy-{number}"))?,
            agent_cgroup: session.cgroup().child(&format!("agent-{number}"))?,
            dir,
            netns,
            session: session.clone(),
        };
        if options.agent {
            node.start_agent(&options.agent_arguments)?;
        }
        if options.proxy {
            node.start_proxy()?;
        }
        Ok(Arc::new(node))
    }

    /// The node's own namespace: what Kubernetes calls the host's.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Distinguishes the nodes of a session.
    pub(crate) fn number(&self) -> u8 {
        self.number.get()
    }

    /// The session.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The directory of sockets and logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The agent's socket for plugin and command line.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        agent::socket(self.dir())
    }

    /// The node's address on its bridge: the pods' gateway.
    #[must_use]
    pub fn gateway(&self, family: Family) -> IpAddr {
        self.address(family, 1)
    }

    /// An address of the pods' network by its last number.
    #[must_use]
    pub fn address(&self, family: Family, host: u16) -> IpAddr {
        match family {
            Family::Ipv4 => {
                let [high, low] = host.to_be_bytes();
                Ipv4Addr::new(10, self.number.get(), high, low).into()
            }
            Family::Ipv6 => Ipv6Addr::new(0xfd00, self.number.get().into(), 0, 0, 0, 0, 0, host).into(),
        }
    }

    /// The pods' network.
    #[must_use]
    pub fn subnet(&self, family: Family) -> String {
        let length = match family {
            Family::Ipv4 => 16,
            Family::Ipv6 => 64,
        };
        format!("{}/{length}", self.address(family, 0))
    }

    /// A node that runs an agent with these arguments, and a proxy.
    pub fn with_arguments(session: &Arc<Session>, arguments: &[&str]) -> Result<Arc<Self>> {
        let agent_arguments = arguments.iter().map(ToString::to_string).collect();
        Self::with(session, NodeOptions { agent_arguments, ..NodeOptions::default() })
    }

    /// Starts the agent.
    pub fn start_agent(&self, arguments: &[String]) -> Result<()> {
        let faults = self.faults.as_ref();
        let agent =
            Agent::start(&self.session, &self.netns, &self.agent_cgroup, self.dir(), arguments, faults)?;
        *lock(&self.agent) = Some(agent);
        Ok(())
    }

    /// As [`Node::start_agent`], without waiting until it is ready.
    pub fn begin_agent(&self, arguments: &[String]) -> Result<()> {
        let faults = self.faults.as_ref();
        let agent =
            Agent::begin(&self.session, &self.netns, &self.agent_cgroup, self.dir(), arguments, faults)?;
        *lock(&self.agent) = Some(agent);
        Ok(())
    }

    /// Stops the agent as Kubernetes does; fails if it left anything or ended with an error.
    pub fn stop_agent(&self) -> Result<()> {
        lock(&self.agent).take().context("no agent is running")?.stop()
    }

    /// Stops the agent, which may leave state as configured.
    pub fn end_agent(&self) -> Result<()> {
        lock(&self.agent).take().context("no agent is running")?.end()
    }

    /// Kills the agent, like a crash.
    pub fn kill_agent(&self) -> Result<()> {
        lock(&self.agent).take().context("no agent is running")?.kill()
    }

    /// Where the agent pins what outlives it.
    #[must_use]
    pub fn pin_dir(&self) -> PathBuf {
        agent::pin_dir(&self.session, self.dir())
    }

    /// Where it keeps its checkpoints.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        agent::state_dir(self.dir())
    }

    /// `redirect uninstall` on this node.
    pub fn uninstall(&self, arguments: &[&str]) -> Result<Output> {
        let netns = NetNs::open(&self.netns.path())?;
        agent::uninstall(&self.session, &netns, self.dir(), arguments, self.faults.as_ref())
    }

    /// The faults of a node that was made with [`NodeOptions::faults`].
    pub fn faults(&self) -> Result<&Faults> {
        self.faults.as_ref().context("the node was made without faults")
    }

    /// Waits until the running proxy is in sync with the agent.
    pub fn wait_for_proxy(&self) -> Result<()> {
        let pid = self.proxy_pid()?;
        self.with_agent(|agent| agent.wait_for_proxy(pid))
    }

    /// Starts a proxy and waits until it knows every pod. Then ends a proxy that was already running, as in a
    /// rolling upgrade.
    pub fn start_proxy(&self) -> Result<()> {
        self.start_proxy_with(&ProxyOptions::default())
    }

    /// As [`Node::start_proxy`], in a cgroup that has to outlive it.
    pub fn start_proxy_in(&self, cgroup: &Cgroup) -> Result<()> {
        self.start_proxy_with(&ProxyOptions { cgroup: Some(cgroup), ..ProxyOptions::default() })
    }

    /// As [`Node::start_proxy`], with these options.
    pub fn start_proxy_with(&self, options: &ProxyOptions<'_>) -> Result<()> {
        self.start_another_proxy(options).map(drop)
    }

    /// As [`Node::start_proxy`], without waiting for anything.
    pub fn begin_proxy(&self) -> Result<()> {
        let proxy = self.spawn_proxy(&ProxyOptions::default())?;
        *lock(&self.proxy) = Some(proxy);
        Ok(())
    }

    /// As [`Node::start_proxy_with`]; a proxy that is already running continues, and is returned.
    pub fn start_another_proxy(&self, options: &ProxyOptions<'_>) -> Result<Option<Proxy>> {
        let mut proxy = self.spawn_proxy(options)?;
        let pid = proxy.process().pid();
        let ready = self.with_agent(|agent| agent.wait_for_proxy(pid));
        ready.with_context(|| format!("log of the proxy:\n{}", proxy.process().last_lines()))?;
        Ok(lock(&self.proxy).replace(proxy))
    }

    /// As [`Node::start_another_proxy`], without waiting for anything.
    pub fn begin_another_proxy(&self, options: &ProxyOptions<'_>) -> Result<Option<Proxy>> {
        let proxy = self.spawn_proxy(options)?;
        Ok(lock(&self.proxy).replace(proxy))
    }

    fn spawn_proxy(&self, options: &ProxyOptions<'_>) -> Result<Proxy> {
        let setup = Setup {
            number: self.proxies.fetch_add(1, Ordering::Relaxed),
            netns: &self.netns,
            cgroup: options.cgroup.unwrap_or(&self.proxy_cgroup),
            dir: self.dir(),
            dns_servers: Family::ALL.map(|family| SocketAddr::new(self.gateway(family), dns::PORT)),
            tunnelled: &options.tunnelled,
            environment: &options.environment,
            drain: options.drain,
            placement: options.placement.unwrap_or_else(|| self.session.placement()),
        };
        Proxy::start(&self.session, &setup)
    }

    /// Kills the proxy, like a crash, and waits until the agent has noticed.
    pub fn kill_proxy(&self) -> Result<()> {
        let mut proxy = lock(&self.proxy).take().context("no proxy is running")?;
        proxy.process().kill()?;
        self.with_agent(|agent| agent.wait_for_no_proxy())
    }

    /// The cgroup of its proxies.
    pub(crate) fn proxy_cgroup(&self) -> &Cgroup {
        &self.proxy_cgroup
    }

    /// The proxy's process ID.
    pub fn proxy_pid(&self) -> Result<u32> {
        Ok(lock(&self.proxy).as_mut().context("no proxy is running")?.process().pid())
    }

    /// The DNS server on the node, which is the proxy's upstream; started on first use.
    pub fn dns(&self) -> Result<Arc<DnsServer>> {
        let mut dns = lock(&self.dns);
        let server = match &*dns {
            Some(server) => server.clone(),
            None => Arc::new(DnsServer::everywhere(&self.netns)?),
        };
        Ok(dns.insert(server).clone())
    }

    /// Runs `act` with the running agent.
    pub fn with_agent<T>(&self, act: impl FnOnce(&mut Agent) -> Result<T>) -> Result<T> {
        act(lock(&self.agent).as_mut().context("no agent is running")?)
    }

    /// The agent's status.
    pub fn status(&self) -> Result<Status> {
        self.with_agent(|agent| agent.status())
    }

    /// The agent's report on a pod.
    pub fn report(&self, pod: &Pod) -> Result<Option<PodReport>> {
        Ok(self.reports()?.into_iter().find(|report| report.pod.uid == pod.identity().uid))
    }

    /// The pods that the agent knows.
    pub fn reports(&self) -> Result<Vec<PodReport>> {
        self.with_agent(|agent| agent.pods())
    }

    /// The proxies' access log.
    #[must_use]
    pub fn access_log(&self) -> AccessLog {
        AccessLog::new(self.session.binaries().kind, self.dir().to_owned(), self.register.clone())
    }

    /// The pods that may appear in the access log.
    pub(crate) fn register(&self) -> &Register {
        &self.register
    }

    /// A pod with addresses of these families, enrolled. A number makes its name unique on the node.
    pub fn enrolled(self: &Arc<Self>, name: &str, families: Families) -> Result<Pod> {
        Pod::start(self, self.numbered(name, families))
    }

    /// A pod that has never been enrolled. A number makes its name unique on the node.
    pub fn plain(self: &Arc<Self>, name: &str, families: Families) -> Result<Pod> {
        Pod::start(self, self.numbered(name, families).not_enrolled())
    }

    /// The specification of a pod with a name that is unique on the node.
    #[must_use]
    pub fn numbered(&self, name: &str, families: Families) -> PodSpec {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        PodSpec::new(&self.session.binaries().kind.pod_name(name, number), families)
    }

    /// A number for a pod, unique on the node.
    pub(crate) fn next_pod(&self) -> u32 {
        self.pods.fetch_add(1, Ordering::Relaxed)
    }

    /// The chain for pods of this kind, with these addresses or with free ones.
    #[must_use]
    pub fn chain(&self, families: Families, addresses: &[IpAddr]) -> Chain {
        // Chosen addresses have a network of their own, because host-local continues after the last address
        // that it reserved.
        let (part, suffix) = if addresses.is_empty() { (families as u8, "") } else { (CHOSEN, "-chosen") };
        let mut bridge = json!({
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
            "ipam": self.ipam(families, part),
        });
        if !addresses.is_empty() {
            bridge["args"] = json!({"cni": {"ips": addresses}});
        }
        self.chain_of(&format!("test-{}{suffix}", families.label()), bridge)
    }

    /// The chain for pods that are not on the bridge: each has a device and routes of its own on the node.
    #[must_use]
    pub fn routed_chain(&self, families: Families) -> Chain {
        let ptp = json!({"type": "ptp", "ipMasq": false, "ipam": self.ipam(families, CHOSEN)});
        self.chain_of(&format!("test-{}-routed", families.label()), ptp)
    }

    fn chain_of(&self, name: &str, first: Value) -> Chain {
        let timeout = wait::patient(2 * wait::SOON).as_secs();
        let redirect =
            json!({"type": REDIRECT, "agentSocket": self.agent_socket(), "timeoutSeconds": timeout});
        Chain::new(name, vec![first, redirect], self.session.plugin_directories())
            .with_faults(self.faults.clone())
    }

    fn ipam(&self, families: Families, part: u8) -> Value {
        let ranges: Vec<Value> = families.iter().map(|family| json!([self.range(family, part)])).collect();
        let routes = families.iter().map(|family| match family {
            Family::Ipv4 => json!({"dst": "0.0.0.0/0"}),
            Family::Ipv6 => json!({"dst": "::/0"}),
        });
        json!({
            "type": "host-local", "dataDir": self.dir().join("host-local"),
            "ranges": ranges, "routes": routes.collect::<Vec<_>>(),
        })
    }

    /// One of four parts of the subnet. Each kind of pod has its own, because host-local tracks addresses per
    /// network.
    fn range(&self, family: Family, part: u8) -> Value {
        let first = u16::from(part) * 0x4000;
        json!({
            "subnet": self.subnet(family),
            "gateway": self.gateway(family),
            "rangeStart": self.address(family, first + 0x010a),
            "rangeEnd": self.address(family, first + 0x3d00),
        })
    }

    /// Addresses that pods can have by choice ([`PodSpec::with_addresses`]), one of each family.
    #[must_use]
    pub fn to_choose(&self, number: u16) -> [IpAddr; 2] {
        Family::ALL.map(|family| self.address(family, u16::from(CHOSEN) * 0x4000 + 0x0200 + number))
    }

    /// Joins the node with another namespace by a pair of devices of this name: this side is host 1, the other host 2 of
    /// 172.16.NODE.0/24 and fd01:0:NODE::/64. The other side routes to the pods through the node.
    pub fn attach(&self, other: &Netns, device: &str) -> Result<()> {
        let number = self.number.get();
        let peer = other.path();
        self.netns.ip(&format!("link add {device} type veth peer name {device} netns {}", peer.display()))?;
        for (netns, host) in [(&self.netns, 1), (other, 2)] {
            netns.ip_batch(&[
                format!("address add 172.16.{number}.{host}/24 dev {device}"),
                format!("address add fd01:0:{number:x}::{host}/64 dev {device} nodad"),
                format!("link set {device} up"),
            ])?;
        }
        other.ip_batch(&[
            format!("route add {} via 172.16.{number}.1", self.subnet(Family::Ipv4)),
            format!("route add {} via fd01:0:{number:x}::1", self.subnet(Family::Ipv6)),
        ])
    }

    /// Joins two nodes, so that their pods reach each other.
    pub fn attach_node(&self, other: &Self) -> Result<()> {
        self.attach(&other.netns, "uplink")?;
        let number = self.number.get();
        self.netns.ip_batch(&[
            format!("route add {} via 172.16.{number}.2", other.subnet(Family::Ipv4)),
            format!("route add {} via fd01:0:{number:x}::2", other.subnet(Family::Ipv6)),
        ])
    }

    /// The address of the other side of [`Node::attach`].
    #[must_use]
    pub fn attached(&self, family: Family) -> IpAddr {
        match family {
            Family::Ipv4 => Ipv4Addr::new(172, 16, self.number.get(), 2).into(),
            Family::Ipv6 => Ipv6Addr::new(0xfd01, 0, self.number.get().into(), 0, 0, 0, 0, 2).into(),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Ok(objects) = self.with_agent(|agent| agent.objects()) {
            self.session.remember(objects);
        }
    }
}

/// Removes the leftovers of an agent that was killed, or configured to leave them.
#[derive(Debug)]
struct Leftovers {
    session: Arc<Session>,
    netns: NetNs,
    dir: PathBuf,
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        match agent::uninstall(&self.session, &self.netns, &self.dir, &[], None) {
            Ok(output) if output.status.success() => {}
            outcome => eprintln!("left behind: pins of {}: {outcome:?}", self.dir.display()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
