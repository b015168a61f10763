//! The desired state of an enrolled pod in the kernel as a set of facts, and the operations that lead from the observed facts to
//! the desired ones. Pure. The desired state depends on where the proxy listens (`in_pod`, `on_node`).

mod in_pod;
mod on_node;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use redirect_ebpf::Family;
use redirect_ebpf::constants::REPLY_TABLE;
use redirect_ebpf::maps::{Pod, PodFlags};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use redirect_linux::netlink::{Interface, LOOPBACK_INDEX, Route, RouteKind, Rule};
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::{Exclusion, PodAddresses};

use crate::mirror::Mirror;

/// A fact in the kernel about one pod.
///
/// The variants are in the order in which facts are established: [`Fact::Pod`], which makes the pod visible to the
/// kernel side, comes when everything that catches its connections is in place. Facts are removed in reverse order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fact {
    /// The pod's `lo` is up.
    LoopbackUp,
    /// A sysctl of the pod's namespace is on.
    Sysctl(Sysctl),
    /// One of our routing rules exists. Before the routes, so that a table never lacks a rule that it relies on.
    Rule {
        /// The rule's family.
        family: Family,
        /// The rule.
        rule: Rule,
    },
    /// One of our routes exists.
    Route(Route),
    /// An exclusion is in the maps, for this pod.
    Excluded(Exclusion),
    /// The program that gives connections to listeners in the socket lookup is attached to the namespace.
    Lookup,
    /// A TC program is attached to the ingress of `lo`, or to the host end of a device.
    Program {
        /// The interface.
        interface: Interface,
        /// The program.
        hook: Hook,
    },
    /// The address is in `POD_IPV4` or `POD_IPV6` as this pod's.
    Address(IpAddr),
    /// The pod has an entry in `POD_COUNTERS`.
    Counters,
    /// The pod is in `PODS`.
    Pod(Pod),
    /// The TC program that captures an interface's incoming connections is attached. After the pod's entry, because only then are
    /// the proxy's deliveries marked: a running pod loses nothing in between.
    Entry {
        /// The interface.
        interface: Interface,
        /// The program.
        hook: Hook,
    },
    /// The egress guard is attached to an interface. After the pod's entry, because only then are connections marked.
    Guard {
        /// The interface.
        interface: Interface,
        /// The family.
        family: Family,
    },
    /// The host's device is in `INTERFACES` as the end of this pod's device. That switches its programs on, for both
    /// families and both directions at once. After the pod's entry, like the guards.
    Device(Interface),
    /// The inbound gate is attached to the namespace: it admits only connections that a TC program captured or exempted. Also
    /// after the pod's entry: until then, connections that other rules redirect to the proxy must still get there.
    ListenerGuard,
}

impl Fact {
    /// Its family, if it concerns one only.
    #[must_use]
    pub const fn family(&self) -> Option<Family> {
        match self {
            Self::Sysctl(Sysctl::FwmarkReflect(family))
            | Self::Rule { family, .. }
            | Self::Guard { family, .. } => Some(*family),
            Self::Route(route) => Some(route.family()),
            Self::Program { hook, .. } | Self::Entry { hook, .. } => hook.family(),
            Self::Address(IpAddr::V4(_)) => Some(Family::Ipv4),
            Self::Address(IpAddr::V6(_)) => Some(Family::Ipv6),
            Self::LoopbackUp
            | Self::Sysctl(_)
            | Self::Excluded(_)
            | Self::Lookup
            | Self::Counters
            | Self::Pod(_)
            | Self::Device(_)
            | Self::ListenerGuard => None,
        }
    }

    /// The place of a route. A new route at the same place replaces it.
    #[must_use]
    pub const fn place(&self) -> Option<(u32, IpNet, u32)> {
        match self {
            Self::Route(route) => Some(route.place()),
            _ => None,
        }
    }

    /// Whether it is the same in both placements.
    #[must_use]
    pub const fn is_of_both(&self) -> bool {
        matches!(
            self,
            Self::LoopbackUp
                | Self::Excluded(_)
                | Self::Address(_)
                | Self::Counters
                | Self::Pod(_)
                | Self::Device(_)
        )
    }

    /// Whether the kernel sends no notification when it ceases to hold.
    #[must_use]
    pub const fn is_quiet(&self) -> bool {
        match self {
            Self::Sysctl(_)
            | Self::Excluded(_)
            | Self::Lookup
            | Self::Address(_)
            | Self::Counters
            | Self::Pod(_)
            | Self::Device(_)
            | Self::ListenerGuard => true,
            Self::LoopbackUp
            | Self::Rule { .. }
            | Self::Route(_)
            | Self::Program { .. }
            | Self::Entry { .. }
            | Self::Guard { .. } => false,
        }
    }
}

