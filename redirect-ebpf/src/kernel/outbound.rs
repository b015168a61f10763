//! cgroup/connect4 and cgroup/connect6: marks the connections of enrolled pods' processes, so that the pod's policy
//! rule routes them to `lo`, where [`super::loopback`] gives them to the proxy; and sends DNS queries to the proxy's
//! resolver.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::constants::PORT_OUTBOUND;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Outbound};
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::{Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::ConfigFlags;

use super::call;
use super::config;
use super::counters::count;
use super::diagnostics;
use super::dns;
use super::exclusions::ExcludedIp;
use super::flows;
use super::half_open;
use super::pods::PodIp;
use super::sock_addr::{ALLOW, BoundIp, Caller, DENY, caller, fail_with, mark, set_mark, user_ip4, user_ip6};
use super::socket::Socket;

const ECONNREFUSED: i32 = 111;

#[cgroup_sock_addr(connect4)]
pub(crate) fn outbound_ipv4(ctx: SockAddrContext) -> i32 {
    let Some(caller) = caller(&ctx) else { return ALLOW };
    if !half_open::note(&ctx, &caller) {
        return DENY;
    }
    match capture::<Ipv4>(&ctx, &caller, user_ip4(&ctx)) {
        Call::Allow => ALLOW,
        Call::Resolve => dns::connect_ipv4(&ctx, &caller),
        Call::Deny => DENY,
        Call::Refuse => fail_with(ECONNREFUSED),
    }
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn outbound_ipv6(ctx: SockAddrContext) -> i32 {
    let Some(caller) = caller(&ctx) else { return ALLOW };
    if !half_open::note(&ctx, &caller) {
        return DENY;
    }
    let address = user_ip6(&ctx);
    let call = match v4_mapped(address) {
        Some(address) => capture::<Ipv4>(&ctx, &caller, address),
        None => capture::<Ipv6>(&ctx, &caller, address),
    };
    match call {
        Call::Allow => ALLOW,
        Call::Resolve => dns::connect_ipv6(&ctx, &caller, address),
        Call::Deny => DENY,
        Call::Refuse => fail_with(ECONNREFUSED),
    }
}

/// The outcome of the call.
enum Call {
    Allow,
    Resolve,
    Deny,
    Refuse,
}

/// Decides, marks the socket and counts.
#[inline(always)]
fn capture<I: PodIp + ExcludedIp + BoundIp>(
    ctx: &SockAddrContext,
    caller: &Caller,
    destination: I::Address,
) -> Call {
    let current = mark(ctx);
    let source = I::bound(ctx);
    let decision = call::decision::<I>(ctx, caller, destination, current, source);
    let about = || call::about::<I>(ctx, Some(source), destination);
    let pod = Some(caller.netns_cookie);
    let (direction, counted) = match decision {
        // Captured connections are counted when they reach the proxy.
        Outbound::Capture | Outbound::Pass(Reason::OtherTraffic) => (Direction::Outbound, None),
        Outbound::Resolve => (Direction::Outbound, Some((Verdict::Captured, Reason::Dns))),
        Outbound::Deliver => (Direction::Delivery, Some((Verdict::Passed, Reason::Proxy))),
        Outbound::Pass(reason) => (Direction::Outbound, Some((Verdict::Passed, reason))),
        Outbound::Refuse(reason) => (Direction::Outbound, Some((Verdict::Dropped, reason))),
    };
    let wanted = decide::mark(decision, current);
    if wanted != current
        && let Err(error) = set_mark(ctx, wanted)
    {
        diagnostics::of_call(Fault::Mark, Hook::Outbound, I::FAMILY, error, caller.netns_cookie);
        // Without its mark the connection would leave the pod past the proxy.
        count(I::FAMILY, direction, Verdict::Dropped, Reason::MarkFailed, pod, about);
        return Call::Deny;
    }
    if let Some((verdict, reason)) = counted {
        count(I::FAMILY, direction, verdict, reason, pod, about);
    }
    match decision {
        Outbound::Resolve => Call::Resolve,
        Outbound::Refuse(_) => Call::Refuse,
        Outbound::Capture if is_refused::<I>(ctx, destination) => {
            count(I::FAMILY, direction, Verdict::Dropped, Reason::NoListener, pod, about);
            Call::Refuse
        }
        Outbound::Capture => {
            flows::remember(ctx);
            Call::Allow
        }
        _ => Call::Allow,
    }
}

/// Whether to refuse a captured connection because no proxy listens. `connect()` has to decide that: at the SYN, the kernel has
/// no IPv4 route for a reset from the destination's address.
#[inline(always)]
fn is_refused<I: Ip>(ctx: &SockAddrContext, destination: I::Address) -> bool {
    config::flags().contains(ConfigFlags::REFUSE)
        && Socket::listener_for(ctx, destination, PORT_OUTBOUND).is_none()
}
