//! Ratios of arms with confidence intervals. Arms alternate within a round, so that what disturbs the machine disturbs both
//! sides of a round's ratio; the interval is Student's over the logarithms of the rounds' ratios.

use std::fmt;

use serde::Serialize;

/// An estimate and its confidence interval of 95 %.
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
        if low.is_finite() && high.is_finite() {
            write!(f, "{value:.2} ({low:.2}–{high:.2})")
        } else {
            write!(f, "{value:.2}")
        }
    }
}

impl Estimate {
    /// A number that is known without doubt.
    #[must_use]
    pub fn exact(value: f64) -> Self {
        Self { value, low: value, high: value }
    }

    /// The geometric mean of rounds. `None` without any, or where a value is not positive. The interval of a single value is
    /// unbounded.
    #[must_use]
    pub fn of(rounds: &[f64]) -> Option<Self> {
        if rounds.is_empty() || rounds.iter().any(|value| *value <= 0.0 || !value.is_finite()) {
            return None;
        }
        let logs: Vec<f64> = rounds.iter().map(|value| value.ln()).collect();
        let count = logs.len() as f64;
        let mean = logs.iter().sum::<f64>() / count;
        let half = if logs.len() == 1 {
            f64::INFINITY
        } else {
            let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (count - 1.0);
            student(logs.len() - 1) * (variance / count).sqrt()
        };
        Some(Self { value: mean.exp(), low: (mean - half).exp(), high: (mean + half).exp() })
    }

    /// The ratio of two arms, round by round.
    #[must_use]
    pub fn ratio(numerator: &[f64], denominator: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = numerator.iter().zip(denominator).map(|(a, b)| a / b).collect();
        Self::of(&ratios)
    }
}

/// The quantile of Student's distribution that leaves 2.5 % on either side.
fn student(degrees: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    let known = degrees.checked_sub(1).and_then(|place| TABLE.get(place));
    // Beyond the table, the expansion around the normal distribution's quantile.
    known.copied().unwrap_or_else(|| 1.960 + 2.372 / degrees as f64)
}

/// The value that a share of the sorted values does not exceed.
#[must_use]
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_student_s() {
        // Logarithms 0, 1, 2: mean 1, deviation 1, half width 4.303 / √3.
        let estimate = Estimate::of(&[1.0, 1f64.exp(), 2f64.exp()]).expect("an estimate");
        let half = 4.303 / 3f64.sqrt();
        for (found, wanted) in
            [(estimate.value, 1.0), (estimate.low, 1.0 - half), (estimate.high, 1.0 + half)]
        {
            assert!((found.ln() - wanted).abs() < 1e-9, "{estimate:?}");
        }
    }

    #[test]
    fn a_disturbance_of_a_whole_round_does_not_show_in_the_ratio() {
        let ratio = Estimate::ratio(&[2.0, 20.0, 4.0], &[1.0, 10.0, 2.0]).expect("a ratio");
        assert!((ratio.value - 2.0).abs() < 1e-12 && (ratio.high - ratio.low).abs() < 1e-12, "{ratio:?}");
    }

    #[test]
    fn what_is_no_number_gives_no_estimate() {
        for rounds in [&[][..], &[1.0, 0.0], &[f64::NAN], &[f64::INFINITY]] {
            assert_eq!(Estimate::of(rounds), None, "{rounds:?}");
        }
        assert_eq!(Estimate::of(&[3.0]).map(|estimate| estimate.high), Some(f64::INFINITY));
        assert_eq!(Estimate::exact(1.5).to_string(), "1.50 (1.50–1.50)");
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), Some(50.0));
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn more_rounds_narrow_the_interval() {
        assert!(student(1) > student(2) && student(30) > student(31) && student(1000) > 1.96);
    }
}
