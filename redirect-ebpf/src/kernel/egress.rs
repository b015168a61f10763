//! TC egress of every interface of an enrolled pod but `lo`: the last gate. The connect hooks and the policy rule capture
//! connections; whatever finds a way round them (a mark set after `connect()`, a raw socket, a routing rule of the pod's
//! own) ends here instead of leaving the pod past the proxy.
//!
//! It believes no mark of an application's: it decides anew, by the packet and by the cgroup of the socket's creator.

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
    // Nearly every packet is the proxy's: it is let go before its headers are looked at.
    if proxies::sent(ctx) {
        return Action::Continue;
    }
    // Not `skb->protocol`: the frame says what the other end will take it for.
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
        // What goes on must not change over from the proxy to the network in the middle.
        Parsed::Tcp(segment) => match other_end(ctx, &segment) {
            OtherEnd::Outside => (true, Reason::Unmarked),
            OtherEnd::Delivery if frame.is_ethernet() => return to_loopback(ctx),
            OtherEnd::Delivery | OtherEnd::Inside => (false, Reason::Unmarked),
        },
        // It may open a connection, and nobody can tell; but TCP itself never sends such.
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

/// Whether the pod's connections are captured on the host.
#[inline(always)]
fn is_left<I: PodIp>(segment: &Segment<I::Address>) -> bool {
    let flags = I::owner(&segment.source).and_then(pods::flags);
    flags.is_some_and(|flags| flags.contains(PodFlags::ON_HOST))
}

/// Where a segment's receiver is.
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

/// An application's listener can have a mark of its own. The kernel then gives it to what it accepts, instead of the one that
/// leads the answers back to the proxy by the pod's rule, so that they come here on their way to the client.
#[inline(always)]
fn to_loopback(ctx: &TcContext) -> Action {
    const LOOPBACK: u32 = 1;
    // The frame is addressed to the gateway; `lo` has no address but this one.
    if ctx.store(0, &[0u8; 6], 0).is_err() {
        return Action::Drop;
    }
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    ctx.skb.set_mark(mark & !MARK_MASK | MARK_DELIVERY);
    // SAFETY: the helper has no preconditions.
    Action::Redirect(unsafe { bpf_redirect(LOOPBACK, BPF_F_INGRESS.into()) } as i32)
}
