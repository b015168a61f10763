//! What may pass an enrolled pod's gates, for whom, and in which placement: the tables of SECURITY.md, "What passes", as data.
//!
//! It is written from that document and shares nothing with the code that property tests compare with it: the pure decisions
//! (below), the programs on crafted packets (`tests/programs/specification.rs`), and `redirect explain`
//! (`tests/e2e/specification.rs`). Each row quotes its words, and a test finds them in the document.

pub mod cases;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use redirect_protocol::placement::Placement;

/// A connection, a query or what claims to be part of one, seen from the pod.
#[derive(Clone, Debug)]
pub struct Case {
    /// Where the proxy listens.
    pub placement: Placement,
    /// Out of the pod, or into it.
    pub way: Way,
    /// The sender.
    pub sender: Sender,
    /// The kind of packet.
    pub what: What,
    /// Whether it is behind VLAN tags.
    pub tagged: bool,
    /// Source address and port.
    pub source: (IpAddr, u16),
    /// Destination address and port.
    pub destination: (IpAddr, u16),
    /// The pod.
    pub pod: Facts,
}

/// The direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Out of the pod.
    Out,
    /// Into the pod.
    In,
}

/// The sender of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// Any other sender: an application, a neighbor, a process of the node, whatever marks it sets.
    Anybody,
    /// The kubelet, from the node.
    Kubelet,
    /// The node proxy, on its own behalf or a client's.
    Proxy,
    /// The node proxy, to the pod's application. In placement `pod` this never leaves the pod.
    Delivery,
}

/// The kind of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A TCP segment that opens a connection.
    Opens,
    /// A TCP segment that answers one.
    Accepts,
    /// Data of a TCP connection that does not exist.
    Data,
    /// A TCP segment without data, of a connection that does not exist.
    Empty,
    /// A TCP reset.
    Resets,
    /// The first fragment of a TCP segment.
    Fragment,
    /// A UDP datagram.
    Datagram,
    /// Another protocol, or a later fragment.
    Other,
    /// Headers that end too early, contradict themselves or exceed the limits.
    Damaged,
}

/// The pod, and the relevant settings of the node.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The pod's addresses.
    pub own: Vec<IpAddr>,
    /// Those of other enrolled pods.
    pub others: Vec<IpAddr>,
    /// Exclusions of the way out.
    pub excluded_outbound: Excluded,
    /// Exclusions of the way in.
    pub excluded_inbound: Excluded,
    /// `ambient.istio.io/bypass-inbound-capture`.
    pub bypass_inbound: bool,
    /// Whether the proxy resolves the pod's DNS queries.
    pub dns: bool,
    /// `ambient-redirect.io/source-ip-verification: "false"`.
    pub any_source: bool,
    /// Whether the pod had sockets when it was enrolled.
    pub earlier_connections: bool,
    /// `--link-local pass`.
    pub link_local_passes: bool,
}

/// What is excluded.
#[derive(Clone, Debug, Default)]
pub struct Excluded {
    /// Networks, with the length of their prefixes.
    pub networks: Vec<(IpAddr, u8)>,
    /// Ports.
    pub ports: Vec<u16>,
}

/// The outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes unchanged. If it is not the proxy's, it bypasses the proxy.
    Passes,
    /// The proxy's listener gets it, and no other.
    Captured,
    /// The proxy's listener for tunnels gets it, and no other.
    Tunnelled,
    /// The proxy's resolver gets it, and no other.
    Resolved,
    /// The proxy's, to the pod's application.
    Delivered,
    /// It is dropped or refused.
    Stopped,
}

/// A row: the first one that matches a case decides.
pub struct Row {
    /// The words of SECURITY.md.
    pub quote: &'static str,
    holds: fn(&Case) -> bool,
    verdict: Verdict,
}

const fn row(quote: &'static str, holds: fn(&Case) -> bool, verdict: Verdict) -> Row {
    Row { quote, holds, verdict }
}

/// The outcome of connections and queries.
pub const CONNECTIONS: &[Row] = &[
    row("UDP other than DNS", |case| case.what == What::Datagram && !case.is_query(), Verdict::Passes),
    row("to an address of the pod, or in a client's name", Case::is_delivery, Verdict::Delivered),
    row(
        "anything else of the proxy's",
        |case| case.sender == Sender::Proxy && case.is_out(),
        Verdict::Passes,
    ),
    row("to 127.0.0.1 or `::1`", |case| case.is_out() && case.is_to_loopback(), Verdict::Passes),
    row("to an address of the pod itself", |case| case.is_out() && case.is_to_itself(), Verdict::Passes),
    row("to an excluded network or port", |case| case.is_out() && case.is_excluded_out(), Verdict::Passes),
    row("DNS", |case| case.is_out() && case.is_query(), Verdict::Resolved),
    row(
        "to a multicast or broadcast group",
        |case| case.is_out() && is_group(case.destination.0),
        Verdict::Passes,
    ),
    row("with `--link-local pass`", |case| case.is_out() && case.is_allowed_link_local(), Verdict::Passes),
    row(
        "to any other link-local address",
        |case| case.is_out() && is_link_local(case.destination.0),
        Verdict::Stopped,
    ),
    row("to port 15008", |case| case.is_in() && case.destination.1 == PORT_TUNNEL, Verdict::Tunnelled),
    row(
        "with inbound bypass",
        |case| case.is_in() && case.is_to_the_pod() && case.pod.bypass_inbound,
        Verdict::Passes,
    ),
    row(
        "from the kubelet",
        |case| case.is_in() && case.is_to_the_pod() && case.sender == Sender::Kubelet,
        Verdict::Passes,
    ),
    row(
        "from an excluded network or to an excluded port",
        |case| case.is_in() && case.is_to_the_pod() && case.is_excluded_in(),
        Verdict::Passes,
    ),
    row("anything else", |_| true, Verdict::Captured),
];

