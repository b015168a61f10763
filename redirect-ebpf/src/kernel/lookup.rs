//! sk_lookup of each enrolled pod, and in placement `node` of the host: every search for a TCP listener passes here, whatever way
//! the connection came in. Two programs, of which the kernel runs both; it prefers one that chooses a socket.
//!
//! [`noted_listener`] gives to the proxy what TC can't give to it itself. That is a SYN whose tuple is still in TIME_WAIT, as
//! happens when the proxy closed first and the client uses its port again: only the kernel can retire the TIME_WAIT socket,
//! and when it has, it looks for a listener by address and port and would find the application's, or none. So TC notes where
//! the connection is to go ([`notes`]), and the lookup reads it.
//!
//! [`listener_guard`] is the gate: in a pod a connection reaches a listener only if it was captured, if a TC program let it pass
//! (exemptions, deliveries of the proxy), or if it is between sockets of the pod. What no TC program has seen, or what was
//! something else when they saw it, ends here. It also keeps what was not captured off the listeners for captured
//! connections: from there a proxy would dial the same address and port again, and so on.

use core::mem::offset_of;

use aya_ebpf::Global;
use aya_ebpf::bindings::{bpf_sk_lookup, sk_action};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Protocol, is_for_captured, is_guarded};
use redirect_ebpf::family::{Address, Family, Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::{ListenerKey, Note, NoteVerdict, PodFlags, Tuple};
use redirect_ebpf::packet::{Segment, address_family};

use super::context::{End, addresses, word};
use super::counters::count;
use super::flows::About;
use super::listeners;
use super::notes::{self, CountedAs};
use super::pods::{self, PodIp as _};
use super::sock_addr::protocol;
use super::socket::{NO_PORT, Socket};

/// Whether the programs are on pods' namespaces: on the host's, which has listeners of its own, nothing is authorized.
#[unsafe(no_mangle)]
static LOOKUP_IN_PODS: Global<bool> = Global::new(true);

/// Whether the programs are for pods' namespaces.
#[inline(always)]
pub(super) fn is_in_pods() -> bool {
    LOOKUP_IN_PODS.load()
}

const ENOENT: i64 = -2;

/// Sends the connection to the proxy's listener by way of the socket lookup.
#[inline(always)]
pub(super) fn hand_over<I: Ip>(
    segment: &Segment<I::Address>,
    port: u16,
    listener: &Socket,
    counted: CountedAs,
) -> Result<(), i64> {
    let owner = listeners::owner(listener).ok_or(ENOENT)?;
    let key = ListenerKey { owner, port, slot: 0, family: address_family(I::FAMILY).into() };
    listeners::remember(&key, listener)?;
    notes::captured(&segment.tuple::<I>(), key, counted)
}

#[sk_lookup]
pub(crate) fn noted_listener(ctx: SkLookupContext) -> u32 {
    if !is_tcp(ctx.lookup) {
        return sk_action::SK_PASS;
    }
    let tuple = tuple(ctx.lookup);
    let Some(note) = notes::of(&tuple) else { return sk_action::SK_PASS };
    // SAFETY: the pointer is to an entry.
    match unsafe { notes::verdict(note) } {
        NoteVerdict::CAPTURED => {}
        NoteVerdict::REFUSED => return sk_action::SK_DROP,
        _ => return sk_action::SK_PASS,
    }
    // SAFETY: as above. What is written meanwhile is about the same connection.
    let listener = unsafe { (*note).listener };
    match listeners::choose(&ctx, listener) {
        Ok(()) => {
            count_once(&tuple, note);
            sk_action::SK_PASS
        }
        // No listener, or it has gone in between: the kernel refuses the connection, and nobody else gets it.
        Err(()) => sk_action::SK_DROP,
    }
}

/// Counts a captured connection where it is given to the proxy.
#[inline(always)]
fn count_once(tuple: &Tuple, note: *mut Note) {
    // SAFETY: the pointer is to an entry, and its bytes are valid whatever is written meanwhile.
    let Note { counted, direction, reason, socket_cookie, .. } = unsafe { *note };
    if counted != 0 || notes::is_asked() {
        return;
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*note).counted).write_volatile(1) };
    let (direction, pod) = if direction == Direction::Inbound as u8 {
        (Direction::Inbound, &tuple.destination)
    } else {
        (Direction::Outbound, &tuple.source)
    };
    let reason = match reason {
        number if number == Reason::TunnelPort as u8 => Reason::TunnelPort,
        number if number == Reason::Dns as u8 => Reason::Dns,
        _ => Reason::Enrolled,
    };
    count(family(tuple), direction, Verdict::Captured, reason, pods::owner(pod), || About {
        socket_cookie,
        tuple: *tuple,
    });
}

