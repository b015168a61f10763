//! Gives connections to the proxy's listeners, for both families and both directions.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::PORT_TUNNEL;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::Inbound;
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::maps::{ConfigFlags, NoteVerdict};
use redirect_ebpf::packet::{Parse, Parsed, Segment, parse};

use super::config;
use super::cookies::acknowledged;
use super::counters::count;
use super::diagnostics;
use super::flows::{self, About};
use super::lookup;
use super::notes::{self, CountedAs};
use super::pods::PodIp;
use super::proxies;
use super::skb::Skb;
use super::socket::{self, Socket, State};

/// The verdict on a packet.
pub(super) enum Action {
    /// Leave it to the next programs and the stack, with or without the proxy's listener attached.
    Continue,
    /// Send it elsewhere, with the return code of the kernel's redirect.
    Redirect(i32),
    /// Drop it.
    Drop,
}

impl From<Action> for i32 {
    #[inline(always)]
    fn from(action: Action) -> Self {
        match action {
            Action::Continue => TC_ACT_UNSPEC,
            Action::Redirect(code) => code,
            Action::Drop => TC_ACT_SHOT,
        }
    }
}

/// The connections that a hook captures, and their listener.
pub(super) trait Route<I: Parse> {
    const DIRECTION: Direction;

    /// The port of the proxy's listener.
    const PORT: u16;

    /// The reason under which the connections count.
    const REASON: Reason = Reason::Enrolled;

    /// Whether the gate at the socket lookup uses the decisions made here ([`super::lookup`]).
    const GATED: bool = false;

    /// The hook that diagnostics name, if there are any.
    const HOOK: Option<Hook>;

    /// Decides on a new connection.
    fn decide(ctx: &TcContext, segment: &Segment<I::Address>) -> Inbound;

    /// The pod's end of the connection.
    fn pod(segment: &Segment<I::Address>) -> I::Address;

    /// The cookie of the pod's socket; zero if there is none yet or it is unknown.
    #[inline(always)]
    fn socket(_: &TcContext, _: &Segment<I::Address>) -> u64 {
        0
    }
}

/// Captures a packet.
#[inline(always)]
pub(super) fn capture<I: Parse + PodIp, R: Route<I>>(ctx: &TcContext) -> Action {
    capture_parsed::<I, R>(ctx, parse::<I>(&Skb(ctx)))
}

/// Captures a packet: leaves packets of existing connections alone, and gives those that open one to the proxy's listener.
#[inline(always)]
pub(super) fn capture_parsed<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    parsed: Parsed<I::Address>,
) -> Action {
    let segment = match parsed {
        Parsed::Tcp(segment) => segment,
        Parsed::NotOurs | Parsed::Datagram(_) => return Action::Continue,
        Parsed::Unknown => {
            if let Some(hook) = R::HOOK {
                diagnostics::malformed::<I>(ctx, hook);
            }
            count(I::FAMILY, R::DIRECTION, Verdict::Dropped, Reason::Malformed, None, || About::unread(ctx));
            return Action::Drop;
        }
        // The flags may be in a later fragment, so only an existing connection may continue.
        Parsed::Fragment(segment) => {
            return match socket::state(ctx, &segment) {
                State::Connected => Action::Continue,
                State::TimeWait | State::Opening | State::Open => {
                    dropped::<I, R>(ctx, &segment, Reason::Fragmented)
                }
            };
        }
    };
    let state = socket::state(ctx, &segment);
    if segment.opens() {
        return open::<I, R>(ctx, &segment, state);
    }
    if state == State::Open { no_connection::<I, R>(ctx, &segment) } else { Action::Continue }
}

/// Decides on a segment that opens no connection and belongs to none. It may be the last step of a handshake that the kernel
/// keeps no state of (SYN cookies): the decision on its SYN also holds for it. A note can't carry that decision, because a flood
/// displaces notes. A cookie does not identify its listener either: each listener that has sent cookies accepts those of all
/// others.
#[inline(always)]
fn no_connection<I: Parse + PodIp, R: Route<I>>(ctx: &TcContext, segment: &Segment<I::Address>) -> Action {
    let exempt = match R::decide(ctx, segment) {
        // The host captures it by now. Without a note, the proxy in the pod may have answered its SYN before.
        Inbound::Pass(Reason::OtherTraffic) => notes::authorizes(&segment.tuple::<I>()),
        Inbound::Pass(_) => true,
        Inbound::Capture | Inbound::Tunnel | Inbound::Drop(_) => false,
    };
    let port = if R::GATED && is_for_tunnel(segment) { PORT_TUNNEL } else { R::PORT };
    if !exempt && let Some(listener) = acknowledged::<I>(ctx, segment, port) {
        return match give::<I, R>(ctx, segment, &listener, State::Open, Capture { port, reason: None }) {
            Ok(Given::Assigned | Given::Noted) => Action::Continue,
            Ok(Given::Stranger) => dropped::<I, R>(ctx, segment, Reason::NoListener),
            Err(error) => refused::<I, R>(ctx, segment, error),
        };
    }
    if R::GATED {
        // The gate refuses a stray segment, as the kernel would. The note keeps the gate from counting it as uncaptured.
        let verdict = if exempt { NoteVerdict::AUTHORIZED } else { NoteVerdict::STRAY };
        let _ = notes::note(&segment.tuple::<I>(), verdict, notes::A_MOMENT);
    }
    Action::Continue
}

