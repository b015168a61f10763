//! TC egress of the host end of an enrolled pod's device, placement `node`: packets to the pod. New connections and packets of
//! the proxy's connections go to the proxy through the ingress device ([`super::ingress_device`]). That includes connections that
//! the proxy opened from the pod's address, because their answers are addressed to the pod.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{
    MARK_CAPTURE, MARK_INBOUND, MARK_TUNNEL, PORT_DNS, PORT_DOMAIN, PORT_INBOUND, PORT_TUNNEL,
};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Inbound};
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::maps::PodFlags;
use redirect_ebpf::packet::{Parse, Parsed, Segment, is_of_another_family, parse};

use super::capture::Action;
use super::cookies::acknowledged;
use super::counters::count;
use super::diagnostics;
use super::exclusions::{ExcludedIp, excluded};
use super::flows::About;
use super::ingress_device::{enter, enter_complaint, is_of_the_link};
use super::pods::{self, PodIp};
use super::probe::is_probe;
use super::proxies::{Sender, sender};
use super::refuse::{Back, is_refused, refuse};
use super::rewrite::set_source_port;
use super::skb::Frame;
use super::socket;

#[classifier]
pub(crate) fn to_pod_ipv4(ctx: TcContext) -> i32 {
    to_pod::<Ipv4>(&ctx).into()
}

#[classifier]
pub(crate) fn to_pod_ipv6(ctx: TcContext) -> i32 {
    to_pod::<Ipv6>(&ctx).into()
}

#[inline(always)]
fn to_pod<I: Parse + PodIp + ExcludedIp>(ctx: &TcContext) -> Action {
    if is_of_another_family::<I>(&Frame::ethernet(ctx)) {
        return Action::Continue;
    }
    // SAFETY: every TC context has `ifindex`.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    let Some((cookie, flags)) = pods::behind(interface) else { return Action::Continue };
    match parse::<I>(&Frame::ethernet(ctx)) {
        Parsed::NotOurs => enter_complaint::<I>(ctx),
        Parsed::Unknown => {
            diagnostics::malformed::<I>(ctx, Hook::ToPod);
            drop::<I>(Reason::Malformed, cookie, None)
        }
        Parsed::Datagram(segment) => {
            if u16::from_be_bytes(segment.source_port) == PORT_DNS && sender(ctx, true) != Sender::Other {
                return answer::<I>(ctx, &segment);
            }
            Action::Continue
        }
        Parsed::Tcp(segment) => tcp::<I>(ctx, &segment, cookie, flags),
        // It may open a connection; the flags are in another fragment. TCP itself never sends such packets.
        Parsed::Fragment(_)
            if flags.contains(PodFlags::IN_POD)
                || matches!(sender(ctx, true), Sender::Delivery | Sender::Inbound) =>
        {
            Action::Continue
        }
        Parsed::Fragment(segment) => match decision::<I>(ctx, &segment, cookie, flags) {
            Inbound::Pass(_) => Action::Continue,
            _ => drop::<I>(Reason::Fragmented, cookie, Some(&segment)),
        },
    }
}

#[inline(always)]
fn tcp<I: Parse + PodIp + ExcludedIp>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    cookie: u64,
    flags: PodFlags,
) -> Action {
    let about = || About::packet::<I>(Some(segment));
    let known = || is_of_a_connection(ctx, segment);
    if flags.contains(PodFlags::IN_POD) {
        // The proxy on the host keeps the connections that it had.
        let delivered = sender(ctx, segment.opens()) == Sender::Delivery;
        return if !delivered && known() { enter::<I>(ctx, MARK_CAPTURE) } else { Action::Continue };
    }
    match sender(ctx, segment.opens()) {
        Sender::Delivery => return Action::Continue,
        Sender::Inbound if !known() => return Action::Continue,
        Sender::Inbound | Sender::Proxy | Sender::Other => {}
    }
    if known() {
        return enter::<I>(ctx, MARK_CAPTURE);
    }
    let tunnel = u16::from_be_bytes(segment.destination_port) == PORT_TUNNEL;
    let (port, mark) = if tunnel { (PORT_TUNNEL, MARK_TUNNEL) } else { (PORT_INBOUND, MARK_INBOUND) };
    let decision = decision::<I>(ctx, segment, cookie, flags);
    if !segment.opens() {
        // The last step of a handshake with SYN cookies is decided as its SYN was: a listener accepts the cookies of others too.
        let captured = matches!(decision, Inbound::Capture | Inbound::Tunnel);
        return if captured && acknowledged::<I>(ctx, segment, port).is_some() {
            enter::<I>(ctx, mark)
        } else {
            Action::Continue
        };
    }
    match decision {
        Inbound::Capture | Inbound::Tunnel => {}
        Inbound::Drop(reason) => return drop::<I>(reason, cookie, Some(segment)),
        Inbound::Pass(reason) => {
            count(I::FAMILY, Direction::Inbound, Verdict::Passed, reason, Some(cookie), about);
            return Action::Continue;
        }
    }
    if is_of_the_link::<I>(segment) {
        return drop::<I>(Reason::LinkScoped, cookie, Some(segment));
    }
    if is_refused(ctx, segment, port) {
        count(I::FAMILY, Direction::Inbound, Verdict::Dropped, Reason::NoListener, Some(cookie), about);
        return refuse::<I>(ctx, segment, Back::FromPod);
    }
    enter::<I>(ctx, mark)
}

/// Whether a socket of the host has the connection.
#[inline(always)]
fn is_of_a_connection<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> bool {
    socket::is_known(ctx, segment) && !segment.opens()
}

#[inline(always)]
fn decision<I: PodIp + ExcludedIp>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    cookie: u64,
    flags: PodFlags,
) -> Inbound {
    decide::inbound(
        u16::from_be_bytes(segment.destination_port),
        Some(flags),
        || is_probe(ctx),
        || excluded::<I>(cookie, flags, Direction::Inbound, segment.source, segment.destination_port),
        || false,
    )
}

/// The resolver answers from its own port; the application expects the server's.
#[inline(always)]
fn answer<I: Parse>(ctx: &TcContext, segment: &Segment<I::Address>) -> Action {
    match set_source_port(ctx, segment, PORT_DOMAIN) {
        Ok(()) => Action::Continue,
        Err(error) => {
            diagnostics::of_packet::<I>(ctx, Fault::Rewrite, Hook::ToPod, error);
            Action::Drop
        }
    }
}

#[inline(always)]
fn drop<I: Parse>(reason: Reason, cookie: u64, segment: Option<&Segment<I::Address>>) -> Action {
    count(I::FAMILY, Direction::Inbound, Verdict::Dropped, reason, Some(cookie), || {
        About::packet::<I>(segment)
    });
    Action::Drop
}
