//! The drop log: reports individual outcomes that should not occur. While it is off, the level is a constant zero, and the
//! verifier removes this code from the programs.

use core::mem::size_of;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes_relative};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::macro_support::{Level, level_enabled};
use redirect_ebpf::diagnostics::{Fault, Hook, LIMITS, TARGET};
use redirect_ebpf::family::{Family, Ip};
use redirect_ebpf::flow::FlowState;
use redirect_ebpf::packet::Parse;

#[map]
static DIAGNOSTICS: PerCpuArray<FlowState> = PerCpuArray::with_max_entries(1, 0);

// aya-log's macros check the level themselves; checking it first removes even the call of [`tell`].

/// Reports a fault in a socket call. `netns_cookie` identifies the pod, if it is known.
#[inline(always)]
pub(super) fn of_call(fault: Fault, hook: Hook, family: Family, error: i64, netns_cookie: u64) {
    if level_enabled(Level::Debug) {
        tell(pack(fault, hook, family), error, netns_cookie, 0, 0);
    }
}

/// Reports a fault in a packet.
#[inline(always)]
pub(super) fn of_packet<I: Ip>(ctx: &TcContext, fault: Fault, hook: Hook, error: i64) {
    if level_enabled(Level::Debug) {
        // SAFETY: every TC context has `ifindex`.
        let interface = unsafe { (*ctx.skb.skb).ifindex };
        tell(pack(fault, hook, I::FAMILY), error, 0, interface, ctx.len());
    }
}

/// Reports a packet that could not be parsed.
#[inline(always)]
pub(super) fn malformed<I: Parse>(ctx: &TcContext, hook: Hook) {
    /// The part of a TCP header that must be present: it ends with the flags.
    const TCP: u32 = 14;
    if level_enabled(Level::Debug) {
        let last = I::DESTINATION + size_of::<I::Address>() as u32 + TCP - 1;
        let mut byte = 0u8;
        // SAFETY: the buffer has room for one byte.
        let error = unsafe {
            bpf_skb_load_bytes_relative(
                ctx.as_ptr().cast_const(),
                last,
                (&raw mut byte).cast(),
                1,
                BPF_HDR_START_NET,
            )
        };
        of_packet::<I>(ctx, Fault::Malformed, hook, error);
    }
}

const fn pack(fault: Fault, hook: Hook, family: Family) -> u32 {
    fault as u32 | (hook as u32) << 8 | (family as u32) << 16
}

/// The only writer to the log, because its code is long. Not inlined, so that it has a stack frame of its own.
#[cold]
#[inline(never)]
fn tell(what: u32, error: i64, netns_cookie: u64, interface: u32, length: u32) {
    let Some(state) = DIAGNOSTICS.get_ptr_mut(0) else { return };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the map returns a valid pointer into this CPU's array. A program that interrupts another one may make its count
    // off by one.
    if !unsafe { &mut *state }.admit(LIMITS, now) {
        return;
    }
    aya_log_ebpf::debug!(
        (),
        target: TARGET,
        "{} {} {} {} {} {} {}",
        what & 0xff,
        what >> 8 & 0xff,
        what >> 16,
        error,
        netns_cookie,
        interface,
        length
    );
}
