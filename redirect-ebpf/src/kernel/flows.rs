//! Events of single connections, off until the agent turns them on for a monitor.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use aya_ebpf::programs::{SockAddrContext, TcContext};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::flow::{Flow, FlowLimits, FlowState};
use redirect_ebpf::maps::{ConfigFlags, Tuple};
use redirect_ebpf::packet::{Parse, Segment};

use super::config;
use super::socket::Socket;

/// Room for about 3600 events: the agent reads them as they arrive.
#[map]
static FLOWS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

#[map]
static FLOW_LIMITS: Array<FlowLimits> = Array::with_max_entries(1, 0);

#[map]
static FLOW_STATE: PerCpuArray<FlowState> = PerCpuArray::with_max_entries(1, 0);

/// The socket's cookie, kept by the connect hook because a packet on `lo` has lost its socket. Only while a monitor is
/// attached.
#[btf_map]
static COOKIES: SkStorage<u64> = SkStorage::new();

/// The decision on a connection.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) family: Family,
    pub(super) direction: Direction,
    pub(super) verdict: Verdict,
    pub(super) reason: Reason,
}

/// The connection that an event describes.
#[derive(Clone, Copy)]
pub(super) struct About {
    pub(super) socket_cookie: u64,
    pub(super) tuple: Tuple,
}

impl About {
    /// Without addresses and ports. A function, because the compiler would put a constant into a map.
    #[inline(always)]
    pub(super) fn new(socket_cookie: u64) -> Self {
        let (source, destination) = ([0; 16], [0; 16]);
        let tuple = Tuple { source, destination, source_port: [0; 2], destination_port: [0; 2] };
        Self { socket_cookie, tuple }
    }

    /// A packet that could not be parsed.
    #[inline(always)]
    pub(super) fn unread(ctx: &TcContext) -> Self {
        Self::new(sender(ctx))
    }

    /// A packet, as far as it could be parsed.
    #[inline(always)]
    pub(super) fn packet<I: Parse>(segment: Option<&Segment<I::Address>>) -> Self {
        let mut about = Self::new(0);
        if let Some(segment) = segment {
            about.tuple = segment.tuple::<I>();
        }
        about
    }

    /// A segment that this socket sent; the cookie is zero if the socket is unknown.
    #[inline(always)]
    pub(super) fn segment<I: Parse>(segment: &Segment<I::Address>, socket_cookie: u64) -> Self {
        Self { socket_cookie, tuple: segment.tuple::<I>() }
    }
}

#[inline(always)]
pub(super) fn are_wanted() -> bool {
    config::flags().contains(ConfigFlags::FLOWS)
}

/// Reports a connection of a pod (zero: unknown pod), within the limits.
#[inline(always)]
pub(super) fn tell(what: What, netns_cookie: u64, about: &About) {
    // SAFETY: the helper has no preconditions.
    let time = unsafe { bpf_ktime_get_ns() };
    let Some(limits) = FLOW_LIMITS.get(0) else { return };
    let Some(state) = FLOW_STATE.get_ptr_mut(0) else { return };
    // SAFETY: the map returns a valid pointer into this CPU's array. A program that interrupts another one may make its count
    // wrong by one.
    let state = unsafe { &mut *state };
    if !state.admit(*limits, time) {
        return;
    }
    let Some(mut event) = FLOWS.reserve::<Flow>(0) else {
        state.full += 1;
        return;
    };
    let What { family, direction, verdict, reason } = what;
    event.write(Flow {
        time,
        netns_cookie,
        socket_cookie: about.socket_cookie,
        tuple: about.tuple,
        family: family as u8,
        direction: direction as u8,
        verdict: verdict as u8,
        reason: reason as u8,
    });
    event.submit(0);
}

/// The cookie of the hook's socket.
#[inline(always)]
pub(super) fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The cookie of the socket that sent a packet, as long as the packet has it.
#[inline(always)]
pub(super) fn sender(ctx: &TcContext) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Keeps the cookie for the packet that opens the socket's connection.
#[inline(always)]
pub(super) fn remember(ctx: &SockAddrContext) {
    if are_wanted() {
        let mut cookie = cookie(ctx);
        // SAFETY: the socket is the context's own, and the initial value lives for the length of the call.
        unsafe { COOKIES.get_or_insert_ptr_mut(ctx, Some(&mut cookie)) };
    }
}

/// The cookie of the socket that opens a connection on `lo`; zero if unknown.
#[inline(always)]
pub(super) fn remembered<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> u64 {
    Socket::sender(ctx, segment).and_then(|socket| socket.stored(&COOKIES)).unwrap_or(0)
}
