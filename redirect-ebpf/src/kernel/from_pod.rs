//! TC ingress of the host end of an enrolled pod's device, placement `node`: packets that the pod sends. New connections, DNS
//! queries and packets of the proxy's connections go to the proxy through the ingress device ([`super::ingress_device`]).

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_RESOLVE, PORT_DNS, PORT_OUTBOUND};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Connect, Outbound, Protocol};
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::maps::{ConfigFlags, PodFlags};
use redirect_ebpf::packet::{Parse, Parsed, Segment, is_of_another_family, parse, source};

use super::capture::Action;
use super::config;
use super::cookies::acknowledged;
use super::counters::count;
use super::diagnostics;
use super::exclusions::{ExcludedIp, excluded};
use super::flows::About;
use super::half_open;
use super::host_gate::Pod;
use super::ingress_device::{enter, enter_complaint, is_of_the_link};
use super::pods::{self, PodIp};
use super::refuse::{Back, is_refused, refuse};
use super::skb::Skb;
use super::socket;

#[classifier]
pub(crate) fn from_pod_ipv4(ctx: TcContext) -> i32 {
    from_pod::<Ipv4>(&ctx).into()
}

#[classifier]
pub(crate) fn from_pod_ipv6(ctx: TcContext) -> i32 {
    from_pod::<Ipv6>(&ctx).into()
}

#[inline(always)]
fn from_pod<I: Parse + PodIp + ExcludedIp>(ctx: &TcContext) -> Action {
    if is_of_another_family::<I>(&Skb(ctx)) {
        return Action::Continue;
    }
    // SAFETY: every TC context has `ifindex`.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    let Some((cookie, flags)) = pods::behind(interface) else { return Action::Continue };
    // The programs in the pod capture its connections; the proxy on the host keeps those that it had before.
    let left = flags.contains(PodFlags::IN_POD);
    // No pod may impersonate another pod.
    let spoofs = |source| match I::owner(&source) {
        Some(owner) => owner != cookie,
        None => !flags.contains(PodFlags::ANY_SOURCE) && !I::is_unassigned(source),
    };
    // A packet too short for an address is dropped below.
    if !left && source::<I>(&Skb(ctx)).is_some_and(spoofs) {
        return drop::<I>(Reason::Spoofed, cookie, None);
    }
    let (segment, kind) = match parse::<I>(&Skb(ctx)) {
        Parsed::NotOurs => return enter_complaint::<I>(ctx),
        Parsed::Unknown if left => return Action::Continue,
        Parsed::Unknown => {
            diagnostics::malformed::<I>(ctx, Hook::FromPod);
            return drop::<I>(Reason::Malformed, cookie, None);
        }
        Parsed::Tcp(segment) => (segment, Kind::Segment),
        Parsed::Datagram(segment) => (segment, Kind::Datagram),
        Parsed::Fragment(segment) => (segment, Kind::Fragment),
    };
    let is_the_proxys = kind == Kind::Segment
        && if segment.opens() {
            left && half_open::opened_before(ctx, flags)
        } else {
            socket::is_known(ctx, &segment)
        };
    if is_the_proxys {
        return enter::<I>(ctx, MARK_CAPTURE);
    }
    if left {
        return Action::Continue;
    }
    let protocol = if kind == Kind::Datagram { Protocol::Udp } else { Protocol::Tcp };
    // A single call site: each one takes stack space, and Linux 6.1 accounts for more of it.
    let decision = decision::<I>(&segment, protocol, cookie, flags);
    match (kind, decision) {
        (Kind::Segment, _) => tcp::<I>(ctx, &segment, decision, Pod { cookie, flags }),
        (Kind::Datagram, Outbound::Resolve) if is_of_the_link::<I>(&segment) => {
            drop::<I>(Reason::LinkScoped, cookie, Some(&segment))
        }
        (Kind::Datagram, Outbound::Resolve) => enter::<I>(ctx, MARK_RESOLVE),
        (Kind::Datagram, _) | (Kind::Fragment, Outbound::Pass(_)) => Action::Continue,
        // It may open a connection; the flags are in another fragment. TCP itself never sends such packets.
        (Kind::Fragment, _) => drop::<I>(Reason::Fragmented, cookie, Some(&segment)),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Segment,
    Datagram,
    Fragment,
}

#[inline(always)]
fn tcp<I: Parse + PodIp + ExcludedIp>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    decision: Outbound,
    pod: Pod,
) -> Action {
    let cookie = pod.cookie;
    let about = || About::packet::<I>(Some(segment));
    let captured = match decision {
        Outbound::Capture => Some((PORT_OUTBOUND, MARK_CAPTURE)),
        Outbound::Resolve => Some((PORT_DNS, MARK_RESOLVE)),
        Outbound::Deliver => None,
        Outbound::Refuse(reason) if segment.opens() => return drop::<I>(reason, cookie, Some(segment)),
        Outbound::Refuse(_) => None,
        Outbound::Pass(reason) => {
            if segment.opens() {
                count(I::FAMILY, Direction::Outbound, Verdict::Passed, reason, Some(cookie), about);
            }
            None
        }
    };
    let Some((port, mark)) = captured else { return Action::Continue };
    let reason = if segment.opens() {
        if is_of_the_link::<I>(segment) {
            return drop::<I>(Reason::LinkScoped, cookie, Some(segment));
        }
        if !is_refused(ctx, segment, port) {
            return enter::<I>(ctx, mark);
        }
        Reason::NoListener
    } else {
        if acknowledged::<I>(ctx, segment, port).is_some() {
            return enter::<I>(ctx, mark);
        }
        if pod.lets_go(ctx, segment) || pod.exempts_client::<I>(segment) {
            return Action::Continue;
        }
        // It belongs to a connection that the proxy no longer has, or never had.
        Reason::PastPod
    };
    count(I::FAMILY, Direction::Outbound, Verdict::Dropped, reason, Some(cookie), about);
    refuse::<I>(ctx, segment, Back::ToPod)
}

#[inline(always)]
fn decision<I: PodIp + ExcludedIp>(
    segment: &Segment<I::Address>,
    protocol: Protocol,
    cookie: u64,
    flags: PodFlags,
) -> Outbound {
    let connect = Connect {
        protocol,
        destination: segment.destination,
        port: u16::from_be_bytes(segment.destination_port),
        proxy: false,
        source: segment.source,
        flags,
        link_local: config::flags().contains(ConfigFlags::LINK_LOCAL),
    };
    decide::outbound::<I>(
        &connect,
        |address| I::owner(&address) == Some(cookie),
        || excluded::<I>(cookie, flags, Direction::Outbound, segment.destination, segment.destination_port),
    )
}

#[inline(always)]
fn drop<I: Parse>(reason: Reason, cookie: u64, segment: Option<&Segment<I::Address>>) -> Action {
    count(I::FAMILY, Direction::Outbound, Verdict::Dropped, reason, Some(cookie), || {
        About::packet::<I>(segment)
    });
    Action::Drop
}
