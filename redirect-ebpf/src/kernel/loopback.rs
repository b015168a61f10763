//! TC ingress of the pod's `lo`: connections that [`super::outbound`] marked arrive here by the pod's policy rule
//! and go to the proxy's outbound listener. DNS queries are dropped here while the resolver does not listen.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_DELIVERY, MARK_MASK, MARK_PROXY, PORT_DNS, PORT_OUTBOUND};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{Inbound, Protocol};
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::maps::{ConfigFlags, NoteVerdict};
use redirect_ebpf::packet::{Parse, Parsed, Segment};

use super::capture::{Action, Route, capture_parsed};
use super::counters::count;
use super::flows::About;
use super::pods::PodIp;
use super::skb::{parse_on_loopback, plain_on_loopback, port_on_loopback};
use super::socket::Socket;
use super::{config, cookies, flows, notes};

#[classifier]
pub(crate) fn loopback_ipv4(ctx: TcContext) -> i32 {
    loopback::<Ipv4>(&ctx)
}

#[classifier]
pub(crate) fn loopback_ipv6(ctx: TcContext) -> i32 {
    loopback::<Ipv6>(&ctx)
}

/// Connections that count as outbound connections of the pod.
pub(super) struct Captured;

impl<I: Parse> Route<I> for Captured {
    const DIRECTION: Direction = Direction::Outbound;
    const PORT: u16 = PORT_OUTBOUND;
    const HOOK: Option<Hook> = Some(Hook::Loopback);

    #[inline(always)]
    fn decide(_: &TcContext, _: &Segment<I::Address>) -> Inbound {
        Inbound::Capture
    }

    #[inline(always)]
    fn pod(segment: &Segment<I::Address>) -> I::Address {
        segment.source
    }

    #[inline(always)]
    fn socket(ctx: &TcContext, segment: &Segment<I::Address>) -> u64 {
        flows::remembered(ctx, segment)
    }
}

#[inline(always)]
fn loopback<I: Parse + PodIp>(ctx: &TcContext) -> i32 {
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    match mark & MARK_MASK {
        MARK_CAPTURE => return captured::<I>(ctx).into(),
        MARK_PROXY | MARK_DELIVERY => proxied::<I>(ctx, mark),
        _ if port_on_loopback::<I>(ctx) == Some(PORT_DNS) => return question::<I>(ctx).into(),
        _ => {}
    }
    Action::Continue.into()
}

/// A DNS query on its way to the proxy's resolver. If the resolver does not listen, the kernel would refuse the query at once,
/// and the application would fail; without an answer it retries.
#[inline(always)]
fn question<I: Parse + PodIp>(ctx: &TcContext) -> Action {
    let (segment, heard) = if let Some(segment) = plain_on_loopback::<I>(ctx, Protocol::Udp) {
        (segment, Socket::receiving(ctx, &segment, PORT_DNS).is_some())
    } else if let Some(segment) = plain_on_loopback::<I>(ctx, Protocol::Tcp)
        && segment.opens()
    {
        (segment, Socket::is_listening(ctx, &segment, PORT_DNS))
    } else {
        return Action::Continue;
    };
    if heard || !I::is_loopback(segment.destination) {
        return Action::Continue;
    }
    let pod = I::owner(&segment.source);
    count(I::FAMILY, Direction::Outbound, Verdict::Dropped, Reason::NoListener, pod, || {
        About::segment::<I>(&segment, 0)
    });
    if config::flags().contains(ConfigFlags::REFUSE) { Action::Continue } else { Action::Drop }
}

/// A packet between the proxy and the pod's application.
#[inline(always)]
fn proxied<I: Parse + PodIp>(ctx: &TcContext, mark: u32) {
    let Parsed::Tcp(segment) = parse_on_loopback::<I>(ctx) else { return };
    match (mark & MARK_MASK, segment.opens()) {
        // The proxy's answer to a captured connection. If the client is gone, the kernel answers with a reset that
        // inherits the mark of the packet (`fwmark_reflect`): with the proxy's mark it would leave the pod, and the
        // proxy would never receive it. On a segment that opens a connection, the mark was set by another process.
        (MARK_PROXY, false) => {
            cookies::watch(ctx, &segment);
            ctx.skb.set_mark(mark & !MARK_MASK | MARK_CAPTURE);
        }
        // The proxy connects to the application. The mark is visible only here, and without the note the inbound gate refuses
        // the connection. While the pod is being enrolled, the mark may still be the proxy's own.
        (_, true) => {
            let _ = notes::note(&segment.tuple::<I>(), NoteVerdict::AUTHORIZED, notes::A_MOMENT);
        }
        _ => {}
    }
}

/// A captured connection. The sender's routing already delivers its packets locally, so the stack finds existing sockets
/// by itself; only new connections have to be assigned to a listener.
#[inline(always)]
fn captured<I: Parse + PodIp>(ctx: &TcContext) -> Action {
    let parsed = parse_on_loopback::<I>(ctx);
    if let Parsed::Tcp(segment) = parsed
        && !segment.opens()
    {
        // The proxy's answers have this mark if listeners inherit it from the SYN (`tcp_fwmark_accept`).
        cookies::watch(ctx, &segment);
        if !cookies::are_about() {
            return Action::Continue;
        }
    }
    capture_parsed::<I, Captured>(ctx, parsed)
}