/// A sysctl that a captured pod needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sysctl {
    /// Accepted sockets inherit the mark of the SYN, in both families, so that the application's replies return to
    /// the proxy.
    TcpFwmarkAccept,
    /// The kernel's own answers inherit the mark of the packet, so that a closed port refuses at once.
    FwmarkReflect(Family),
    /// When a proxy closes its listener, connections in its accept queue move to the next proxy's listener, in both
    /// families.
    TcpMigrateReq,
    /// Replies of an application's listener with a mark of its own return to the proxy through `lo`, with an address of the pod
    /// as their source. IPv6 has no such check.
    AcceptLocal,
    /// The kernel never chooses one of the proxy's ports for a socket.
    ReservedPorts,
}

/// The TC programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// On `lo`: captured outbound connections.
    Loopback(Family),
    /// On the other interfaces: inbound connections.
    Inbound(Family),
    /// On interfaces to containers or virtual machines behind the pod: their connections count as outbound.
    Virtual(Family),
    /// Egress of the other interfaces: drops what would leave past the proxy.
    Egress(Family),
    /// On the host end of a pod's device: drops what bypassed the proxy and the programs in the pod, in both families.
    HostGate,
    /// On the host end of a pod's device: packets from the pod.
    FromPod(Family),
    /// On the host end of a pod's device: packets to the pod.
    ToPod(Family),
    /// On the ingress device: packets for the proxy in the host's namespace.
    IngressDevice(Family),
}

impl Hook {
    /// The hooks of a placement.
    #[must_use]
    pub const fn of(placement: Placement) -> &'static [Self] {
        match placement {
            Placement::Pod => &in_pod::HOOKS,
            Placement::Node => &on_node::HOOKS,
        }
    }

    /// Whether it is attached to the host end of a pod's device.
    #[must_use]
    pub const fn is_on_host(self) -> bool {
        matches!(self, Self::HostGate | Self::FromPod(_) | Self::ToPod(_) | Self::IngressDevice(_))
    }

    /// The family of the packets that the program sees, if it handles one only.
    #[must_use]
    pub const fn family(self) -> Option<Family> {
        match self {
            Self::Loopback(family)
            | Self::Inbound(family)
            | Self::Virtual(family)
            | Self::Egress(family)
            | Self::FromPod(family)
            | Self::ToPod(family)
            | Self::IngressDevice(family) => Some(family),
            Self::HostGate => None,
        }
    }

    /// The fact that it is attached to an interface.
    #[must_use]
    pub fn fact(self, interface: &Interface) -> Fact {
        let interface = interface.clone();
        match self {
            Self::Inbound(_) | Self::Virtual(_) => Fact::Entry { interface, hook: self },
            Self::Egress(family) => Fact::Guard { interface, family },
            Self::Loopback(_)
            | Self::HostGate
            | Self::FromPod(_)
            | Self::ToPod(_)
            | Self::IngressDevice(_) => Fact::Program { interface, hook: self },
        }
    }

    /// The program's name in the object and in the kernel.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::Loopback(Family::Ipv4) => "loopback_ipv4",
            Self::Loopback(Family::Ipv6) => "loopback_ipv6",
            Self::Inbound(Family::Ipv4) => "inbound_ipv4",
            Self::Inbound(Family::Ipv6) => "inbound_ipv6",
            Self::Virtual(Family::Ipv4) => "virtual_ipv4",
            Self::Virtual(Family::Ipv6) => "virtual_ipv6",
            Self::Egress(Family::Ipv4) => "egress_ipv4",
            Self::Egress(Family::Ipv6) => "egress_ipv6",
            Self::HostGate => "host_gate",
            Self::FromPod(Family::Ipv4) => "from_pod_ipv4",
            Self::FromPod(Family::Ipv6) => "from_pod_ipv6",
            Self::ToPod(Family::Ipv4) => "to_pod_ipv4",
            Self::ToPod(Family::Ipv6) => "to_pod_ipv6",
            Self::IngressDevice(Family::Ipv4) => "entrance_ipv4",
            Self::IngressDevice(Family::Ipv6) => "entrance_ipv6",
        }
    }
}

/// The programs on a namespace's socket lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Gives connections to the proxy's listeners where TC can't assign them.
    Listener,
    /// Refuses connections that no TC program captured or exempted.
    Guard,
}

