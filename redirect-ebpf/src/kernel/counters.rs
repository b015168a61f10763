//! Connections by family, direction, verdict and reason, on the node and of each pod; each is told of as well while somebody
//! listens ([`flows`]).

use core::arch::asm;

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, PerCpuArray};
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::PodCounters;

use super::flows::{self, About};

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::COUNTERS, 0);

/// The entries are the agent's, which sets the capacity as well (`--max-pods`).
#[map]
static POD_COUNTERS: HashMap<u64, PodCounters> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// What became of a connection.
#[derive(Clone, Copy)]
pub(super) struct What {
    pub(super) family: Family,
    pub(super) direction: Direction,
    pub(super) verdict: Verdict,
    pub(super) reason: Reason,
}

/// Counts one connection. `pod` is the cookie of the pod's network namespace, as far as the hook knows the pod; `about` tells
/// which connection it is.
#[inline(always)]
pub(super) fn count(
    family: Family,
    direction: Direction,
    verdict: Verdict,
    reason: Reason,
    pod: Option<u64>,
    about: impl FnOnce() -> About,
) {
    if let Some(counter) = COUNTERS.get_ptr_mut(count::index(family, direction, verdict, reason)) {
        // SAFETY: the map hands out a valid pointer into this CPU's array. A program may interrupt another one on the
        // same CPU between load and store; a count lost that way is tolerable, a bus lock on each connection is not.
        unsafe { *counter += 1 };
    }
    if let (Some(pod), Some(place)) = (pod, count::of_pod(family, direction, verdict, reason)) {
        count_for(pod, place);
    }
    if flows::are_wanted() {
        flows::tell(What { family, direction, verdict, reason }, pod.unwrap_or(0), &about());
    }
}

#[inline(always)]
fn count_for(pod: u64, place: usize) {
    let Some(counters) = POD_COUNTERS.get_ptr_mut(pod) else { return };
    if place >= count::OF_POD {
        return;
    }
    // SAFETY: the place is in the entry. Other CPUs add to it as well, also atomically, and the agent only reads it.
    unsafe {
        let counter = (&raw mut (*counters).connections).cast::<u64>().add(place);
        // core has no such instruction for this target.
        asm!("lock *(u64 *)({counter} + 0) += {one}", counter = in(reg) counter, one = in(reg) 1_u64);
    }
}