#[sk_lookup]
pub(crate) fn listener_guard(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup.cast_const();
    if !is_tcp(lookup) {
        return sk_action::SK_PASS;
    }
    let port = local_port(lookup);
    // The programs that capture ask for the proxy's listeners themselves.
    if is_guarded(Protocol::Tcp, port) && remote_port(lookup) == NO_PORT && is_nobody(&tuple(lookup).source) {
        return sk_action::SK_PASS;
    }
    if !is_in_pods() {
        return if is_for_captured(port) { sk_action::SK_DROP } else { sk_action::SK_PASS };
    }
    let tuple = tuple(lookup);
    let note = notes::of(&tuple);
    // SAFETY: the pointer is to an entry.
    let verdict = note.map_or(NoteVerdict::NONE, |note| unsafe { notes::verdict(note) });
    if verdict == NoteVerdict::CAPTURED {
        // The other program gives it to the proxy's listener, or refuses it.
        return sk_action::SK_PASS;
    }
    if !is_for_captured(port)
        && (verdict == NoteVerdict::AUTHORIZED || is_within_pod(&tuple, lookup) || is_released(&tuple))
    {
        return sk_action::SK_PASS;
    }
    // A note that counts no longer is of a connection that was let in: what comes after it has ended opens none.
    if note.is_none() && !is_for_captured(port) && !notes::is_asked() {
        refused(&tuple);
    }
    sk_action::SK_DROP
}

/// Whether the pod is captured no longer: its programs may be gone, and note nothing.
#[inline(always)]
fn is_released(tuple: &Tuple) -> bool {
    let flags = pods::owner(&tuple.destination).and_then(pods::flags);
    flags.is_some_and(|flags| flags.contains(PodFlags::RELEASED))
}

/// Counts what reached the gate without having been seen at an interface. What is captured on its way out of the pod and has
/// found no listener has been counted there.
#[inline(always)]
fn refused(tuple: &Tuple) {
    let Some(pod) = pods::owner(&tuple.destination) else { return };
    count(family(tuple), Direction::Inbound, Verdict::Dropped, Reason::Uncaptured, Some(pod), || About {
        socket_cookie: 0,
        tuple: *tuple,
    });
}

#[inline(always)]
fn is_within_pod(tuple: &Tuple, lookup: *const bpf_sk_lookup) -> bool {
    /// `lo` is the first device of every namespace.
    const LO: u32 = 1;
    let Tuple { source, destination, .. } = tuple;
    let from_lo = || word(lookup, offset_of!(bpf_sk_lookup, ingress_ifindex)) == LO;
    match (v4_mapped(*source), v4_mapped(*destination)) {
        (Some(source), Some(destination)) => {
            decide::is_within_pod::<Ipv4>(source, destination, from_lo, |address| Ipv4::owner(&address))
        }
        _ => decide::is_within_pod::<Ipv6>(*source, *destination, from_lo, |address| Ipv6::owner(&address)),
    }
}

/// Whether it is the source of our own questions. A packet has it at most on `lo`, from a raw socket of the pod.
#[inline(always)]
fn is_nobody(source: &[u8; 16]) -> bool {
    *source == Ipv4::widen(Address::NOBODY) || *source == Ipv6::widen(Address::NOBODY)
}

#[inline(always)]
fn family(tuple: &Tuple) -> Family {
    if v4_mapped(tuple.destination).is_some() { Family::Ipv4 } else { Family::Ipv6 }
}

#[inline(always)]
fn is_tcp(lookup: *const bpf_sk_lookup) -> bool {
    protocol(word(lookup, offset_of!(bpf_sk_lookup, protocol))) == Some(Protocol::Tcp)
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
