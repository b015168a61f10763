//! Gives a connection to a listener of the proxy. The same for both families and for both directions.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::programs::TcContext;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::Inbound;
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::maps::ConfigFlags;
use redirect_ebpf::packet::{Parse, Parsed, Segment, parse};

use super::config;
use super::cookies::acknowledged;
use super::counters::count;
use super::diagnostics;
use super::flows::About;
use super::lookup;
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

/// Which connections are steered where.
pub(super) trait Route<I: Parse> {
    const DIRECTION: Direction;

    /// The proxy's listener.
    const PORT: u16;

    /// What the connections count as.
    const REASON: Reason = Reason::Enrolled;

    /// Where its diagnostics come from, if it has any.
    const HOOK: Option<Hook>;

    /// What becomes of a new connection.
    fn decide(ctx: &TcContext, segment: &Segment<I::Address>) -> Inbound;

    /// The pod's end of the connection.
    fn pod(segment: &Segment<I::Address>) -> I::Address;

    /// The cookie of the network namespace where the proxy listens: the pod's. None if nobody told us the address, as of an
    /// interface that came later.
    #[inline(always)]
    fn namespace(segment: &Segment<I::Address>) -> Option<u64>
    where
        I: PodIp,
    {
        I::owner(&Self::pod(segment))
    }

    /// The cookie of the pod's socket; zero if it has none yet, or it is not known.
    #[inline(always)]
    fn socket(_: &TcContext, _: &Segment<I::Address>) -> u64 {
        0
    }
}

/// Steers a packet.
#[inline(always)]
pub(super) fn steer<I: Parse + PodIp, R: Route<I>>(ctx: &TcContext) -> Action {
    steer_parsed::<I, R>(ctx, parse::<I>(&Skb(ctx)))
}

/// Steers a packet: what belongs to a connection that exists is left alone; what opens one goes to the proxy's
/// listener.
#[inline(always)]
pub(super) fn steer_parsed<I: Parse + PodIp, R: Route<I>>(
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
                State::TimeWait | State::Open => dropped::<I, R>(ctx, &segment, Reason::Fragmented),
            };
        }
    };
    let state = socket::state(ctx, &segment);
    if state == State::Connected {
        return Action::Continue;
    }
    if segment.opens() {
        match R::decide(ctx, &segment) {
            Inbound::Capture => {}
            Inbound::Drop(reason) => return dropped::<I, R>(ctx, &segment, reason),
            Inbound::Pass(reason) => {
                counted::<I, R>(ctx, &segment, Verdict::Passed, reason);
                return Action::Continue;
            }
        }
        let Some(listener) = Socket::listener(ctx, &segment, R::PORT) else {
            let held = dropped::<I, R>(ctx, &segment, Reason::NoListener);
            // Nobody gets a connection that is handed over without a listener: the kernel refuses it.
            let refused = config::flags().contains(ConfigFlags::REFUSE)
                && lookup::hand_over::<I>(&segment, R::namespace(&segment), R::PORT, None).is_ok();
            return if refused { Action::Continue } else { held };
        };
        if let Err(error) = give::<I, R>(ctx, &segment, &listener, state) {
            return refused::<I, R>(ctx, &segment, error);
        }
        counted::<I, R>(ctx, &segment, Verdict::Steered, R::REASON);
    } else if state == State::Open
        && let Some(listener) = acknowledged::<I>(ctx, &segment, R::PORT)
        && let Err(error) = give::<I, R>(ctx, &segment, &listener, state)
    {
        return refused::<I, R>(ctx, &segment, error);
    }
    Action::Continue
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
) -> Result<(), i64> {
    if !listener.is_marked() {
        // The cgroup of a socket can be asked for only when it is assigned, and it can't be unassigned again.
        return match (state, listener.assign(ctx)) {
            (State::Open | State::Connected, Ok(())) if proxies::is_in_proxy_cgroup(ctx) => Ok(()),
            _ => Err(ENOENT),
        };
    }
    // A listener that is assigned a SYN whose tuple is still in TIME_WAIT can't take it: the tuple is not free. The
    // kernel frees it only when it meets the TIME_WAIT socket first, and looks for a listener afterwards.
    if state != State::TimeWait && listener.assign(ctx).is_ok() {
        return Ok(());
    }
    // Kernels before 6.6 refuse to assign listeners with SO_REUSEPORT; the socket lookup takes them on every kernel.
    lookup::hand_over::<I>(segment, R::namespace(segment), R::PORT, Some(listener))
}
