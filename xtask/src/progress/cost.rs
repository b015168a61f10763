//! The CPU time of a build, and its budget.

use std::fmt;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// CPU time from a clone to the end of a build, on a machine without installed tools or builds. CONTRIBUTING.md has the same
/// figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// The shipped programs, and the demo.
    Programs,
    /// The same plus the tests.
    Tests,
}

impl Budget {
    pub(crate) const fn seconds(self) -> u64 {
        match self {
            Self::Programs => 440,
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

/// Prints the cost so far. cargo has replaced itself by this process, so the build of this task is included.
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
