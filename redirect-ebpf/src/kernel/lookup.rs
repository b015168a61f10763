//! The sk_lookup programs of each enrolled pod and, in placement `node`, of the host. Every lookup of a TCP listener runs them,
//! whatever way the connection came in. The kernel runs both, and prefers one that chooses a socket.
//!
//! [`noted_listener`] gives the proxy the connections that TC can't assign. One case is a SYN whose tuple is still in TIME_WAIT,
//! because the proxy closed first and the client reuses its port. Only the kernel can retire the TIME_WAIT socket. It then looks
//! for a listener by address and port, and would find the application's, or none. So TC notes the connection's target
//! ([`notes`]), and the lookup reads the note.
//!
//! [`listener_guard`] is the gate. In a pod, a connection reaches a listener only if it was captured, if a TC program let it pass
//! (exemptions, deliveries of the proxy), or if it is between sockets of the pod. The gate stops connections that TC programs did
//! not see or took for something else. It also keeps uncaptured connections away from the listeners for captured ones: the proxy
//! would dial the same address and port again, in a loop.

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

/// Whether the programs are attached to pods' namespaces. On the host's, which has listeners of its own, nothing is authorized.
#[unsafe(no_mangle)]
static LOOKUP_IN_PODS: Global<bool> = Global::new(true);

/// Whether the programs are for pods' namespaces.
#[inline(always)]
pub(super) fn is_in_pods() -> bool {
    LOOKUP_IN_PODS.load()
}

const ENOENT: i64 = -2;

/// Makes the socket lookup give the connection to the proxy's listener.
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
    // SAFETY: as above. A concurrent write concerns the same connection.
    let listener = unsafe { (*note).listener };
    match listeners::choose(&ctx, listener) {
        Ok(()) => {
            count_once(&tuple, note);
            sk_action::SK_PASS
        }
        // The listener is missing or has just closed: the kernel refuses the connection, and no other listener gets it.
        Err(()) => sk_action::SK_DROP,
    }
}

/// Counts a captured connection when the proxy gets it.
#[inline(always)]
fn count_once(tuple: &Tuple, note: *mut Note) {
    // SAFETY: the pointer is to an entry, and its bytes are valid even with concurrent writes.
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
    // This is a capturing program's own lookup of a proxy's listener.
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
        // `noted_listener` gives it to the proxy's listener, or refuses it.
        return sk_action::SK_PASS;
    }
    if !is_for_captured(port)
        && (verdict == NoteVerdict::AUTHORIZED || is_within_pod(&tuple, lookup) || is_released(&tuple))
    {
        return sk_action::SK_PASS;
    }
    // An expired note belongs to a connection that was let in: segments after its end open none.
    if note.is_none() && !is_for_captured(port) && !notes::is_asked() {
        refused(&tuple);
    }
    sk_action::SK_DROP
}

/// Whether the pod leaves the mesh: its programs may be gone, and write no notes.
#[inline(always)]
fn is_released(tuple: &Tuple) -> bool {
    let flags = pods::owner(&tuple.destination).and_then(pods::flags);
    flags.is_some_and(|flags| flags.contains(PodFlags::RELEASED))
}

/// Counts a connection that reached the gate without being seen at an interface. A connection that was captured on its way out of
/// the pod and found no listener was counted there.
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

/// Whether this is the source address of our own lookups. A packet can have it only on `lo`, from a raw socket of the pod.
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
