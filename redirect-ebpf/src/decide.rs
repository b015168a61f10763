//! What is to become of a new connection. Pure: the programs supply the facts, the more expensive ones lazily, and
//! carry the decision out.

use crate::constants::{
    MARK_CAPTURE, MARK_DELIVERY, MARK_MASK, MARK_PROXY, PORT_DNS, PORT_DOMAIN, PORT_INBOUND, PORT_OUTBOUND,
    PORT_TUNNEL,
};
use crate::count::Reason;
use crate::family::Ip;
use crate::maps::PodFlags;

/// What becomes of a connection that a process of an enrolled pod makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// Mark it for capture: the proxy's outbound listener gets it.
    Capture,
    /// Send it to the proxy's resolver.
    Resolve,
    /// The proxy's own connection to the pod's application: mark it so that the replies come back to the proxy.
    Deliver,
    /// Leave it alone.
    Pass(Reason),
    /// Refuse it.
    Refuse(Reason),
}

/// Protocols that concern us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An outbound connection, or a datagram, as far as it is cheap to know.
#[derive(Clone, Copy, Debug)]
pub struct Connect<A> {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where to.
    pub destination: A,
    /// Destination port, host order.
    pub port: u16,
    /// Whether the socket is the proxy's own.
    pub proxy: bool,
    /// The address that the socket is bound to, or the unspecified address.
    pub source: A,
    /// The pod's switches.
    pub flags: PodFlags,
    /// Whether connections to link-local addresses go past the proxy.
    pub link_local: bool,
}

/// Decides on an outbound connection. `own` tells whether an address is one of the pod itself, `excluded` whether an
/// exclusion holds.
///
/// The proxy delivers to the application where it dials an address of the pod, or (the pod may have addresses that nobody
/// told us) where it borrows the address of somebody else as its source.
#[inline(always)]
pub fn outbound<I: Ip>(
    connect: &Connect<I::Address>,
    own: impl Fn(I::Address) -> bool,
    excluded: impl FnOnce() -> bool,
) -> Outbound {
    let tcp = connect.protocol == Protocol::Tcp;
    let dns = connect.port == PORT_DOMAIN && connect.flags.contains(PodFlags::DNS);
    if !tcp && !dns {
        return Outbound::Pass(Reason::OtherTraffic);
    }
    if connect.proxy {
        let borrows = || !I::is_loopback(connect.source) && !own(connect.source);
        let delivers = tcp && !I::is_loopback(connect.destination) && (own(connect.destination) || borrows());
        return if delivers { Outbound::Deliver } else { Outbound::Pass(Reason::Proxy) };
    }
    if I::is_loopback(connect.destination) || (dns && I::is_local_resolver(connect.destination)) {
        Outbound::Pass(Reason::Loopback)
    } else if own(connect.destination) {
        Outbound::Pass(Reason::OwnAddress)
    } else if excluded() {
        Outbound::Pass(Reason::Excluded)
    } else if dns {
        Outbound::Resolve
    } else if I::is_link_local(connect.destination) && !connect.link_local {
        // The proxy can't connect there: who answers depends on the link. Past the proxy it would be plaintext to any neighbour.
        Outbound::Refuse(Reason::LinkScoped)
    } else if I::is_link_scoped(connect.destination) {
        Outbound::Pass(Reason::LinkScoped)
    } else {
        Outbound::Capture
    }
}

/// Whether a connection of an enrolled pod that is not the proxy's may leave the pod: those to which [`outbound`] says
/// [`Outbound::Pass`], of which loopback and own addresses never leave. `link_local` as in [`Connect`].
#[inline(always)]
pub fn is_exempt<I: Ip>(destination: I::Address, link_local: bool, excluded: impl FnOnce() -> bool) -> bool {
    I::is_group(destination) || (link_local && I::is_link_local(destination)) || excluded()
}

