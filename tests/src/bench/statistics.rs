//! Ratios of arms with confidence intervals. The arms of a round follow each other within milliseconds, so a disturbance of
//! the machine affects both sides of a round's ratio. The estimate is the median of these ratios; its interval comes from
//! order statistics, which assume nothing about the distribution.

use std::fmt;

use serde::Serialize;

/// An estimate and its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The estimate.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { value, low, high } = self;
        if low.is_finite() && high.is_finite() && low < high {
            write!(f, "{value:.3} ({low:.3}–{high:.3})")
        } else {
            write!(f, "{value:.3}")
        }
    }
}

impl Estimate {
    /// A number that was counted, or measured once.
    #[must_use]
    pub fn exact(value: f64) -> Self {
        Self { value, low: value, high: value }
    }

    /// The median. `None` without values, or if one is not positive. With fewer than six values the interval is
    /// unbounded.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.iter().any(|value| *value <= 0.0 || !value.is_finite()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let (lower, upper) = (sorted.get(count.checked_sub(1)? / 2)?, sorted.get(count / 2)?);
        let interval =
            below(count).and_then(|outside| Some((*sorted.get(outside)?, *sorted.get(count - 1 - outside)?)));
        let (low, high) = interval.unwrap_or((f64::NEG_INFINITY, f64::INFINITY));
        Some(Self { value: (lower + upper) / 2.0, low, high })
    }

    /// The ratio of two arms, round by round.
    #[must_use]
    pub fn ratio(numerator: &[f64], denominator: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = numerator.iter().zip(denominator).map(|(a, b)| a / b).collect();
        Self::of(&ratios)
    }

    /// The quotient of two independent estimates.
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        let value = self.value / other.value;
        let distance = |own: f64, others: f64| (own / self.value).ln().hypot((others / other.value).ln());
        Self {
            value,
            low: value * (-distance(self.low, other.high)).exp(),
            high: value * distance(self.high, other.low).exp(),
        }
    }

    /// Half of the interval, as a share of the estimate.
    #[must_use]
    pub fn precision(&self) -> f64 {
        (self.high - self.low) / 2.0 / self.value
    }
}

/// How many of the smallest and of the largest values are outside the median's 95 % interval: as many as a binomial
/// variable exceeds with a probability of 97.5 %. `None` if even the extremes are within it.
fn below(count: usize) -> Option<usize> {
    // Beyond this, the normal approximation is used: powers of two would underflow.
    const EXACT: usize = 60;
    if count > EXACT {
        let count = count as f64;
        return Some(((count - 1.960 * count.sqrt()) / 2.0).floor() as usize);
    }
    let mut probability = 0.5_f64.powi(i32::try_from(count).ok()?);
    let (mut cumulated, mut outside) = (0.0, None);
    for rank in 0..count {
        cumulated += probability;
        if cumulated > 0.025 {
            return outside;
        }
        outside = Some(rank);
        probability *= (count - rank) as f64 / (rank + 1) as f64;
    }
    outside
}

/// The value that this share of the sorted values does not exceed.
#[must_use]
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_interval_is_that_of_order_statistics() {
        // From published tables: the rank of the interval's lower end, counted from one.
        for (count, rank) in [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (30, 10), (50, 18), (60, 22)] {
            assert_eq!(below(count), Some(rank - 1), "{count}");
        }
        assert!((0..6).all(|count| below(count).is_none()));
        // The approximation goes on where the exact ranks end.
        assert_eq!(below(61), Some(22));
        assert_eq!(below(1000), Some(469));
        let values: Vec<f64> = (1..=9).map(f64::from).collect();
        assert_eq!(Estimate::of(&values), Some(Estimate { value: 5.0, low: 2.0, high: 8.0 }));
        assert_eq!(Estimate::of(&[4.0, 1.0]).map(|estimate| estimate.value), Some(2.5));
    }

    #[test]
    fn a_disturbance_of_a_whole_round_does_not_show_in_the_ratio() {
        let (slow, fast): (Vec<f64>, Vec<f64>) =
            [1.0, 10.0, 2.0, 1.0, 7.0, 3.0].map(|base| (2.0 * base, base)).into_iter().unzip();
        assert_eq!(Estimate::ratio(&slow, &fast), Some(Estimate::exact(2.0)));
    }

    #[test]
    fn what_is_no_number_gives_no_estimate() {
        for rounds in [&[][..], &[1.0, 0.0], &[f64::NAN], &[f64::INFINITY]] {
            assert_eq!(Estimate::of(rounds), None, "{rounds:?}");
        }
        assert_eq!(Estimate::of(&[3.0]).map(|estimate| estimate.high), Some(f64::INFINITY));
        assert_eq!(Estimate::exact(1.5).to_string(), "1.500");
        assert_eq!(Estimate { value: 1.5, low: 1.4, high: 1.6 }.to_string(), "1.500 (1.400–1.600)");
    }

    #[test]
    fn quotients_add_their_doubts() {
        let estimate = |value: f64, half: f64| Estimate { value, low: value / half, high: value * half };
        let quotient = estimate(6.0, 3f64.exp()).over(estimate(2.0, 4f64.exp()));
        for (found, wanted) in
            [(quotient.value, 3.0), (quotient.low, 3.0 * (-5f64).exp()), (quotient.high, 3.0 * 5f64.exp())]
        {
            assert!((found / wanted - 1.0).abs() < 1e-9, "{quotient:?}");
        }
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), Some(50.0));
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    proptest! {
        /// The interval contains the true median in about 95 of 100 cases.
        #[test]
        fn the_interval_covers_as_often_as_it_says(seed in 0_u64..1_000_000) {
            let mut state = seed;
            let mut draw = || {
                // Knuth's linear congruential generator; skewed, as times are.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 11) as f64 / (1_u64 << 53) as f64;
                (3.0 * uniform).exp()
            };
            let median = 1.5_f64.exp();
            let covered = (0..400).filter(|_| {
                let values: Vec<f64> = (0..41).map(|_| draw()).collect();
                Estimate::of(&values).is_some_and(|found| found.low <= median && median <= found.high)
            });
            // Six deviations below the expected number.
            prop_assert!(covered.count() > 354);
        }
    }
}
