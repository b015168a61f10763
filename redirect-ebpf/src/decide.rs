//! Decides on new connections. Pure functions: the programs supply the facts (the expensive ones lazily) and
//! execute the decision.

use crate::constants::{
    MARK_CAPTURE, MARK_DELIVERY, MARK_MASK, MARK_PROXY, PORT_DNS, PORT_DOMAIN, PORT_INBOUND, PORT_OUTBOUND,
    PORT_TUNNEL,
};
use crate::count::Reason;
use crate::family::Ip;
use crate::maps::PodFlags;

/// The decision on a connection that a process of an enrolled pod opens.
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

/// The protocols that this project handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An outbound connection or datagram: the facts that are cheap to read.
#[derive(Clone, Copy, Debug)]
pub struct Connect<A> {
    /// Its protocol.
    pub protocol: Protocol,
    /// Destination address.
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

/// Decides on an outbound connection. `own` returns whether an address belongs to the pod, `excluded` whether an
/// exclusion covers the connection.
///
/// The proxy's connection counts as a delivery to the application if it dials an address of the pod, or if its source is
/// an address that is not the pod's own: the pod may have addresses that the agent does not know.
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
        // Refused, because the proxy can't connect there: the peer depends on the link. Past the proxy, the connection would be
        // plaintext to any neighbor.
        Outbound::Refuse(Reason::LinkScoped)
    } else if I::is_link_scoped(connect.destination) {
        Outbound::Pass(Reason::LinkScoped)
    } else {
        Outbound::Capture
    }
}

/// Whether a connection of an application may leave the pod past the proxy: it mirrors the cases in which [`outbound`]
/// returns [`Outbound::Pass`], except loopback and own addresses, which never leave the pod. `link_local` as in
/// [`Connect`].
#[inline(always)]
pub fn is_exempt<I: Ip>(destination: I::Address, link_local: bool, excluded: impl FnOnce() -> bool) -> bool {
    I::is_group(destination) || (link_local && I::is_link_local(destination)) || excluded()
}

/// Whether a connection at the pod's socket lookup can only be between sockets of this pod: any other sender with such a source
/// would never get an answer. `owner` maps an address to its pod; `from_lo` is whether the packet arrived on `lo`. A loopback
/// destination proves nothing by itself, because other interfaces can deliver to it (`route_localnet`), and it does not identify
/// the namespace.
#[inline(always)]
pub fn is_within_pod<I: Ip>(
    source: I::Address,
    destination: I::Address,
    from_lo: impl FnOnce() -> bool,
    owner: impl Fn(I::Address) -> Option<u64>,
) -> bool {
    // The pod's own address, but unknown to the agent.
    if source == destination || I::is_of_this_host(source) {
        return true;
    }
    let Some(pod) = owner(source) else { return false };
    if I::is_of_this_host(destination) { from_lo() } else { owner(destination) == Some(pod) }
}

/// Returns the socket's new mark for a decision, given its current one. Bits outside [`MARK_MASK`] stay.
///
/// A socket that was captured and reconnects (after `connect(AF_UNSPEC)`) must not keep a stale mark, and no
/// application may keep a mesh mark that it set itself.
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

/// The decision on a connection from outside to an enrolled pod.
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

/// Decides on an inbound connection. `flags` are those of the pod that owns the destination, if any. `probe`,
/// `excluded` and `forwarded` return whether the connection is a kubelet probe, whether an exclusion covers it, and
/// whether the pod would forward the packet.
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
        // A known pod address is local; only other addresses need a routing lookup.
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

/// Whether applications of enrolled pods must not bind the port, because it is one of the proxy's.
#[must_use]
#[inline(always)]
pub const fn is_guarded(protocol: Protocol, port: u16) -> bool {
    match protocol {
        Protocol::Tcp => matches!(port, PORT_OUTBOUND | PORT_INBOUND | PORT_TUNNEL | PORT_DNS),
        Protocol::Udp => port == PORT_DNS,
    }
}

/// Whether the port belongs to a listener that accepts captured connections only.
#[must_use]
#[inline(always)]
pub const fn is_for_captured(port: u16) -> bool {
    matches!(port, PORT_OUTBOUND | PORT_INBOUND)
}

#[cfg(test)]
mod tests;
