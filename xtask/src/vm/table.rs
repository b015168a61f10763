//! The results on each kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::tally::single;

/// How many lines of output to keep for failed tests.
const DETAILS: usize = 60;

/// With more tests than this, groups are shown.
const ROWS: usize = 40;

/// The name for failures of the machine itself.
pub(crate) const BOOT: &str = "boot";

/// The results of one boot, or of two.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Boot {
    /// The user's name of the kernel, and its parameters.
    pub(crate) name: String,
    /// The kernel's own release name.
    pub(crate) release: String,
    pub(crate) seconds: f32,
    /// By name.
    pub(crate) tests: BTreeMap<String, Outcome>,
    /// Tests that failed, and passed in a machine of their own.
    pub(crate) unstable: Vec<String>,
    /// The output of failed tests.
    pub(crate) details: Vec<String>,
    #[serde(skip)]
    pub(crate) explaining: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Passed,
    Failed,
    Skipped(String),
}

/// The number of each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Counts {
    fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Self {
        let mut counts = Self::default();
        for outcome in outcomes {
            match outcome {
                Outcome::Passed => counts.passed += 1,
                Outcome::Failed => counts.failed += 1,
                Outcome::Skipped(_) => counts.skipped += 1,
            }
        }
        counts
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self { passed: 0, failed: 0, skipped: 0 } => f.pad("-"),
            Self { passed, failed: 0, skipped: 0 } => f.pad(&passed.to_string()),
            Self { passed, failed: 0, skipped } => f.pad(&format!("{passed}, {skipped} skipped")),
            Self { passed, failed, skipped: 0 } => f.pad(&format!("{passed}, {failed} FAILED")),
            Self { passed, failed, skipped } => {
                f.pad(&format!("{passed}, {failed} FAILED, {skipped} skipped"))
            }
        }
    }
}

impl Boot {
    /// Processes a line of the tests' output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some((test, outcome)) = single(line) {
            let outcome = match outcome {
                "ok" => Outcome::Passed,
                "FAILED" => Outcome::Failed,
                // The test's output contains the reason.
                other => Outcome::Skipped(other.trim_start_matches("ignored").trim().to_owned()),
            };
            self.tests.insert(test.to_owned(), outcome);
        } else if line == "failures:" {
            self.explaining = true;
        } else if line.starts_with("test result: ") {
            self.explaining = false;
        } else if self.explaining && self.details.len() < DETAILS {
            self.details.push(line.to_owned());
        }
    }

    /// Records that the machine itself failed.
    pub(crate) fn failed(&mut self, why: &str) {
        self.tests.insert(BOOT.into(), Outcome::Failed);
        self.details.extend(why.lines().map(str::to_owned));
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts::of(self.tests.values())
    }

    pub(crate) fn failures(&self) -> Vec<String> {
        let failed = self.tests.iter().filter(|(_, outcome)| **outcome == Outcome::Failed);
        failed.map(|(name, _)| name.clone()).collect()
    }

    /// Adds the repeated run of failed tests.
    pub(crate) fn run_again(&mut self, again: Self) {
        self.seconds += again.seconds;
        for name in self.failures() {
            let passed = match name.as_str() {
                BOOT => again.counts().failed == 0,
                test => again.tests.get(test) == Some(&Outcome::Passed),
            };
            if passed {
                self.tests.remove(&name);
                self.unstable.push(name);
            }
        }
        for (name, outcome) in again.tests {
            self.tests.entry(name).or_insert(outcome);
        }
    }

    fn of_group(&self, group: &str) -> String {
        let tests = self.tests.iter().filter(|(name, _)| group_of(name) == group);
        Counts::of(tests.map(|(_, outcome)| outcome)).to_string()
    }

    fn of_test(&self, test: &str) -> String {
        let word = match self.tests.get(test) {
            Some(Outcome::Passed) => "ok",
            Some(Outcome::Failed) => "FAILED",
            Some(Outcome::Skipped(_)) => "skipped",
            None => "-",
        };
        word.to_owned()
    }
}

/// Tests are grouped by the first part of their names.
fn group_of(name: &str) -> &str {
    name.split("::").next().unwrap_or(name)
}

