//! Events of single connections, while a monitor is attached.
//!
//! | map | type | value |
//! |---|---|---|
//! | `FLOWS` | ring buffer | [`Flow`] |
//! | `FLOW_LIMITS` | array of one | [`FlowLimits`] |
//! | `FLOW_STATE` | per-CPU array of one | [`FlowState`] |
//! | `COOKIES` | socket storage | `u64`, the socket's cookie, for the packet that opens its connection |

use core::mem::size_of;

use crate::maps::Tuple;

/// A decision on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// Time, in nanoseconds of `bpf_ktime_get_ns`.
    pub time: u64,
    /// Cookie of the pod's network namespace; zero if the kernel side does not know the pod.
    pub netns_cookie: u64,
    /// Cookie of the pod's own socket; zero where there is none yet.
    pub socket_cookie: u64,
    /// Its addresses and ports: unspecified and zero where the hook does not see them.
    pub tuple: Tuple,
    /// [`crate::Family`] as a number.
    pub family: u8,
    /// [`crate::Direction`] as a number.
    pub direction: u8,
    /// [`crate::Verdict`] as a number.
    pub verdict: u8,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
}

/// Limits on events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowLimits {
    /// Report 1 in N connections. Zero counts as one.
    pub one_of: u32,
    /// Events per second and CPU.
    pub rate: u32,
}

/// The state of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FlowState {
    /// Start of the current second, in nanoseconds of `bpf_ktime_get_ns`.
    pub second: u64,
    /// Events lost to the limit.
    pub limited: u64,
    /// Events lost because the ring buffer was full.
    pub full: u64,
    /// Connections seen, for sampling.
    pub seen: u32,
    /// Events in the current second.
    pub events: u32,
}

impl FlowState {
    const SECOND: u64 = 1_000_000_000;

    /// Whether to report another connection.
    #[inline(always)]
    pub fn admit(&mut self, limits: FlowLimits, now: u64) -> bool {
        self.seen = self.seen.wrapping_add(1);
        if limits.one_of > 1 && !self.seen.is_multiple_of(limits.one_of) {
            return false;
        }
        if now.wrapping_sub(self.second) >= Self::SECOND {
            self.second = now;
            self.events = 0;
        }
        if self.events >= limits.rate {
            self.limited += 1;
            return false;
        }
        self.events += 1;
        true
    }
}

const _: () = {
    assert!(size_of::<Flow>() == 64 && size_of::<FlowLimits>() == 8 && size_of::<FlowState>() == 32);
};

#[cfg(feature = "user")]
mod user {
    use super::{FlowLimits, FlowState};

    // SAFETY: `repr(C)`, integers only, no padding (sizes asserted above), every bit pattern is valid.
    unsafe impl aya::Pod for FlowLimits {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowState {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_events_in_a_second_than_the_limit() {
        let limits = FlowLimits { one_of: 1, rate: 3 };
        let mut state = FlowState::default();
        let admitted = |state: &mut FlowState, now| (0..5).filter(|_| state.admit(limits, now)).count();
        assert_eq!(admitted(&mut state, 7 * FlowState::SECOND), 3);
        assert_eq!(admitted(&mut state, 8 * FlowState::SECOND - 1), 0);
        assert_eq!(admitted(&mut state, 8 * FlowState::SECOND), 3);
        assert_eq!(state.limited, 9);
    }

    #[test]
    fn one_of_so_many_is_told_and_the_others_are_not_lost() {
        for (one_of, expected) in [(0, 12), (1, 12), (3, 4), (5, 2), (13, 0)] {
            let mut state = FlowState::default();
            let limits = FlowLimits { one_of, rate: 100 };
            let told = (0..12).filter(|_| state.admit(limits, FlowState::SECOND)).count();
            assert_eq!((told, state.limited), (expected, 0), "one of {one_of}");
        }
    }
}
