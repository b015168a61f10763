//! What a build costs, and what it may cost.

use std::fmt;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Processor time from a clone to the end of a build, on a machine where nothing of it is installed or built. CONTRIBUTING.md
/// has the same figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// The programs that are shipped, and the demo.
    Programs,
    /// The tests, besides.
    Tests,
}

impl Budget {
    pub(crate) const fn seconds(self) -> u64 {
        match self {
            Self::Programs => 500,
            Self::Tests => 850,
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Programs => "from a clone to the programs",
            Self::Tests => "from a clone to the tests",
        })
    }
}

/// Prints what it cost until now: cargo becomes this process, so that the build of this very task is in it.
pub(crate) fn say_cost(budget: Budget) {
    let usage = |who| {
        let usage = getrusage(who).ok()?;
        let time = usage.user_time().num_milliseconds() + usage.system_time().num_milliseconds();
        Some((Duration::from_millis(time.unsigned_abs()), usage.max_rss() / 1024))
    };
    let (Some((ours, _)), Some((children, largest))) =
        (usage(UsageWho::RUSAGE_SELF), usage(UsageWho::RUSAGE_CHILDREN))
    else {
        return;
    };
    super::say(&format!(
        "processor time so far: {:.0} s (budget {budget}: {} s); largest process: {largest} MiB",
        (ours + children).as_secs_f32(),
        budget.seconds()
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contributors_read_the_same_budget() {
        let text = include_str!("../../../CONTRIBUTING.md");
        for budget in [Budget::Programs, Budget::Tests] {
            let figure = format!("{} s", budget.seconds());
            assert!(text.contains(&figure) && text.contains(&budget.to_string()), "{budget}: {figure}");
        }
    }
}
