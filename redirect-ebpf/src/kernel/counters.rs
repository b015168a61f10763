//! Connections by family, direction, verdict and reason.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::COUNTERS, 0);

/// Counts one connection.
#[inline(always)]
pub(super) fn count(family: Family, direction: Direction, verdict: Verdict, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(count::index(family, direction, verdict, reason)) {
        // SAFETY: the map hands out a valid pointer into this CPU's array. A program may interrupt another one on the
        // same CPU between load and store; a count lost that way is tolerable, a bus lock on each connection is not.
        unsafe { *counter += 1 };
    }
}