/// Packets that may leave the pod, or the host end of its device, although they are not the proxy's.
pub const LEAVES: &[Row] = &[
    row("to an excluded network or port", Case::is_excluded_out, Verdict::Passes),
    row("to a multicast or broadcast group", |case| is_group(case.destination.0), Verdict::Passes),
    row("with `--link-local pass`", Case::is_allowed_link_local, Verdict::Passes),
    row("anything else", |_| true, Verdict::Stopped),
];

/// Connections that a listener of the pod may get although no TC program has seen them.
pub const LISTENERS: &[Row] = &[
    row("to ports 15001 and 15006", |case| CAPTURED_PORTS.contains(&case.destination.1), Verdict::Stopped),
    row("between sockets of the pod", Case::is_inside, Verdict::Passes),
    row("anything else", |_| true, Verdict::Stopped),
];

fn first(rows: &[Row], case: &Case) -> Verdict {
    rows.iter().find(|row| (row.holds)(case)).expect("the last row holds for everything").verdict
}

const PORT_TUNNEL: u16 = 15008;
const CAPTURED_PORTS: [u16; 2] = [15001, 15006];
const DNS: u16 = 53;

/// The outcome of a `connect()` call, or of a datagram that a process of the pod sends.
#[must_use]
pub fn call(case: &Case) -> Verdict {
    first(CONNECTIONS, case)
}

/// The outcome of a packet to the pod: at its interface and, in placement `pod`, at the listener.
#[must_use]
pub fn arrival(case: &Case) -> Verdict {
    match (case.what, case.placement) {
        (What::Damaged, _) => Verdict::Stopped,
        (What::Other | What::Datagram, _) => Verdict::Passes,
        // Exempt packets are seen, but not captured.
        (What::Opens, Placement::Pod) if CAPTURED_PORTS.contains(&case.destination.1) => {
            captured_or_stopped(first(CONNECTIONS, case))
        }
        (What::Opens, Placement::Pod) => first(CONNECTIONS, case),
        // It can belong to no connection.
        (What::Fragment | What::Accepts | What::Data | What::Empty | What::Resets, Placement::Pod) => {
            Verdict::Stopped
        }
        (_, Placement::Node) if case.sender == Sender::Delivery => Verdict::Passes,
        (What::Opens, Placement::Node) => case.for_the_host(first(CONNECTIONS, case)),
        (What::Fragment, Placement::Node) => passes_or_stops(first(CONNECTIONS, case)),
        // The application's kernel has no such connection either.
        (What::Accepts | What::Data | What::Empty | What::Resets, Placement::Node) => Verdict::Passes,
    }
}

/// The outcome of a packet that leaves the pod: in placement `pod` at its own interface, in placement `node` at the host end.
#[must_use]
pub fn departure(case: &Case) -> Verdict {
    match (case.what, case.placement) {
        (_, Placement::Pod) if case.sender == Sender::Proxy => Verdict::Passes,
        (_, Placement::Node) if !case.may_have_its_source() => Verdict::Stopped,
        (What::Damaged, _) => Verdict::Stopped,
        (What::Other, _) | (What::Datagram, Placement::Pod) => Verdict::Passes,
        (What::Opens | What::Fragment, Placement::Pod) => first(LEAVES, case),
        (What::Opens | What::Datagram, Placement::Node) => case.for_the_host(first(CONNECTIONS, case)),
        (What::Fragment, Placement::Node) => passes_or_stops(first(CONNECTIONS, case)),
        (What::Empty | What::Resets, _) | (What::Accepts | What::Data, Placement::Pod) => Verdict::Passes,
        (What::Data, Placement::Node) if case.pod.earlier_connections => Verdict::Passes,
        (What::Accepts | What::Data, Placement::Node) if case.answers_an_exempt_client() => Verdict::Passes,
        // It is no connection of the proxy's. Whatever would not be captured passes.
        (What::Accepts | What::Data, Placement::Node) => match first(CONNECTIONS, case) {
            Verdict::Captured | Verdict::Resolved => Verdict::Stopped,
            _ => Verdict::Passes,
        },
    }
}