/// Whether a connection that the socket lookup of a pod sees can only be between sockets of this pod: with such a source, whoever
/// else sends it never gets an answer. `owner` tells the pod of an address, `from_lo` whether the packet came in by `lo`: what is
/// for loopback may come from elsewhere too (`route_localnet`), and does not say whose namespace this is.
#[inline(always)]
pub fn is_within_pod<I: Ip>(
    source: I::Address,
    destination: I::Address,
    from_lo: impl FnOnce() -> bool,
    owner: impl Fn(I::Address) -> Option<u64>,
) -> bool {
    // An address that nobody told us is its own.
    if source == destination || I::is_of_this_host(source) {
        return true;
    }
    let Some(pod) = owner(source) else { return false };
    if I::is_of_this_host(destination) { from_lo() } else { owner(destination) == Some(pod) }
}

/// The mark that a decision asks for, given the mark that the socket has. Bits outside [`MARK_MASK`] stay.
///
/// A socket that was captured and is connected anew (after `connect(AF_UNSPEC)`) must not keep a mark of ours that no
/// longer applies, and no application may keep one that it set itself.
#[must_use]
#[inline(always)]
pub const fn mark(decision: Outbound, current: u32) -> u32 {
    let ours = current & MARK_MASK;
    let wanted = match decision {
        Outbound::Capture => MARK_CAPTURE,
        Outbound::Deliver => MARK_DELIVERY,
        Outbound::Pass(Reason::Proxy) => MARK_PROXY,
        Outbound::Pass(_) | Outbound::Resolve | Outbound::Refuse(_)
            if ours == MARK_CAPTURE || ours == MARK_DELIVERY =>
        {
            0
        }
        Outbound::Pass(_) | Outbound::Resolve | Outbound::Refuse(_) => ours,
    };
    (current & !MARK_MASK) | wanted
}

/// Whether a socket's mark is the proxy's.
#[must_use]
#[inline(always)]
pub const fn is_proxy_mark(mark: u32) -> bool {
    mark & MARK_MASK == MARK_PROXY
}

/// What becomes of a connection from outside to an enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    /// The proxy's inbound listener gets it.
    Capture,
    /// The proxy's listener for tunnels gets it.
    Tunnel,
    /// Leave it alone.
    Pass(Reason),
    /// Drop it.
    Drop(Reason),
}

/// Decides on an inbound connection. `flags` are those of the pod at the destination, if one is known there; `probe`,
/// `excluded` and `forwarded` tell whether the connection is a probe of the kubelet, whether an exclusion holds, and
/// whether the pod would route the packet on to somewhere else.
#[inline(always)]
pub fn inbound(
    destination_port: u16,
    flags: Option<PodFlags>,
    probe: impl FnOnce() -> bool,
    excluded: impl FnOnce() -> bool,
    forwarded: impl FnOnce() -> bool,
) -> Inbound {
    if destination_port == PORT_TUNNEL {
        return Inbound::Tunnel;
    }
    let Some(flags) = flags else {
        // A known address of the pod is local; only for others is the routing table asked.
        return if forwarded() { Inbound::Drop(Reason::Forwarded) } else { Inbound::Capture };
    };
    if flags.contains(PodFlags::BYPASS_INBOUND) {
        Inbound::Pass(Reason::BypassInbound)
    } else if probe() {
        Inbound::Pass(Reason::Probe)
    } else if excluded() {
        Inbound::Pass(Reason::Excluded)
    } else {
        Inbound::Capture
    }
}

/// Whether an application of an enrolled pod must not bind the port: it is one of the proxy's.
#[must_use]
#[inline(always)]
pub const fn is_guarded(protocol: Protocol, port: u16) -> bool {
    match protocol {
        Protocol::Tcp => matches!(port, PORT_OUTBOUND | PORT_INBOUND | PORT_TUNNEL | PORT_DNS),
        Protocol::Udp => port == PORT_DNS,
    }
}

/// Whether the port is of a listener that takes captured connections only.
#[must_use]
#[inline(always)]
pub const fn is_for_captured(port: u16) -> bool {
    matches!(port, PORT_OUTBOUND | PORT_INBOUND)
}

#[cfg(test)]
mod tests;