/// One row per test, or per group if there are many; one column per boot.
pub(crate) fn table(boots: &[Boot]) -> String {
    let tests: BTreeSet<&str> = boots.iter().flat_map(|boot| boot.tests.keys().map(String::as_str)).collect();
    let mut rows: Vec<Vec<String>> = Vec::new();
    let row = |name: &str, cell: &dyn Fn(&Boot) -> String| -> Vec<String> {
        [name.to_owned()].into_iter().chain(boots.iter().map(cell)).collect()
    };
    rows.push(row("kernel", &|boot| boot.name.clone()));
    rows.push(row("", &|boot| boot.release.clone()));
    if tests.len() > ROWS {
        let groups: BTreeSet<&str> = tests.into_iter().map(group_of).collect();
        rows.extend(groups.into_iter().map(|group| row(group, &|boot| boot.of_group(group))));
    } else {
        rows.extend(tests.into_iter().map(|test| row(test, &|boot| boot.of_test(test))));
    }
    rows.push(row("all", &|boot| boot.counts().to_string()));
    rows.push(row("seconds", &|boot| format!("{:.0}", boot.seconds)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=boots.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(name: &str, tests: &[(&str, Outcome)]) -> Boot {
        Boot {
            name: name.into(),
            release: format!("{name}.0"),
            seconds: 2.0,
            tests: tests.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect(),
            ..Boot::default()
        }
    }

    #[test]
    fn tests_go_down_and_kernels_across() {
        let boots = [
            boot("6.1", &[("dns::v4", Outcome::Passed), ("dns::v6", Outcome::Failed)]),
            boot("7", &[("dns::v4", Outcome::Passed), ("tc::v4", Outcome::Skipped("no".into()))]),
        ];
        let expected = "kernel   6.1          7\n         6.1.0        7.0\ndns::v4  ok           ok\ndns::v6  FAILED       -\n\
                        tc::v4   -            skipped\nall      1, 1 FAILED  1, 1 skipped\nseconds  2            2";
        assert_eq!(table(&boots), expected);
    }

    #[test]
    fn what_passes_in_a_machine_of_its_own_is_called_unstable() {
        let mut first =
            boot("6.1", &[("a", Outcome::Passed), ("b", Outcome::Failed), ("c", Outcome::Failed)]);
        first.run_again(boot("6.1", &[("b", Outcome::Passed), ("c", Outcome::Failed)]));
        assert_eq!((first.failures(), &*first.unstable), (vec!["c".into()], &["b".to_owned()][..]));
        assert_eq!(first.counts(), Counts { passed: 2, failed: 1, skipped: 0 });

        let mut dead = boot("6.1", &[("a", Outcome::Passed), (BOOT, Outcome::Failed)]);
        dead.run_again(boot("6.1", &[("a", Outcome::Passed), ("b", Outcome::Passed)]));
        assert_eq!(dead.counts(), Counts { passed: 2, failed: 0, skipped: 0 });
        let mut dead = boot("6.1", &[(BOOT, Outcome::Failed)]);
        dead.run_again(boot("6.1", &[("a", Outcome::Passed), (BOOT, Outcome::Failed)]));
        assert_eq!(dead.failures(), [BOOT]);
    }

    #[test]
    fn many_tests_are_shown_by_groups() {
        let names: Vec<String> = (0..ROWS).map(|number| format!("dns::{number}")).collect();
        let mut tests: Vec<_> = names.iter().map(|name| (name.as_str(), Outcome::Passed)).collect();
        tests.push(("tc::v4", Outcome::Failed));
        let expected = "kernel   6.1\n         6.1.0\ndns      40\ntc       0, 1 FAILED\nall      40, 1 FAILED\nseconds  2";
        assert_eq!(table(&[boot("6.1", &tests)]), expected);
    }

    #[test]
    fn what_tests_print_is_taken_in() {
        let mut boot = Boot::default();
        for line in [
            "test dns::v4 ... ok",
            "test dns::v6 ... FAILED",
            "test tc::v4 ... ignored",
            "",
            "failures:",
            "---- dns::v6 ----",
            "no answer",
            "failures:",
            "    dns::v6",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.0s",
            "left over",
        ] {
            boot.line(line);
        }
        assert_eq!(boot.counts(), Counts { passed: 1, failed: 1, skipped: 1 });
        assert_eq!(boot.details, ["---- dns::v6 ----", "no answer", "    dns::v6"]);
        boot.failed("no end\nlast message");
        assert_eq!(boot.counts().failed, 2);
        assert_eq!(boot.details[3..], ["no end", "last message"]);
    }
}
