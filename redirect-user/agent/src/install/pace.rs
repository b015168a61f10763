//! Rate limit of repairs.

use std::time::{Duration, Instant};

/// Repairs in quick succession mean a conflict with another process; each one then waits longer than the last.
#[derive(Debug, Default)]
pub(super) struct Pace {
    last: Option<Instant>,
    /// The number of repairs in succession.
    row: u32,
}

impl Pace {
    const FIRST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(60);
    /// After a pause of this length, a repair starts a new succession.
    const QUIET: Duration = Duration::from_secs(180);

    /// Records a repair. Returns the number in succession.
    pub(super) fn repaired(&mut self, now: Instant) -> u32 {
        let follows = self.last.is_some_and(|last| now.duration_since(last) < Self::QUIET);
        self.row = if follows { self.row.saturating_add(1) } else { 1 };
        self.last = Some(now);
        self.row
    }

    /// How long the next repair has to wait. The first two don't wait: a primary CNI that starts writes more
    /// than once.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let Some(last) = self.last.filter(|_| self.row > 2) else { return Duration::ZERO };
        let pause = Self::FIRST.saturating_mul(1 << (self.row - 3).min(16)).min(Self::LONGEST);
        (last + pause).saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarrel_slows_down_and_is_forgotten() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut waits = Vec::new();
        let mut now = start;
        for row in 1..=10 {
            now += pace.wait(now);
            assert_eq!(pace.repaired(now), row);
            waits.push(pace.wait(now).as_secs());
        }
        assert_eq!(waits, [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]);

        now += Pace::QUIET;
        assert_eq!(pace.repaired(now), 1);
        assert_eq!(pace.wait(now), Duration::ZERO);
    }

    #[test]
    fn time_that_passes_counts() {
        let start = Instant::now();
        let mut pace = Pace::default();
        (0..4).for_each(|_| assert!(pace.repaired(start) > 0));
        assert_eq!(pace.wait(start), Duration::from_secs(2));
        assert_eq!(pace.wait(start + Duration::from_millis(500)), Duration::from_millis(1500));
        assert_eq!(pace.wait(start + Duration::from_secs(3)), Duration::ZERO);
    }
}
