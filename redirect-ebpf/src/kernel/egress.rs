//! TC egress of every interface of an enrolled pod but `lo`: the egress guard. The connect hooks and the policy rule
//! capture connections. The guard drops traffic that gets around them (a mark set after `connect()`, a raw socket, a
//! routing rule that the pod added) before it leaves the pod past the proxy.
//!
//! The guard trusts no mark that an application sets. It decides again, from the packet and from the cgroup of the
//! process that created the socket.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{MARK_DELIVERY, MARK_MASK};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide;
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::maps::{ConfigFlags, PodFlags};
use redirect_ebpf::packet::{Parse, Parsed, Segment, is_of_another_family, parse};

use super::capture::Action;
use super::config;
use super::counters::count;
use super::diagnostics;
use super::exclusions::{ExcludedIp, excluded};
use super::flows::{self, About};
use super::half_open;
use super::pods::{self, PodIp};
use super::proxies;
use super::skb::Frame;
use super::socket::{self, Socket, State};

#[classifier]
pub(crate) fn egress_ipv4(ctx: TcContext) -> i32 {
    egress::<Ipv4>(&ctx).into()
}

#[classifier]
pub(crate) fn egress_ipv6(ctx: TcContext) -> i32 {
    egress::<Ipv6>(&ctx).into()
}

#[inline(always)]
fn egress<I: Parse + PodIp + ExcludedIp>(ctx: &TcContext) -> Action {
    // Nearly every packet is the proxy's, so this check comes before the headers are parsed.
    if proxies::sent(ctx) {
        return Action::Continue;
    }
    // Not by `skb->protocol`: the receiver goes by the frame's contents.
    let frame = Frame::leaving(ctx);
    if is_of_another_family::<I>(&frame) {
        return Action::Continue;
    }
    let parsed = parse::<I>(&frame);
    let (leaves, reason) = match parsed {
        Parsed::NotOurs | Parsed::Datagram(_) => (true, Reason::Unmarked),
        Parsed::Unknown => (false, Reason::Malformed),
        Parsed::Tcp(segment) if segment.opens() => {
            let leaves =
                is_exempt::<I>(&segment) || opened_before::<I>(ctx, &segment) || is_left::<I>(&segment);
            (leaves, Reason::Unmarked)
        }
        Parsed::Tcp(segment) if segment.resets() => (true, Reason::Unmarked),
        // An open connection must not switch from the proxy to the network midway.
        Parsed::Tcp(segment) => match other_end(ctx, &segment) {
            OtherEnd::Outside => (true, Reason::Unmarked),
            OtherEnd::Delivery if frame.is_ethernet() => return to_loopback(ctx),
            OtherEnd::Delivery | OtherEnd::Inside => (false, Reason::Unmarked),
        },
        // It may open a connection; the flags are in another fragment. TCP itself never sends such packets.
        Parsed::Fragment(segment) => (is_exempt::<I>(&segment) || is_left::<I>(&segment), Reason::Fragmented),
    };
    if leaves {
        return Action::Continue;
    }
    if matches!(parsed, Parsed::Unknown) {
        diagnostics::malformed::<I>(ctx, Hook::Egress);
    }
    let segment = match parsed {
        Parsed::Tcp(segment) | Parsed::Fragment(segment) => Some(segment),
        Parsed::Unknown | Parsed::NotOurs | Parsed::Datagram(_) => None,
    };
    let pod = segment.and_then(|segment| I::owner(&segment.source));
    count(I::FAMILY, Direction::Outbound, Verdict::Dropped, reason, pod, || match segment {
        Some(segment) => About::segment::<I>(&segment, flows::sender(ctx)),
        None => About::unread(ctx),
    });
    Action::Drop
}

/// Whether the connect hooks let a connection to this destination pass.
#[inline(always)]
fn is_exempt<I: Parse + PodIp + ExcludedIp>(segment: &Segment<I::Address>) -> bool {
    decide::is_exempt::<I>(segment.destination, config::flags().contains(ConfigFlags::LINK_LOCAL), || {
        let cookie = I::owner(&segment.source);
        let flags = cookie.and_then(pods::flags).unwrap_or_default();
        let (cookie, port) = (cookie.unwrap_or_default(), segment.destination_port);
        excluded::<I>(cookie, flags, Direction::Outbound, segment.destination, port)
    })
}

/// Whether a SYN is of a socket that called `connect()` before the pod was captured.
#[inline(always)]
fn opened_before<I: Parse + PodIp>(ctx: &TcContext, segment: &Segment<I::Address>) -> bool {
    let flags = I::owner(&segment.source).and_then(pods::flags);
    flags.is_some_and(|flags| half_open::opened_before(ctx, flags))
}

/// Whether the host end captures this pod's connections.
#[inline(always)]
fn is_left<I: PodIp>(segment: &Segment<I::Address>) -> bool {
    let flags = I::owner(&segment.source).and_then(pods::flags);
    flags.is_some_and(|flags| flags.contains(PodFlags::ON_HOST))
}

/// The location of a segment's receiver.
enum OtherEnd {
    /// In the pod: the proxy has the connection, or had it.
    Inside,
    /// The same: the proxy connected to the application.
    Delivery,
    /// Elsewhere.
    Outside,
}

#[inline(always)]
fn other_end<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> OtherEnd {
    match socket::state(ctx, segment) {
        State::Connected | State::Opening => {}
        State::TimeWait | State::Open => return OtherEnd::Outside,
    }
    match Socket::full(ctx, segment) {
        Some(socket) if socket.mark() & MARK_MASK == MARK_DELIVERY => OtherEnd::Delivery,
        _ => OtherEnd::Inside,
    }
}

/// A listener can have a mark of its own. The kernel then gives that mark to accepted sockets, instead of the mark by which
/// the pod's rule routes replies back to the proxy, so the replies show up here on their way to the client.
#[inline(always)]
fn to_loopback(ctx: &TcContext) -> Action {
    const LOOPBACK: u32 = 1;
    // The frame's destination is the gateway's MAC address; `lo` accepts only zeros.
    if ctx.store(0, &[0u8; 6], 0).is_err() {
        return Action::Drop;
    }
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    ctx.skb.set_mark(mark & !MARK_MASK | MARK_DELIVERY);
    // SAFETY: the helper has no preconditions.
    Action::Redirect(unsafe { bpf_redirect(LOOPBACK, BPF_F_INGRESS.into()) } as i32)
}
