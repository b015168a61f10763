//! sk_lookup of each enrolled pod: finds the proxy's listener for connections that TC can't give to it itself.
//!
//! That is a SYN whose tuple is still in TIME_WAIT, as happens when the proxy closed first and the client uses its port
//! again: only the kernel can retire the TIME_WAIT socket, and when it has, it looks for a listener by address and port
//! and would find the application's, or none. So [`hand_over`] notes, at the TC hook, where the connection is to go,
//! and the lookup a moment later, in the same softirq, reads it.
//!
//! A second program keeps connections that were not captured off the listeners for captured ones: from there a proxy would
//! dial the same address and port again, and so on.

use core::mem::offset_of;

use aya_ebpf::bindings::{bpf_sk_lookup, sk_action};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::{map, sk_lookup};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::SkLookupContext;
use redirect_ebpf::decide::{Protocol, is_for_captured};
use redirect_ebpf::family::Ip;
use redirect_ebpf::maps::{HandedOver, ListenerKey, Tuple};
use redirect_ebpf::packet::{Segment, address_family};

use super::context::{End, addresses, word};
use super::listeners;
use super::sock_addr::protocol;
use super::socket::{NO_PORT, Socket};

/// One note for each processor: it lives from the TC hook to the socket lookup of the same packet, in the same softirq. Every
/// lookup of a listener in the pod runs our program, so that reading it has to be next to nothing.
#[map]
static HANDED_OVER: PerCpuArray<HandedOver> = PerCpuArray::with_max_entries(1, 0);

/// A note that no lookup followed (the kernel found the SYN to be an old duplicate) must not catch a later connection.
const LIFETIME: u64 = 100_000_000;

const ENOENT: i64 = -2;

/// Sends the connection to the proxy's listener by way of the socket lookup, or has it refused where there is none.
/// `namespace` is the cookie of the one where it listens, as far as the hook knows it.
#[inline(always)]
pub(super) fn hand_over<I: Ip>(
    segment: &Segment<I::Address>,
    namespace: Option<u64>,
    port: u16,
    listener: Option<&Socket>,
) -> Result<(), i64> {
    let netns_cookie = match (namespace, listener) {
        (Some(netns_cookie), _) => netns_cookie,
        (None, Some(listener)) => listeners::namespace(listener).ok_or(ENOENT)?,
        // Nobody has it: the lookup finds no listener, as is wanted.
        (None, None) => 0,
    };
    let key = ListenerKey { netns_cookie, port, slot: 0, family: address_family(I::FAMILY).into() };
    if let Some(listener) = listener {
        listeners::remember(&key, listener)?;
    }
    let tuple = segment.tuple::<I>();
    // SAFETY: the helper has no preconditions.
    let time = unsafe { bpf_ktime_get_coarse_ns() };
    let note = HANDED_OVER.get_ptr_mut(0).ok_or(ENOENT)?;
    // SAFETY: the pointer is valid, and nobody else writes on this processor meanwhile.
    unsafe { *note = HandedOver { listener: key, time, tuple, padding: [0; 4] } };
    Ok(())
}

#[sk_lookup]
pub(crate) fn listener_lookup(ctx: SkLookupContext) -> u32 {
    let Some(listener) = handed_over(ctx.lookup) else { return sk_action::SK_PASS };
    match listeners::choose(&ctx, listener) {
        Ok(()) => sk_action::SK_PASS,
        // No listener, or it has gone in between: the kernel refuses the connection, and nobody else gets it.
        Err(()) => sk_action::SK_DROP,
    }
}

/// Takes the note about the connection, if there is one. A time of zero: there is none.
#[inline(always)]
fn handed_over(lookup: *const bpf_sk_lookup) -> Option<ListenerKey> {
    let note = HANDED_OVER.get_ptr_mut(0)?;
    // SAFETY: the pointer is valid, and nobody else writes on this processor meanwhile.
    let time = unsafe { (*note).time };
    if time == 0 {
        return None;
    }
    // SAFETY: as above.
    let HandedOver { tuple: noted, listener, .. } = unsafe { *note };
    if noted != tuple(lookup) {
        return None;
    }
    // SAFETY: as above.
    unsafe { (*note).time = 0 };
    // SAFETY: the helper has no preconditions.
    (unsafe { bpf_ktime_get_coarse_ns() }.wrapping_sub(time) <= LIFETIME).then_some(listener)
}

/// Refuses a connection to a listener that takes captured ones only; what [`listener_lookup`] gives to it gets there, for the
/// kernel prefers a program that chose a socket. The programs that capture ask for it themselves, and without a source port.
#[sk_lookup]
pub(crate) fn listener_guard(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup.cast_const();
    let tcp = || protocol(word(lookup, offset_of!(bpf_sk_lookup, protocol))) == Some(Protocol::Tcp);
    let refused = is_for_captured(local_port(lookup)) && remote_port(lookup) != NO_PORT && tcp();
    if refused { sk_action::SK_DROP } else { sk_action::SK_PASS }
}

/// In host order.
#[inline(always)]
fn local_port(lookup: *const bpf_sk_lookup) -> u16 {
    word(lookup, offset_of!(bpf_sk_lookup, local_port)) as u16
}

/// In network order.
#[inline(always)]
fn remote_port(lookup: *const bpf_sk_lookup) -> [u8; 2] {
    // SAFETY: every sk_lookup context has `remote_port`.
    unsafe { (&raw const (*lookup).remote_port).read_volatile() }.to_ne_bytes()
}

#[inline(always)]
fn tuple(lookup: *const bpf_sk_lookup) -> Tuple {
    const FAMILY: usize = offset_of!(bpf_sk_lookup, family);
    const LOCAL: End =
        End { ipv4: offset_of!(bpf_sk_lookup, local_ip4), ipv6: offset_of!(bpf_sk_lookup, local_ip6) };
    const REMOTE: End =
        End { ipv4: offset_of!(bpf_sk_lookup, remote_ip4), ipv6: offset_of!(bpf_sk_lookup, remote_ip6) };
    let [source, destination] = addresses(lookup, FAMILY, [REMOTE, LOCAL]);
    let (source_port, destination_port) = (remote_port(lookup), local_port(lookup).to_be_bytes());
    Tuple { source, destination, source_port, destination_port }
}