impl Lookup {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Listener, Self::Guard];

    /// The name of [`Self::Listener`] in builds whose TC programs hand connections over in another way. It stays until those
    /// are replaced and the gate is attached: nothing is lost or let past in between.
    pub const FORMER: &str = "listener_lookup";

    /// The program's name in the object and in the kernel.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::Listener => "noted_listener",
            Self::Guard => "listener_guard",
        }
    }

    /// The fact that it is attached.
    #[must_use]
    pub const fn fact(self) -> Fact {
        match self {
            Self::Listener => Fact::Lookup,
            Self::Guard => Fact::ListenerGuard,
        }
    }
}

/// A namespace, apart from our changes to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its interfaces, `lo` included.
    pub interfaces: Vec<Interface>,
    /// The indices of those that are up.
    pub up: BTreeSet<u32>,
    /// The addresses on them that are not known otherwise and that no other pod has.
    pub addresses: PodAddresses,
    /// The routes for captured IPv6 connections.
    pub mirror: Mirror,
    /// Whether IPv6 works in it: the kernel supports it and `lo` does not have it disabled. In placement `node` this
    /// is the host's.
    pub ipv6: bool,
    /// The devices that lead out of it.
    pub devices: Devices,
    /// Where the proxy's listeners are.
    pub placement: Placement,
    /// Whether its devices have the host gate (placement `pod`). They can't if the mark alone identifies the proxy: packets
    /// have lost it there.
    pub gated: bool,
}

/// The devices that lead out of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Their ends in the host's namespace.
    pub ends: Vec<Interface>,
    /// Host ends of devices that were moved from the pod into another namespace. Their traffic still counts as the pod's.
    pub strayed: Vec<Interface>,
    /// The names, in the pod, of devices whose other ends are not in the host's namespace.
    pub unreachable: Vec<String>,
}

impl Devices {
    /// All host ends of the pod's devices, wherever the other ends are.
    pub fn on_host(&self) -> impl Iterator<Item = &Interface> {
        self.ends.iter().chain(&self.strayed)
    }
}

/// The desired settings of a pod.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Its flags, without [`PodFlags::EXCLUSIONS`].
    pub flags: PodFlags,
    /// Whether the other placement captures its new connections.
    pub elsewhere: bool,
    /// Its addresses.
    pub addresses: &'a PodAddresses,
    /// Interfaces to containers or virtual machines behind the pod, whose connections count as the pod's.
    pub virtual_interfaces: &'a [String],
    /// Exclusions from capture.
    pub exclusions: &'a BTreeSet<Exclusion>,
}

impl Wanted<'_> {
    /// The pod's map entry, as far as it is known without observing its namespace.
    #[must_use]
    pub fn kernel_pod(&self) -> Pod {
        self.kernel_pod_with(self.addresses, PodFlags::default())
    }

    /// `place` is where new connections are captured.
    fn kernel_pod_with(&self, addresses: &PodAddresses, place: PodFlags) -> Pod {
        Pod {
            flags: self.flags.with(PodFlags::EXCLUSIONS, !self.exclusions.is_empty()).0 | place.0,
            ipv4: addresses.ipv4.first().map(Ipv4Addr::octets).unwrap_or_default(),
            ipv6: addresses.ipv6.first().map(Ipv6Addr::octets).unwrap_or_default(),
        }
    }
}

/// The facts that make a pod captured, given its namespace.
///
/// Both families are captured wherever the namespace supports them, even if the pod has no address of one yet: an
/// address that appears later must not be a way around the proxy.
#[must_use]
pub fn desired(wanted: &Wanted<'_>, namespace: &Namespace) -> BTreeSet<Fact> {
    match namespace.placement {
        Placement::Pod => in_pod::desired(wanted, namespace),
        Placement::Node => on_node::desired(wanted, &namespace.devices),
    }
}

/// An operation that leads from the observed state to the desired one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Establish the fact.
    Ensure(Fact),
    /// Remove the fact.
    Remove(Fact),
}

impl Op {
    /// The inverse operation.
    #[must_use]
    pub fn inverse(&self) -> Self {
        match self {
            Self::Ensure(fact) => Self::Remove(fact.clone()),
            Self::Remove(fact) => Self::Ensure(fact.clone()),
        }
    }
}

