//! Connections by family, direction, verdict and reason; each is told of as well while somebody listens ([`flows`]).

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;

use super::flows::{self, About};

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::COUNTERS, 0);

/// What became of a connection.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) family: Family,
    pub(super) direction: Direction,
    pub(super) verdict: Verdict,
    pub(super) reason: Reason,
}

/// Counts one connection. `about` tells which one it is.
#[inline(always)]
pub(super) fn count(
    family: Family,
    direction: Direction,
    verdict: Verdict,
    reason: Reason,
    about: impl FnOnce() -> About,
) {
    if let Some(counter) = COUNTERS.get_ptr_mut(count::index(family, direction, verdict, reason)) {
        // SAFETY: the map hands out a valid pointer into this CPU's array. A program may interrupt another one on the
        // same CPU between load and store; a count lost that way is tolerable, a bus lock on each connection is not.
        unsafe { *counter += 1 };
    }
    if flows::are_wanted() {
        flows::tell(What { family, direction, verdict, reason }, &about());
    }
}
