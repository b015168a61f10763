//! Counts connections by family, direction, verdict and reason, for the node and for each pod, and reports each one while a
//! monitor is attached ([`flows`]).

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, PerCpuArray};
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::PodCounters;

use super::atomic::add;
use super::flows::{self, About, What};

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(count::COUNTERS, 0);

/// The agent creates the entries, and sets the capacity (`--max-pods`).
#[map]
static POD_COUNTERS: HashMap<u64, PodCounters> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// Counts one connection. `pod` is the cookie of the pod's network namespace, if the hook knows the pod; `about` identifies
/// the connection.
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
        // SAFETY: the map returns a valid pointer into this CPU's array. Another program on the same CPU may interrupt
        // between load and store: losing a count is acceptable, an atomic operation per connection is too expensive.
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
    // SAFETY: the counter is inside the entry. Other CPUs also add atomically, and the agent only reads.
    unsafe { add((&raw mut (*counters).connections).cast::<u64>().add(place), 1) };
}