/// The outcome of a packet at the host end of the pod's device, after it has left the pod. Placement `pod`.
#[must_use]
pub fn host_end(case: &Case) -> Verdict {
    let passes = match case.what {
        _ if case.sender == Sender::Proxy => true,
        What::Damaged => false,
        What::Other | What::Datagram | What::Resets | What::Empty => true,
        What::Opens | What::Fragment => first(LEAVES, case) == Verdict::Passes,
        What::Accepts => case.answers_an_exempt_client(),
        What::Data => {
            case.pod.earlier_connections
                || case.answers_an_exempt_client()
                || first(LEAVES, case) == Verdict::Passes
        }
    };
    if passes { Verdict::Passes } else { Verdict::Stopped }
}

/// The outcome of a connection at the listener lookup, if no TC program has seen it. Placement `pod`.
#[must_use]
pub fn unseen(case: &Case) -> Verdict {
    first(LISTENERS, case)
}

fn captured_or_stopped(verdict: Verdict) -> Verdict {
    if verdict == Verdict::Captured { verdict } else { Verdict::Stopped }
}

fn passes_or_stops(verdict: Verdict) -> Verdict {
    if verdict == Verdict::Passes { verdict } else { Verdict::Stopped }
}

impl Case {
    fn is_out(&self) -> bool {
        self.way == Way::Out
    }

    fn is_in(&self) -> bool {
        self.way == Way::In
    }

    /// A DNS query for the proxy's resolver.
    fn is_query(&self) -> bool {
        self.pod.dns && self.destination.1 == DNS
    }

    fn is_delivery(&self) -> bool {
        let borrowed = !is_loopback(self.source.0) && !self.pod.own.contains(&self.source.0);
        self.is_out()
            && self.sender == Sender::Proxy
            && self.what == What::Opens
            && !is_loopback(self.destination.0)
            && (self.is_to_itself() || borrowed)
    }

    /// For DNS, "stub resolvers on all of 127.0.0.0/8".
    fn is_to_loopback(&self) -> bool {
        is_loopback(self.destination.0)
            || (self.is_query() && matches!(self.destination.0, IpAddr::V4(address) if address.is_loopback()))
    }

    fn is_to_itself(&self) -> bool {
        self.pod.own.contains(&self.destination.0)
    }

    /// In placement `node` the device identifies the pod, in placement `pod` the destination does.
    fn is_to_the_pod(&self) -> bool {
        self.placement == Placement::Node || self.is_to_itself()
    }

    fn is_excluded_out(&self) -> bool {
        self.pod.excluded_outbound.covers(self.destination.0, self.destination.1)
    }

    fn is_excluded_in(&self) -> bool {
        self.pod.excluded_inbound.covers(self.source.0, self.destination.1)
    }

    fn answers_an_exempt_client(&self) -> bool {
        self.pod.bypass_inbound || self.pod.excluded_inbound.covers(self.destination.0, self.source.1)
    }

    fn is_allowed_link_local(&self) -> bool {
        self.pod.link_local_passes && is_link_local(self.destination.0)
    }

    /// The proxy on the host can't answer from a link-local address, nor with VLAN tags.
    fn for_the_host(&self, verdict: Verdict) -> Verdict {
        let of_the_link = |address| is_group(address) || is_link_local(address);
        let is_of_the_link = of_the_link(self.source.0) || of_the_link(self.destination.0);
        if verdict != Verdict::Passes && (is_of_the_link || self.tagged) { Verdict::Stopped } else { verdict }
    }

    /// Placement `node`: its own addresses, and those of an interface that has no address yet.
    fn may_have_its_source(&self) -> bool {
        let source = self.source.0;
        let unassigned = source.is_unspecified() || is_link_local(source);
        !self.pod.others.contains(&source)
            && (self.pod.own.contains(&source) || unassigned || self.pod.any_source)
    }

    fn is_inside(&self) -> bool {
        let (from, to) = (self.source.0, self.destination.0);
        // No other sender can use such an address and get an answer.
        let own = |address: IpAddr| self.pod.own.contains(&address);
        from.is_loopback() || from == to || (own(from) && (own(to) || to.is_loopback()))
    }
}

impl Excluded {
    fn covers(&self, peer: IpAddr, port: u16) -> bool {
        self.ports.contains(&port) || self.networks.iter().any(|network| contains(*network, peer))
    }
}

fn contains((network, length): (IpAddr, u8), address: IpAddr) -> bool {
    let same = |network: u128, address: u128, bits: u32| {
        let shift = bits - u32::from(length);
        network.checked_shr(shift) == address.checked_shr(shift)
    };
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            same(network.to_bits().into(), address.to_bits().into(), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => same(network.to_bits(), address.to_bits(), 128),
        _ => false,
    }
}

/// The addresses that Istio's rules exempt as loopback, and the unspecified address, which the kernel replaces
/// with loopback.
fn is_loopback(address: IpAddr) -> bool {
    address.is_unspecified()
        || match address {
            IpAddr::V4(address) => address.octets() == [127, 0, 0, 1],
            IpAddr::V6(address) => address.is_loopback(),
        }
}

fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(address) if address.is_broadcast())
}

/// IPv6 only: clouds serve metadata at IPv4 link-local addresses, and connections to them are captured.
fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
