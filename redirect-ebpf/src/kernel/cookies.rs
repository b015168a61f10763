//! SYN cookies: under a SYN flood the kernel keeps no handshake state, so the last ACK has to find the listener again.

use aya_ebpf::bindings::tcphdr;
use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_tcp_check_syncookie};
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::packet::{Packet, Parse, Segment};

use super::skb::Skb;
use super::socket::{Socket, State, answered};

/// Time of the last SYN cookie that a proxy sent on the `lo` of any pod, in nanoseconds; zero for never.
#[map]
static SYN_COOKIES: Array<u64> = Array::with_max_entries(1, 0);

/// How long the kernel accepts a cookie (`TCP_SYNCOOKIE_VALID`).
const VALID: u64 = 120_000_000_000;

/// The minimum interval between updates of the time, because all CPUs share it.
const REFRESH: u64 = 1_000_000_000;

/// Detects that a listener answered a SYN with a cookie: the kernel then has no socket for the tuple.
#[inline(always)]
pub(super) fn watch<A: Copy>(ctx: &TcContext, segment: &Segment<A>) {
    if segment.accepts()
        && answered(ctx, segment) != State::Connected
        && age().is_none_or(|age| age > REFRESH)
    {
        // SAFETY: the helper has no preconditions.
        let _ = SYN_COOKIES.set(0, unsafe { bpf_ktime_get_coarse_ns() }, 0);
    }
}

/// Whether a segment without a connection may carry a cookie. [`watch`] records a cookie before the client
/// receives it.
#[inline(always)]
pub(super) fn are_about() -> bool {
    age().is_some_and(|age| age <= VALID)
}

#[inline(always)]
fn age() -> Option<u64> {
    let last = *SYN_COOKIES.get(0)?;
    // SAFETY: the helper has no preconditions.
    (last != 0).then(|| unsafe { bpf_ktime_get_coarse_ns() }.saturating_sub(last))
}

/// The listener whose SYN cookie a segment without a socket acknowledges.
#[inline(always)]
pub(super) fn acknowledged<I: Parse>(
    ctx: &TcContext,
    segment: &Segment<I::Address>,
    port: u16,
) -> Option<Socket> {
    if !segment.may_hold_cookie() {
        return None;
    }
    Socket::listener(ctx, segment, port).filter(|listener| holds_cookie::<I>(ctx, segment, listener))
}

/// Whether the segment acknowledges a SYN cookie of `listener`.
#[inline(always)]
fn holds_cookie<I: Parse>(ctx: &TcContext, segment: &Segment<I::Address>, listener: &Socket) -> bool {
    const IP_HEADER: usize = 40;
    const TCP_HEADER: usize = 20;
    // An IPv4 header can be shorter than this; the 20 bytes of TCP header behind it make up the difference.
    let Some(mut ip) = Skb(ctx).load::<IP_HEADER>(segment.network_offset) else { return false };
    let Some(mut tcp) = Skb(ctx).load::<TCP_HEADER>(segment.transport_offset) else { return false };
    // SAFETY: both headers live for the length of the call, and their sizes are right.
    let result = unsafe {
        bpf_tcp_check_syncookie(
            listener.as_ptr(),
            ip.as_mut_ptr().cast(),
            IP_HEADER as u32,
            tcp.as_mut_ptr().cast::<tcphdr>(),
            TCP_HEADER as u32,
        )
    };
    result == 0
}
