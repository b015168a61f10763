//! A pod: a network namespace that the CNI chain attached to a node.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use redirect_ebpf::Family;
use redirect_ebpf::constants::MARK_PROXY;
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::PodIdentity;
use serde_json::{Value, json};

use crate::access_log::{Direction, Entry};
use crate::cni::{Chain, REDIRECT, Sandbox};
use crate::connection::Connection;
use crate::netns::Netns;
use crate::node::Node;
use crate::process::Process;
use crate::server::Server;
use crate::stack::{Families, Stack, canonical};
use crate::wait;

/// How often to retry when a free port is one that the pod has used before.
const ATTEMPTS: usize = 1_000;

/// The specification of a pod.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes name.
    pub name: String,
    /// The service account that the runtime passes; empty for none.
    pub service_account: String,
    /// The families that it has addresses of.
    pub families: Families,
    /// Its addresses; empty for free ones.
    pub addresses: Vec<IpAddr>,
    /// Whether our plugin is in its chain.
    pub enrolled: bool,
    /// Whether IPv6 is disabled in its namespace altogether.
    pub ipv6_disabled: bool,
    /// Whether the node reaches it by a route of its own (`ptp`) instead of a bridge.
    pub routed: bool,
}

impl PodSpec {
    /// An enrolled pod in the namespace `default`.
    #[must_use]
    pub fn new(name: &str, families: Families) -> Self {
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            service_account: String::new(),
            families,
            addresses: Vec::new(),
            enrolled: true,
            ipv6_disabled: false,
            routed: false,
        }
    }

    /// In another Kubernetes namespace.
    #[must_use]
    pub fn in_namespace(self, namespace: &str) -> Self {
        Self { namespace: namespace.to_owned(), ..self }
    }

    /// Sets the service account that the runtime passes.
    #[must_use]
    pub fn with_service_account(self, account: &str) -> Self {
        Self { service_account: account.to_owned(), ..self }
    }

    /// Without our plugin.
    #[must_use]
    pub fn not_enrolled(self) -> Self {
        Self { enrolled: false, ..self }
    }

    /// Reached by a route instead of a bridge.
    #[must_use]
    pub fn routed(self) -> Self {
        Self { routed: true, ..self }
    }

    /// With these addresses.
    #[must_use]
    pub fn with_addresses(self, addresses: &[IpAddr]) -> Self {
        Self { addresses: addresses.to_vec(), ..self }
    }
}

/// A pod. Its chain is deleted with this value.
#[derive(Debug)]
pub struct Pod {
    identity: PodIdentity,
    families: Families,
    addresses: Vec<IpAddr>,
    chain: Chain,
    sandbox: Sandbox,
    result: Value,
    /// Whether the chain has to be deleted when the pod ends.
    attached: bool,
    /// Whether our plugin was ever called for the pod.
    enrolled: AtomicBool,
    /// The ports on which it has listened.
    ports: Mutex<BTreeSet<u16>>,
    netns: Netns,
    node: Arc<Node>,
}

impl Pod {
    /// Makes the namespace and runs the node's chain.
    pub fn start(node: &Arc<Node>, spec: PodSpec) -> Result<Self> {
        let chain = if spec.routed {
            node.routed_chain(spec.families)
        } else {
            node.chain(spec.families, &spec.addresses)
        };
        Self::through(node, spec, chain)
    }

