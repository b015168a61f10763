//! What TC programs decided on connections, for the socket lookup, which alone sees what the kernel makes of them
//! ([`super::lookup`]).
//!
//! Found by the connection's addresses and ports. A place for each processor would not do: the kernel runs TC for all packets of
//! a batch before the stack has the first of them. A note is not consumed by the lookup that finds it either: with SYN cookies
//! there are two for one connection. It counts for a time instead.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{LruHashMap, PerCpuArray};
use redirect_ebpf::count::{Direction, Reason};
use redirect_ebpf::maps::{ListenerKey, Note, NoteVerdict, Tuple};

use super::atomic::add;

/// Each is needed for the moment between the TC hook and the lookup; those of earlier connections tell what is left of them
/// from what opens new ones.
#[map]
static NOTES: LruHashMap<Tuple, Note> = LruHashMap::with_max_entries(16_384, 0);

/// A note that says nothing. Read only, and not on the stack.
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

/// How many lookups of our own programs run on this processor: the programs of the socket lookup count nothing then. More than
/// one with `PREEMPT_RT`, where a task takes the place of another in the middle. No verdict depends on it.
#[map]
static ASKING: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A note is followed by its lookup at once; with SYN cookies by the one for the last step of the handshake, which on `lo` is
/// as near.
pub(super) const A_MOMENT: u64 = 1_000_000_000;

/// The same from outside, over the network.
pub(super) const A_HANDSHAKE: u64 = 10_000_000_000;

/// What a connection counts as, once it is where it should be.
#[derive(Clone, Copy)]
pub(super) struct CountedAs {
    pub(super) socket_cookie: u64,
    pub(super) direction: Direction,
    pub(super) reason: Reason,
    /// It has been counted already.
    pub(super) already: bool,
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The connection goes to the proxy's listener.
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

/// A note of another kind, which counts for `lifetime` nanoseconds.
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

/// A note that says nothing yet, in the place of the one that there is. Written where it is: the programs' stacks have no room for it.
#[inline(always)]
fn blank(tuple: &Tuple) -> Result<*mut Note, i64> {
    const ENOENT: i64 = -2;
    let nothing = &NOTHING;
    NOTES.insert(tuple, nothing, BPF_ANY.into()).map_err(i64::from)?;
    NOTES.get_ptr_mut(tuple).ok_or(ENOENT)
}

/// The note on a connection, whether it still counts or not.
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

/// What a note says, as long as it counts. Not an option: the compiler would merge what is not there with what is, which the
/// verifier rejects.
///
/// # Safety
///
/// `note` is an entry of the map.
#[inline(always)]
pub(super) unsafe fn verdict(note: *const Note) -> NoteVerdict {
    // SAFETY: the caller passes an entry. What is seen of one that is written meanwhile is of this connection as well.
    let note = unsafe { &*note };
    if now() < note.expires { note.verdict } else { NoteVerdict::NONE }
}

/// A lookup of ours, as long as it lives.
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

/// Whether the lookup is one of our own programs. Where a task may take another's place on the processor in between
/// (`PREEMPT_RT`), a connection may be missing in the counters.
#[inline(always)]
pub(super) fn is_asked() -> bool {
    // SAFETY: the pointer is valid.
    ASKING.get_ptr(0).is_some_and(|asking| unsafe { asking.read_volatile() } != 0)
}
