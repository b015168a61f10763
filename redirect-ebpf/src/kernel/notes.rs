//! Notes of the TC programs' decisions on connections, for the socket lookup: it alone sees how the kernel interprets a packet
//! ([`super::lookup`]).
//!
//! The key is the connection's addresses and ports. A slot per CPU would not do: the kernel runs TC for all packets of a batch
//! before the stack has the first of them. A lookup does not consume its note either, because SYN cookies cause two lookups for
//! one connection. Notes expire instead.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{LruHashMap, PerCpuArray};
use redirect_ebpf::count::{Direction, Reason};
use redirect_ebpf::maps::{ListenerKey, Note, NoteVerdict, Tuple};

use super::atomic::add;

/// A note is needed for the moment between TC and the lookup. Notes of earlier connections distinguish their remaining
/// packets from new ones.
#[map]
static NOTES: LruHashMap<Tuple, Note> = LruHashMap::with_max_entries(16_384, 0);

/// An empty note. Read only, and not on the stack.
static NOTHING: Note = Note {
    expires: 0,
    listener: ListenerKey { owner: 0, port: 0, slot: 0, family: 0 },
    socket_cookie: 0,
    verdict: NoteVerdict::NONE,
    direction: 0,
    reason: 0,
    counted: 0,
    padding: [0; 4],
};

/// The number of our own lookups in progress on this CPU, during which the programs of the socket lookup count nothing. It can
/// exceed one with `PREEMPT_RT`, where one task preempts another. No verdict depends on it.
#[map]
static ASKING: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The lookup follows the note at once. With SYN cookies there is a second one for the last ACK, which on `lo` follows just
/// as closely.
pub(super) const A_MOMENT: u64 = 1_000_000_000;

/// The same for connections over the network.
pub(super) const A_HANDSHAKE: u64 = 10_000_000_000;

/// How to count a connection when it arrives at its listener.
#[derive(Clone, Copy)]
pub(super) struct CountedAs {
    pub(super) socket_cookie: u64,
    pub(super) direction: Direction,
    pub(super) reason: Reason,
    /// Whether it was already counted.
    pub(super) already: bool,
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Notes that the connection goes to the proxy's listener.
#[inline(always)]
pub(super) fn captured(tuple: &Tuple, listener: ListenerKey, counted: CountedAs) -> Result<(), i64> {
    let note = blank(tuple)?;
    // SAFETY: the pointer is to an entry, of this connection alone.
    unsafe {
        (*note).listener = listener;
        (*note).socket_cookie = counted.socket_cookie;
        (*note).direction = counted.direction as u8;
        (*note).reason = counted.reason as u8;
        (*note).counted = counted.already.into();
        (*note).verdict = NoteVerdict::CAPTURED;
        (*note).expires = now() + A_MOMENT;
    }
    Ok(())
}

/// Writes another kind of note, valid for `lifetime` nanoseconds.
#[inline(always)]
pub(super) fn note(tuple: &Tuple, verdict: NoteVerdict, lifetime: u64) -> Result<(), i64> {
    let note = blank(tuple)?;
    // SAFETY: as above.
    unsafe {
        (*note).verdict = verdict;
        (*note).expires = now() + lifetime;
    }
    Ok(())
}

/// Replaces the note with an empty one. Written in place, because the programs' stacks have no room for it.
#[inline(always)]
fn blank(tuple: &Tuple) -> Result<*mut Note, i64> {
    const ENOENT: i64 = -2;
    let nothing = &NOTHING;
    NOTES.insert(tuple, nothing, BPF_ANY.into()).map_err(i64::from)?;
    NOTES.get_ptr_mut(tuple).ok_or(ENOENT)
}

/// The note on a connection, expired or not.
#[inline(always)]
pub(super) fn of(tuple: &Tuple) -> Option<*mut Note> {
    NOTES.get_ptr_mut(tuple)
}

/// Whether a note lets the connection in.
#[inline(always)]
pub(super) fn authorizes(tuple: &Tuple) -> bool {
    // SAFETY: the pointer is to an entry.
    of(tuple).is_some_and(|note| unsafe { verdict(note) } == NoteVerdict::AUTHORIZED)
}

/// A note's verdict, while the note is valid. Not an `Option`, because the compiler would merge the absent case with the present
/// one, which the verifier rejects.
///
/// # Safety
///
/// `note` is an entry of the map.
#[inline(always)]
pub(super) unsafe fn verdict(note: *const Note) -> NoteVerdict {
    // SAFETY: the caller passes an entry. A concurrent write to it concerns the same connection.
    let note = unsafe { &*note };
    if now() < note.expires { note.verdict } else { NoteVerdict::NONE }
}

/// Marks a lookup of our own while it lives.
pub(super) struct Asking(Option<*mut u64>);

impl Asking {
    #[inline(always)]
    pub(super) fn new() -> Self {
        let asking = ASKING.get_ptr_mut(0);
        if let Some(asking) = asking {
            // SAFETY: it is an entry.
            unsafe { add(asking, 1) };
        }
        Self(asking)
    }
}

impl Drop for Asking {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(asking) = self.0 {
            // SAFETY: as above.
            unsafe { add(asking, 1_u64.wrapping_neg()) };
        }
    }
}

/// Whether one of our own programs makes this lookup. With `PREEMPT_RT` a task may preempt another one in between,
/// and a connection may then be missing from the counters.
#[inline(always)]
pub(super) fn is_asked() -> bool {
    // SAFETY: the pointer is valid.
    ASKING.get_ptr(0).is_some_and(|asking| unsafe { asking.read_volatile() } != 0)
}