/// The operations from `actual` to `desired`: first the missing facts, in order, then the surplus ones, in reverse
/// order, so that a changed fact is never missing in between. A route that was replaced needs no removal.
#[must_use]
pub fn diff(desired: &BTreeSet<Fact>, actual: &BTreeSet<Fact>) -> Vec<Op> {
    let missing = desired.difference(actual).cloned().map(Op::Ensure);
    let surplus: Vec<&Fact> = actual.difference(desired).collect();
    let of_routes = |fact: &&Fact| matches!(fact, Fact::Route(_));
    let taken: HashSet<_> = match surplus.iter().any(of_routes) {
        true => desired.iter().filter_map(Fact::place).collect(),
        false => HashSet::new(),
    };
    let is_replaced = |fact: &&Fact| fact.place().is_some_and(|place| taken.contains(&place));
    let surplus: Vec<&Fact> = surplus.into_iter().filter(|fact| !is_replaced(fact)).collect();
    missing.chain(surplus.into_iter().rev().cloned().map(Op::Remove)).collect()
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoopbackUp => f.write_str("interface lo up"),
            Self::Sysctl(sysctl) => write!(f, "sysctl {}", sysctl.name()),
            Self::Rule { family, rule: Rule::Capture } => write!(f, "{family} rule for captured connections"),
            Self::Rule { family, rule: Rule::Source } => {
                write!(f, "{family} rule for the source of captured connections")
            }
            Self::Rule { family, rule: Rule::Refuse } => {
                write!(f, "{family} rule for captured connections without a route")
            }
            Self::Rule { family, rule: Rule::Delivery } => {
                write!(f, "{family} rule for replies to the proxy")
            }
            Self::Rule { family, rule: Rule::FormerDelivery } => {
                write!(f, "{family} rule for replies to the proxy of a former version")
            }
            Self::Route(route) => describe(route, f),
            Self::Excluded(exclusion) => write!(f, "exclusion of {exclusion}"),
            Self::Lookup => write!(f, "program {} on the network namespace", Lookup::Listener.program()),
            Self::ListenerGuard => write!(f, "program {} on the network namespace", Lookup::Guard.program()),
            Self::Program { interface, hook } | Self::Entry { interface, hook } => {
                write!(f, "program {} on {}", hook.program(), interface.name)
            }
            Self::Address(address) => write!(f, "map entry of address {address}"),
            Self::Counters => f.write_str("map entry of the pod's counters"),
            Self::Pod(_) => f.write_str("map entry of the pod"),
            Self::Guard { interface, family } => {
                write!(f, "program {} on {}", Hook::Egress(*family).program(), interface.name)
            }
            Self::Device(interface) => write!(f, "map entry of device {}", interface.name),
        }
    }
}

/// Our routes lead through `lo`, whatever their device.
fn describe(route: &Route, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Route { table, destination, kind, interface, source, .. } = route;
    let (family, name) = (route.family(), &interface.name);
    let sources =
        || source.map_or_else(|| format!("the sources of {name}"), |source| format!("source {source}"));
    match kind {
        RouteKind::Open if *table == REPLY_TABLE => {
            write!(f, "{family} route through lo for replies to the proxy")
        }
        RouteKind::Open if family == Family::Ipv4 && interface.is_loopback() => {
            write!(f, "{family} route through lo")
        }
        RouteKind::Open if family == Family::Ipv4 => {
            write!(f, "{family} route through lo for sockets of {name}")
        }
        RouteKind::Open if destination.prefix_len() == 0 => {
            write!(f, "{family} route through lo with {}", sources())
        }
        RouteKind::Open => write!(f, "{family} route through lo to {destination} with {}", sources()),
        RouteKind::Unreachable => write!(f, "{family} route unreachable {destination}"),
        RouteKind::Prohibit => write!(f, "{family} route prohibit {destination}"),
        RouteKind::Blackhole => write!(f, "{family} route blackhole {destination}"),
    }
}

impl Sysctl {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::TcpFwmarkAccept,
        Self::FwmarkReflect(Family::Ipv4),
        Self::FwmarkReflect(Family::Ipv6),
        Self::TcpMigrateReq,
        Self::AcceptLocal,
        Self::ReservedPorts,
    ];

    /// The sysctl's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcpFwmarkAccept => "net.ipv4.tcp_fwmark_accept",
            Self::FwmarkReflect(Family::Ipv4) => "net.ipv4.fwmark_reflect",
            Self::FwmarkReflect(Family::Ipv6) => "net.ipv6.fwmark_reflect",
            Self::TcpMigrateReq => "net.ipv4.tcp_migrate_req",
            Self::AcceptLocal => "net.ipv4.conf.lo.accept_local",
            Self::ReservedPorts => "net.ipv4.ip_local_reserved_ports",
        }
    }
}

/// Serialized as its name.
impl Serialize for Sysctl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Sysctl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = Self::ALL.into_iter().find(|sysctl| sysctl.name() == name);
        known.ok_or_else(|| serde::de::Error::custom(format!("{name} is not a sysctl that the agent sets")))
    }
}
