//! Gives a connection to a listener of the proxy. The same for both families and for both directions.

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

/// What is to become of a packet.
pub(super) enum Action {
    /// Leave it to the programs and the stack behind us, with the proxy's listener attached to it or not.
    Continue,
    /// Send it elsewhere: the code that the kernel's redirect returned.
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

/// Which connections are captured where.
pub(super) trait Route<I: Parse> {
    const DIRECTION: Direction;

    /// The proxy's listener.
    const PORT: u16;

    /// What the connections count as.
    const REASON: Reason = Reason::Enrolled;

    /// Whether a gate at the socket lookup asks for what was decided here ([`super::lookup`]).
    const GATED: bool = false;

    /// Where its diagnostics come from, if it has any.
    const HOOK: Option<Hook>;

    /// What becomes of a new connection.
    fn decide(ctx: &TcContext, segment: &Segment<I::Address>) -> Inbound;

    /// The pod's end of the connection.
    fn pod(segment: &Segment<I::Address>) -> I::Address;

    /// The cookie of the pod's socket; zero if it has none yet, or it is not known.
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

/// Captures a packet: what belongs to a connection that exists is left alone; what opens one goes to the proxy's
/// listener.
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
        // Its flags may come in a later fragment: only a connection that exists may go on.
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

/// Decides on a segment that opens no connection and belongs to none. It may be the last step of a handshake that the kernel keeps
/// no state of (SYN cookies): the decision on its SYN holds for it too. A note would not do, because a flood displaces it. Nor
/// does a cookie tell whose connection it is: every listener that gave cookies itself accepts those of all others.
#[inline(always)]
fn no_connection<I: Parse + PodIp, R: Route<I>>(ctx: &TcContext, segment: &Segment<I::Address>) -> Action {
    let exempt = match R::decide(ctx, segment) {
        // Captured on the host by now. Without a note the proxy in the pod may have answered its SYN before.
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
        // The gate refuses a stray, as the kernel would, and shall not take it for something that got round us.
        let verdict = if exempt { NoteVerdict::AUTHORIZED } else { NoteVerdict::STRAY };
        let _ = notes::note(&segment.tuple::<I>(), verdict, notes::A_MOMENT);
    }
    Action::Continue
}

/// Decides on what opens a connection.
#[inline(always)]
fn open<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    state: State,
) -> Action {
    // It is of a connection that exists, as a SYN that is sent again. When the stack has it, that may have ended (a reset in the
    // same batch): for the gate a note says what becomes of it then.
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
        // Counted where the proxy gets it.
        Ok(Given::Noted) => Action::Continue,
        Ok(Given::Stranger) => dropped::<I, R>(ctx, segment, Reason::NoListener),
        Err(_) if known => Action::Continue,
        Err(error) => refused::<I, R>(ctx, segment, error),
    }
}

/// Which listener of the proxy a connection is for.
#[derive(Clone, Copy)]
struct Capture {
    port: u16,
    /// What it counts as, if it has not been counted.
    reason: Option<Reason>,
}

/// How a listener gets a connection.
enum Given {
    /// It has it.
    Assigned,
    /// The socket lookup will give it to it.
    Noted,
    /// It is not the proxy's, but has the packet, which has to go: no packet can be taken back from a socket.
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

/// The kernel does not give the packet to the listener.
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

/// Gives the packet to the listener, at once or by way of the socket lookup.
#[inline(always)]
fn give<I: Parse + PodIp, R: Route<I>>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    listener: &Socket,
    state: State,
    capture: Capture,
) -> Result<Given, i64> {
    // A listener that is assigned a SYN whose tuple is still in TIME_WAIT can't take it: the tuple is not free. The
    // kernel frees it only when it meets the TIME_WAIT socket first, and looks for a listener afterwards.
    if state == State::Open && listener.assign(ctx).is_ok() {
        // Whose it is can be asked for only now.
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