    /// Makes the namespace and runs a chain.
    pub fn through(node: &Arc<Node>, spec: PodSpec, chain: Chain) -> Result<Self> {
        let number = node.next_pod();
        let netns = Netns::new(&format!("pod-{}", spec.name))?;
        if spec.ipv6_disabled {
            for scope in ["all", "default", "lo"] {
                netns.set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "1")?;
            }
        }
        let identity = PodIdentity {
            uid: format!("{:08x}-{:04x}-4000-8000-{number:012x}", std::process::id(), node.number()),
            namespace: spec.namespace,
            name: spec.name,
            service_account: spec.service_account,
        };
        let sandbox = sandbox(&identity, &format!("sandbox-{number}"), netns.path());
        let wanted = if spec.enrolled { chain.clone() } else { chain.without(REDIRECT) };
        let result =
            wanted.add(node.netns(), &sandbox, None).with_context(|| format!("start of pod {identity}"))?;
        let addresses = addresses(&result)?;
        node.register().enter(&identity, &addresses);
        Ok(Self {
            identity,
            families: spec.families,
            addresses,
            chain,
            sandbox,
            result,
            attached: true,
            enrolled: AtomicBool::new(spec.enrolled),
            ports: Mutex::default(),
            netns,
            node: node.clone(),
        })
    }

    /// Its identity.
    #[must_use]
    pub fn identity(&self) -> &PodIdentity {
        &self.identity
    }

    /// The families that it has addresses of.
    #[must_use]
    pub fn families(&self) -> Families {
        self.families
    }

    /// A listener like the node proxy's, in its cgroup, which the pod's connections reach on this port. It greets every
    /// client, and ends with this value.
    pub fn listener_of_proxy(&self, port: u16) -> Result<Process> {
        let name = format!("listener-{port}");
        let mut command = Command::new(&self.node.session().binaries().testbed);
        command.args(["tcp-echo", "--greeting", &name, "--proxy-mark", &MARK_PROXY.to_string()]);
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        for ip in any {
            command.arg("--listen").arg(SocketAddr::new(ip, port).to_string());
        }
        let log = self.node.dir().join(format!("{name}-{}.log", self.identity.name));
        let process = Process::spawn(&name, command, self.proxy_netns(), self.node.proxy_cgroup(), &log)?;
        wait::until_true("listener in the proxy's cgroup", wait::SOON, || {
            Ok(process.log().contains("listening"))
        })
        .with_context(|| process.last_lines())?;
        Ok(process)
    }

    /// The namespace of the proxy's sockets for this pod.
    #[must_use]
    pub fn proxy_netns(&self) -> &Netns {
        match self.node.session().placement() {
            Placement::Pod => &self.netns,
            Placement::Node => self.node.netns(),
        }
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The environment that the runtime passes to the plugins.
    #[must_use]
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Its node.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its addresses.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its address of a family.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let found = self.addresses.iter().copied().find(|ip| ip.is_ipv4() == (family == Family::Ipv4));
        found.with_context(|| format!("pod {} has no {family} address", self.identity))
    }

    /// The address at which others reach one of its ports.
    pub fn endpoint(&self, family: Family, port: u16) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.address(family)?, port))
    }

    /// Runs our plugin's ADD only, on the namespace as it is.
    pub fn enroll(&self) -> Result<()> {
        self.enrolled.store(true, Ordering::Relaxed);
        self.chain.only(REDIRECT).add(self.node.netns(), &self.sandbox, Some(&self.result)).map(drop)
    }

    /// As [`Pod::enroll`], after a plugin that created another interface without naming its addresses.
    pub fn enroll_with_interface(&self, name: &str) -> Result<()> {
        self.enrolled.store(true, Ordering::Relaxed);
        let mut result = self.result.clone();
        let interfaces = result["interfaces"].as_array_mut().context("the chain's result has interfaces")?;
        interfaces.push(json!({"name": name, "sandbox": self.netns.path()}));
        self.chain.only(REDIRECT).add(self.node.netns(), &self.sandbox, Some(&result)).map(drop)
    }

    /// As [`Pod::enroll`], without a DEL if it fails.
    pub fn enroll_alone(&self) -> Result<()> {
        self.enrolled.store(true, Ordering::Relaxed);
        self.chain.only(REDIRECT).add_alone(self.node.netns(), &self.sandbox, Some(&self.result)).map(drop)
    }

    /// As [`Pod::enroll`]; the runtime keeps the namespace at this path.
    pub fn enroll_at(&self, netns: PathBuf) -> Result<()> {
        self.enrolled.store(true, Ordering::Relaxed);
        let sandbox = Sandbox { netns: Some(netns), ..self.sandbox.clone() };
        self.chain.only(REDIRECT).add(self.node.netns(), &sandbox, Some(&self.result)).map(drop)
    }

    /// Runs our plugin's DEL only; the pod continues.
    pub fn unenroll(&self) -> Result<()> {
        self.chain.only(REDIRECT).del(self.node.netns(), &self.sandbox, Some(&self.result))
    }

    /// Runs the chain's CHECK.
    pub fn check(&self) -> Result<()> {
        self.chain.check(self.node.netns(), &self.sandbox, &self.result)
    }

    /// Ends the pod and releases its addresses, but leaves our plugin's DEL for later.
    pub fn end_without_del(mut self) -> Result<Remains> {
        self.attached = false;
        self.chain.without(REDIRECT).del(self.node.netns(), &self.sandbox, Some(&self.result))?;
        Ok(self.remains())
    }

    /// Ends the pod without any DEL: its namespace has neither path nor process. Its addresses are free, as after a
    /// runtime has lost its state.
    pub fn vanish(mut self) -> Result<Remains> {
        self.attached = false;
        for network in fs::read_dir(self.node.dir().join("host-local"))?.flatten() {
            for address in &self.addresses {
                // It is reserved in one of the networks.
                let _ = fs::remove_file(network.path().join(address.to_string()));
            }
        }
        Ok(self.remains())
    }

    fn remains(&self) -> Remains {
        Remains {
            chain: self.chain.only(REDIRECT),
            sandbox: Sandbox { netns: None, ..self.sandbox.clone() },
            result: self.result.clone(),
            node: self.node.clone(),
        }
    }

    /// Runs the whole chain's DEL.
    pub fn delete(&mut self) -> Result<()> {
        self.attached = false;
        let enrolled = self.enrolled.load(Ordering::Relaxed);
        let chain = if enrolled { self.chain.clone() } else { self.chain.without(REDIRECT) };
        chain.del(self.node.netns(), &self.sandbox, Some(&self.result))
    }

    /// Connects from the pod.
    pub fn connect(&self, stack: Stack, to: SocketAddr) -> Result<Connection> {
        Connection::open(&self.netns, stack, to)
    }

    /// Listens in the pod on a free port; the server's greeting is the pod's name. The pod has not used that port before,
    /// so the port distinguishes the server's connections from earlier ones.
    pub fn listen(&self, stack: Stack) -> Result<Server> {
        for _ in 0..ATTEMPTS {
            let server = Server::start(&self.netns, stack, 0, &self.identity.name)?;
            if self.ports.lock().unwrap_or_else(PoisonError::into_inner).insert(server.port()) {
                return Ok(server);
            }
        }
        bail!("{}: no port is left that had no listener yet", self.identity)
    }

    /// The proxy's connections of this pod to a destination, at least one.
    pub fn proxied(&self, direction: Direction, to: SocketAddr) -> Result<Vec<Entry>> {
        let what = format!("{direction:?} {} to {to}", self.identity);
        self.node.access_log().connections(&what, |entry| self.is_mine(entry, direction, to))
    }

    /// As [`Pod::proxied`], once there are so many; an error if there are more. The log is written with a delay.
    pub fn proxied_times(&self, direction: Direction, to: SocketAddr, times: usize) -> Result<Vec<Entry>> {
        let mut found = Vec::new();
        let what = format!("{times} access log entries of {direction:?} {} to {to}", self.identity);
        let reached = wait::until_true(&what, Duration::from_secs(3), || {
            found = self.proxied_so_far(direction, to)?;
            Ok(found.len() >= times)
        });
        reached.with_context(|| format!("{found:#?}"))?;
        ensure!(found.len() == times, "not {what} but {found:#?}");
        Ok(found)
    }

    /// As [`Pod::proxied`], without waiting.
    pub fn proxied_so_far(&self, direction: Direction, to: SocketAddr) -> Result<Vec<Entry>> {
        self.node.access_log().connections_so_far(|entry| self.is_mine(entry, direction, to))
    }

    /// Every connection of this pod through a proxy so far, in both directions.
    pub fn proxied_at_all(&self) -> Result<Vec<Entry>> {
        self.node.access_log().connections_so_far(|entry| entry.pod == self.identity.to_string())
    }

    fn is_mine(&self, entry: &Entry, direction: Direction, to: SocketAddr) -> bool {
        entry.pod == self.identity.to_string()
            && entry.direction == direction
            && canonical(entry.original_destination) == to
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if self.attached
            && let Err(error) = self.delete()
        {
            eprintln!("end of pod {}: {error:#}", self.identity);
        }
    }
}

/// What the runtime still knows of a pod that has ended.
#[derive(Debug)]
pub struct Remains {
    chain: Chain,
    sandbox: Sandbox,
    result: Value,
    node: Arc<Node>,
}

impl Remains {
    /// Runs our plugin's DEL, without a namespace.
    pub fn delete(&self) -> Result<()> {
        self.chain.del(self.node.netns(), &self.sandbox, Some(&self.result))
    }
}

fn sandbox(identity: &PodIdentity, container_id: &str, netns: PathBuf) -> Sandbox {
    Sandbox {
        container_id: container_id.to_owned(),
        netns: Some(netns),
        interface: "eth0".to_owned(),
        arguments: format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={};K8S_POD_SERVICE_ACCOUNT={}",
            identity.namespace, identity.name, identity.uid, identity.service_account
        ),
    }
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("the chain's result has addresses")?;
    let parse = |ip: &Value| -> Result<IpAddr> {
        let text = ip["address"].as_str().context("an address")?;
        let (address, _) = text.split_once('/').context("an address with a prefix")?;
        Ok(address.parse()?)
    };
    ips.iter().map(parse).collect()
}
