//! TC ingress of the ingress device, placement `node`: [`super::from_pod`] and [`super::to_pod`] send packets for the proxy
//! through this device into the host's stack. A policy rule delivers packets from it locally, whatever their destination.
//!
//! It is a separate device because packets to a pod come from anywhere. If they seemed to arrive from the pod's device, they
//! would fail the reverse path filter and mislead the bridge about where addresses are.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{
    MARK_CAPTURE, MARK_INBOUND, MARK_MASK, MARK_RESOLVE, MARK_TUNNEL, PORT_DNS, PORT_INBOUND, PORT_OUTBOUND,
    PORT_TUNNEL,
};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::Inbound;
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ip, Ipv4, Ipv6};
use redirect_ebpf::packet::{Packet, Parse, Parsed, Segment, complained_of, parse};

use super::capture::{Action, Route, capture};
use super::config;
use super::counters::count;
use super::flows::About;
use super::pods::PodIp;
use super::skb::Skb;
use super::socket::{self, Socket};

#[classifier]
pub(crate) fn entrance_ipv4(ctx: TcContext) -> i32 {
    ingress_device::<Ipv4>(&ctx)
}

#[classifier]
pub(crate) fn entrance_ipv6(ctx: TcContext) -> i32 {
    ingress_device::<Ipv6>(&ctx)
}

/// Sends a packet to the ingress device. The mark selects the socket.
#[inline(always)]
pub(super) fn enter<I: Ip>(ctx: &TcContext, mark: u32) -> Action {
    if Skb(ctx).ether_type() != I::ETHER_TYPE {
        // The host's stack would look for a VLAN device on top of the ingress device.
        count(I::FAMILY, direction(mark), Verdict::Dropped, Reason::Malformed, None, || About::unread(ctx));
        return Action::Drop;
    }
    set_mark(ctx, mark);
    // SAFETY: the helper has no preconditions: a device that does not exist drops the packet.
    Action::Redirect(unsafe { bpf_redirect(config::ingress_device(), BPF_F_INGRESS.into()) } as i32)
}

/// Whether one end is link-local: the proxy's sockets would scope such an address to the ingress device, and their answers
/// would reach no host.
#[inline(always)]
pub(super) fn is_of_the_link<I: Ip>(segment: &Segment<I::Address>) -> bool {
    I::is_link_scoped(segment.source) || I::is_link_scoped(segment.destination)
}

/// Sends an ICMP error about one of the proxy's connections to the ingress device: it is addressed to the end that the
/// proxy impersonates. Other packets that are neither TCP nor UDP pass.
#[inline(always)]
pub(super) fn enter_complaint<I: Parse>(ctx: &TcContext) -> Action {
    match complained_of::<I>(&Skb(ctx)) {
        Some(segment) if socket::is_known(ctx, &segment) => enter::<I>(ctx, MARK_CAPTURE),
        _ => Action::Continue,
    }
}

#[inline(always)]
fn ingress_device<I: Parse + PodIp>(ctx: &TcContext) -> i32 {
    const PACKET_HOST: u32 = 0;
    if Skb(ctx).ether_type() != I::ETHER_TYPE {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark } & MARK_MASK;
    set_mark(ctx, MARK_CAPTURE);
    // The frame's MAC address is not the ingress device's.
    if ctx.change_type(PACKET_HOST).is_err() {
        return TC_ACT_SHOT;
    }
    let code = match mark {
        MARK_CAPTURE => captured::<I, Captured>(ctx.skb.skb),
        MARK_INBOUND => captured::<I, Inwards>(ctx.skb.skb),
        MARK_TUNNEL => captured::<I, Tunnelled>(ctx.skb.skb),
        MARK_RESOLVE => resolved::<I>(ctx.skb.skb),
        // No other traffic belongs on this device.
        _ => TC_ACT_SHOT,
    };
    // Later filters don't run: while tcx links replace filters the program is attached twice, and the first run changes the mark.
    if code == TC_ACT_UNSPEC { TC_ACT_OK } else { code }
}

/// A separate function for each route: together, their variables don't fit on one stack.
#[inline(never)]
fn captured<I: Parse + PodIp, R: Route<I>>(skb: *mut __sk_buff) -> i32 {
    capture::<I, R>(&TcContext::new(skb)).into()
}

#[inline(never)]
fn resolved<I: Parse + PodIp>(skb: *mut __sk_buff) -> i32 {
    resolve::<I>(&TcContext::new(skb)).into()
}

#[inline(always)]
fn set_mark(ctx: &TcContext, mark: u32) {
    // SAFETY: every TC context has `mark`.
    let current = unsafe { (*ctx.skb.skb).mark };
    ctx.set_mark((current & !MARK_MASK) | mark);
}

const fn direction(mark: u32) -> Direction {
    match mark {
        MARK_INBOUND | MARK_TUNNEL => Direction::Inbound,
        _ => Direction::Outbound,
    }
}

/// Gives a DNS query to the proxy's resolver.
#[inline(always)]
fn resolve<I: Parse + PodIp>(ctx: &TcContext) -> Action {
    let Parsed::Datagram(segment) = parse::<I>(&Skb(ctx)) else { return capture::<I, Question>(ctx) };
    let pod = I::owner(&segment.source);
    let about = || About::segment::<I>(&segment, 0);
    let Some(socket) = Socket::datagrams(ctx, &segment, PORT_DNS) else {
        count(I::FAMILY, Direction::Outbound, Verdict::Dropped, Reason::NoListener, pod, about);
        return Action::Drop;
    };
    if socket.assign(ctx).is_err() {
        count(I::FAMILY, Direction::Outbound, Verdict::Dropped, Reason::AssignFailed, pod, about);
        return Action::Drop;
    }
    count(I::FAMILY, Direction::Outbound, Verdict::Captured, Reason::Dns, pod, about);
    Action::Continue
}

/// A route of the ingress device: the earlier program has already decided that the packet is the proxy's.
macro_rules! route {
    ($(#[$doc:meta])* $name:ident, $direction:ident, $port:expr, $reason:ident, $pod:ident) => {
        $(#[$doc])*
        struct $name;

        impl<I: Parse> Route<I> for $name {
            const DIRECTION: Direction = Direction::$direction;
            const PORT: u16 = $port;
            const REASON: Reason = Reason::$reason;
            const HOOK: Option<Hook> = None;

            #[inline(always)]
            fn decide(_: &TcContext, _: &Segment<I::Address>) -> Inbound {
                Inbound::Capture
            }

            #[inline(always)]
            fn pod(segment: &Segment<I::Address>) -> I::Address {
                segment.$pod
            }
        }
    };
}

route!(
    /// Connections from pods, and packets of existing connections.
    Captured, Outbound, PORT_OUTBOUND, Enrolled, source
);
route!(
    /// Connections to pods.
    Inwards, Inbound, PORT_INBOUND, Enrolled, destination
);
route!(
    /// Connections of the mesh's tunnel.
    Tunnelled, Inbound, PORT_TUNNEL, Enrolled, destination
);
route!(
    /// DNS over TCP.
    Question, Outbound, PORT_DNS, Dns, source
);