/// Decides on a segment that opens a connection.
#[inline(always)]
fn open<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    state: State,
) -> Action {
    // The tuple belongs to an existing connection, as with a retransmitted SYN. That connection may end before the stack gets the
    // packet (a reset in the same batch), so a note tells the gate what to do then.
    let known = matches!(state, State::Connected | State::Opening);
    if known && !R::GATED {
        return Action::Continue;
    }
    if state == State::Opening {
        return dropped::<I, R>(ctx, segment, Reason::SimultaneousOpen);
    }
    let capture = match R::decide(ctx, segment) {
        Inbound::Capture => Capture { port: R::PORT, reason: Some(R::REASON) },
        Inbound::Tunnel => Capture { port: PORT_TUNNEL, reason: Some(Reason::TunnelPort) },
        Inbound::Drop(_) if known => return Action::Continue,
        Inbound::Drop(reason) => return dropped::<I, R>(ctx, segment, reason),
        Inbound::Pass(reason) => {
            if R::GATED
                && let Err(error) =
                    notes::note(&segment.tuple::<I>(), NoteVerdict::AUTHORIZED, notes::A_HANDSHAKE)
            {
                return refused::<I, R>(ctx, segment, error);
            }
            if !known && reason != Reason::OtherTraffic {
                counted::<I, R>(ctx, segment, Verdict::Passed, reason);
            }
            return Action::Continue;
        }
    };
    let Some(listener) = Socket::listener(ctx, segment, capture.port) else {
        if known {
            return Action::Continue;
        }
        let held = dropped::<I, R>(ctx, segment, Reason::NoListener);
        let refused = config::flags().contains(ConfigFlags::REFUSE)
            && notes::note(&segment.tuple::<I>(), NoteVerdict::REFUSED, notes::A_MOMENT).is_ok();
        return if refused { Action::Continue } else { held };
    };
    match give::<I, R>(ctx, segment, &listener, state, capture) {
        Ok(Given::Assigned) => {
            counted::<I, R>(ctx, segment, Verdict::Captured, capture.reason.unwrap_or(R::REASON));
            Action::Continue
        }
        // `noted_listener` counts it.
        Ok(Given::Noted) => Action::Continue,
        Ok(Given::Stranger) => dropped::<I, R>(ctx, segment, Reason::NoListener),
        Err(_) if known => Action::Continue,
        Err(error) => refused::<I, R>(ctx, segment, error),
    }
}

/// The proxy's listener that a connection is for.
#[derive(Clone, Copy)]
struct Capture {
    port: u16,
    /// The reason under which to count it, if it has not been counted.
    reason: Option<Reason>,
}

/// How a listener gets a connection.
enum Given {
    /// TC has assigned it.
    Assigned,
    /// The socket lookup will assign it.
    Noted,
    /// The listener is not the proxy's, but has the packet. The packet must be dropped, because a program can't take it back from
    /// a socket.
    Stranger,
}

#[inline(always)]
fn is_for_tunnel<A: Copy>(segment: &Segment<A>) -> bool {
    u16::from_be_bytes(segment.destination_port) == PORT_TUNNEL
}

const ENOENT: i64 = -2;

#[inline(always)]
fn counted<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    verdict: Verdict,
    reason: Reason,
) {
    let pod = I::owner(&R::pod(segment));
    count(I::FAMILY, R::DIRECTION, verdict, reason, pod, || {
        About::segment::<I>(segment, R::socket(ctx, segment))
    });
}

#[inline(always)]
fn dropped<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    reason: Reason,
) -> Action {
    counted::<I, R>(ctx, segment, Verdict::Dropped, reason);
    Action::Drop
}

/// Drops a packet that the kernel did not give to the listener.
#[inline(always)]
fn refused<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    error: i64,
) -> Action {
    if let Some(hook) = R::HOOK {
        diagnostics::of_packet::<I>(ctx, Fault::Assign, hook, error);
    }
    dropped::<I, R>(ctx, segment, Reason::AssignFailed)
}

/// Gives the packet to the listener, directly or through the socket lookup.
#[inline(always)]
fn give<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    listener: &Socket,
    state: State,
    capture: Capture,
) -> Result<Given, i64> {
    // A listener can't accept an assigned SYN whose tuple is still in TIME_WAIT. The kernel frees the tuple only if it finds the
    // TIME_WAIT socket first, and looks for a listener afterwards.
    if state == State::Open && listener.assign(ctx).is_ok() {
        // Only an assigned listener's owner can be checked.
        return Ok(if proxies::listens(ctx, listener.mark()) { Given::Assigned } else { Given::Stranger });
    }
    if !listener.is_marked() {
        return Err(ENOENT);
    }
    // Kernels before 6.6 refuse to assign listeners with SO_REUSEPORT; the socket lookup takes them on every kernel.
    let counted = CountedAs {
        socket_cookie: if flows::are_wanted() { R::socket(ctx, segment) } else { 0 },
        direction: R::DIRECTION,
        reason: capture.reason.unwrap_or(R::REASON),
        already: capture.reason.is_none(),
    };
    lookup::hand_over::<I>(segment, capture.port, listener, counted)?;
    Ok(Given::Noted)
}
