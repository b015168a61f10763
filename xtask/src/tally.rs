//! Adds up the reports of one `cargo test`'s binaries: the output of libtest and of libtest-mimic, which looks the
//! same.

use std::collections::BTreeMap;
use std::fmt;

use crate::vm::table::{Boot, Outcome};

/// cargo's name of their binary.
const END_TO_END: &str = "tests/e2e/";

/// The sum over all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
    /// Tests that failed, and binaries that died before they reported.
    pub(crate) failures: Vec<String>,
    /// Those of them that are end-to-end tests.
    pub(crate) end_to_end: Vec<String>,
    /// Tests that failed among others, and passed alone.
    pub(crate) unstable: Vec<String>,
    /// Their output.
    pub(crate) details: Vec<String>,
    /// Name and reason of each skipped test.
    pub(crate) skips: Vec<(String, String)>,
    /// The binary that is running.
    current: Option<Binary>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Binary {
    name: String,
    reported: bool,
    /// Whether it is printing why tests failed.
    explaining: bool,
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Reasons of the tests that the binary calls ignored.
    ignored_reasons: BTreeMap<String, String>,
    /// Reasons of the tests that printed `skipped: <name>: <reason>`.
    said: BTreeMap<String, String>,
}

impl Tally {
    /// Processes one line of output.
    pub(crate) fn line(&mut self, line: &str) {
        let line = without_colours(line);
        if let Some(name) = header(&line) {
            self.close();
            self.current = Some(Binary { name: name.to_owned(), ..Binary::default() });
            return;
        }
        let Some(binary) = &mut self.current else { return };
        if line == "failures:" {
            binary.explaining = true;
        } else if let Some([passed, failed, ignored]) = result(&line) {
            (binary.reported, binary.explaining) = (true, false);
            binary.passed += passed;
            binary.failed += failed;
            binary.ignored += ignored;
        } else if let Some((name, reason)) = said_skipped(&line) {
            binary.said.insert(name.to_owned(), reason.to_owned());
        } else if let Some((name, outcome)) = single(&line) {
            if outcome == "FAILED" {
                self.failures.push(name.to_owned());
                if binary.name.starts_with(END_TO_END) {
                    self.end_to_end.push(name.to_owned());
                }
            } else if let Some(reason) = outcome.strip_prefix("ignored") {
                let reason = reason.trim_matches([',', ' ', '(', ')']);
                binary.ignored_reasons.insert(name.to_owned(), reason.to_owned());
            }
        } else if binary.explaining {
            self.details.push(line);
        }
    }

    /// Processes the end of the output, and whether cargo succeeded.
    pub(crate) fn finish(&mut self, succeeded: bool) {
        self.close();
        if !succeeded && self.failed == 0 {
            self.failed = 1;
            self.failures.push("cargo test itself".to_owned());
        }
    }

    /// Adds the results of a boot of another kernel.
    pub(crate) fn boot(&mut self, boot: &Boot) {
        let counts = boot.counts();
        self.passed += counts.passed;
        self.failed += counts.failed;
        self.skipped += counts.skipped;
        for (test, outcome) in &boot.tests {
            let name = format!("{test} on {}", boot.name);
            match outcome {
                Outcome::Passed => {}
                Outcome::Failed => self.failures.push(name),
                Outcome::Skipped(reason) => self.skips.push((name, reason.clone())),
            }
        }
        self.unstable.extend(boot.unstable.iter().map(|test| format!("{test} on {}", boot.name)));
        self.details.extend(boot.details.iter().map(|line| format!("{} | {line}", boot.name)));
    }

    /// Records that a failed test has passed alone.
    pub(crate) fn passed_alone(&mut self, name: &str) {
        self.failures.retain(|failure| failure != name);
        self.failed -= 1;
        self.passed += 1;
        self.unstable.push(name.to_owned());
    }

    pub(crate) fn is_success(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    fn close(&mut self) {
        let Some(mut binary) = self.current.take() else { return };
        // A test that returns early because it can't run counts as passed for libtest, but not here.
        let returned_early =
            binary.said.keys().filter(|name| !binary.ignored_reasons.contains_key(*name)).count();
        let returned_early = returned_early.min(binary.passed);
        self.passed += binary.passed - returned_early;
        self.failed += binary.failed;
        self.skipped += binary.ignored + returned_early;
        binary.ignored_reasons.extend(binary.said);
        self.skips.extend(binary.ignored_reasons);
        if !binary.reported {
            self.failed += 1;
            self.failures.push(format!("{} died before it reported", binary.name));
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        if !self.unstable.is_empty() {
            write!(f, ", {} unstable", self.unstable.len())?;
        }
        Ok(())
    }
}

/// cargo's line before it runs a test binary: `Running tests/capture.rs (target/debug/deps/capture-0123)`.
fn header(line: &str) -> Option<&str> {
    let line = line.trim();
    match line.strip_prefix("Running ") {
        Some(binary) => (binary.contains("/deps/") && binary.ends_with(')')).then_some(binary),
        None => line.starts_with("Doc-tests ").then_some(line),
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn result(line: &str) -> Option<[usize; 3]> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        numbers.split("; ").find_map(|field| field.strip_suffix(what)?.strip_suffix(' ')?.parse().ok())
    };
    Some([number("passed")?, number("failed")?, number("ignored")?])
}

/// `skipped: <name>: <reason>`, alone or after `test <name> ... `, where a single-threaded libtest leaves the cursor.
fn said_skipped(line: &str) -> Option<(&str, &str)> {
    let said = line.strip_prefix("skipped: ").or_else(|| single(line)?.1.strip_prefix("skipped: "))?;
    said.split_once(": ")
}

/// `test <name> ... <outcome>`
pub(crate) fn single(line: &str) -> Option<(&str, &str)> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    Some((name.trim(), outcome.trim()))
}

fn without_colours(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\x1b[") {
        plain.push_str(before);
        rest = after.split_once(|c: char| c.is_ascii_alphabetic()).map_or("", |(_, rest)| rest);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: &str = "     Running unittests src/lib.rs (target/debug/deps/redirect_agent-0a)\n\nrunning 3 tests\n\
        test wire::tests::ends ... ok\n\
        test wire::tests::needs_ipv6 ... ignored, no IPv6 here\n\
        test wire::tests::starts ... ok\n\n\
        test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
    const MIMIC: &str = "     Running tests/capture.rs (/x/target/debug/deps/capture-0b)\n\nrunning 3 tests\n\
        skipped: dns::udp: kernel 6.1 lacks it\n\
        test dns::udp  ... ignored (kernel 6.1 lacks it)\n\
        test capture::v4 ... FAILED\n\
        test capture::v6 ... ok\n\n\
        failures:\n\n---- capture::v4 ----\nno answer\n\nfailures:\n    capture::v4\n\n\
        test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 2.50s\n";
    const CRASH: &str = "     Running tests/hooks.rs (target/debug/deps/hooks-0c)\n\nrunning 3 tests\n\
        error: test failed, to rerun pass `-p redirect-tests --test hooks`\n";
    const EARLY: &str = "     Running tests/probe.rs (target/debug/deps/probe-0d)\nrunning 2 tests\n\
        test probe::v6 ... skipped: probe::v6: no IPv6 here\nok\ntest probe::v4 ... ok\ntest probe::slow ... ignored\n\
        test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
    const DOC: &str = "   Doc-tests redirect_agent\n\nrunning 1 test\ntest src/lib.rs - x (line 1) ... ok\n\n\
        test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n\n\
        all doctests ran in 0.20s; merged doctests compilation took 0.10s\n";

    fn tally(outputs: &[&str], succeeded: bool) -> Tally {
        let mut tally = Tally::default();
        for line in outputs.iter().flat_map(|output| output.lines()) {
            tally.line(line);
        }
        tally.finish(succeeded);
        tally
    }

    #[test]
    fn results_are_added_up() {
        let cases: [(&[&str], bool, &str, &[&str]); 8] = [
            (&[], true, "0 passed, 0 failed", &[]),
            (&[], false, "0 passed, 1 failed", &["cargo test itself"]),
            (&[UNIT], true, "2 passed, 0 failed, 1 skipped", &[]),
            (&[DOC], true, "1 passed, 0 failed", &[]),
            (&[MIMIC], false, "1 passed, 1 failed, 1 skipped", &["capture::v4"]),
            (&[EARLY], true, "1 passed, 0 failed, 2 skipped", &[]),
            (
                &[CRASH, UNIT],
                false,
                "2 passed, 1 failed, 1 skipped",
                &["tests/hooks.rs (target/debug/deps/hooks-0c) died before it reported"],
            ),
            (&[UNIT, MIMIC, EARLY, DOC], false, "5 passed, 1 failed, 4 skipped", &["capture::v4"]),
        ];
        for (outputs, succeeded, line, failures) in cases {
            let tally = tally(outputs, succeeded);
            assert_eq!(tally.to_string(), line);
            assert_eq!(tally.failures, failures, "{line}");
        }
    }

    #[test]
    fn what_passes_alone_is_counted_and_named() {
        let end_to_end = MIMIC.replace("tests/capture.rs", "tests/e2e/main.rs");
        let mut both = tally(&[&end_to_end, UNIT], false);
        assert_eq!(both.end_to_end, ["capture::v4"]);
        assert_eq!(tally(&[MIMIC], false).end_to_end, [""; 0]);
        both.passed_alone("capture::v4");
        assert!(both.is_success());
        assert_eq!(both.to_string(), "4 passed, 0 failed, 2 skipped, 1 unstable");
        assert_eq!((both.unstable, both.failures), (vec!["capture::v4".to_owned()], vec![]));
    }

    #[test]
    fn what_failed_is_explained() {
        let tally = tally(&[UNIT, MIMIC, DOC], false);
        assert_eq!(tally.details, ["", "---- capture::v4 ----", "no answer", "", "    capture::v4", ""]);
    }

    #[test]
    fn skipped_tests_keep_their_reasons() {
        let tally = tally(&[UNIT, MIMIC, EARLY], false);
        let skips: Vec<_> =
            tally.skips.iter().map(|(name, reason)| (name.as_str(), reason.as_str())).collect();
        let expected = [
            ("wire::tests::needs_ipv6", "no IPv6 here"),
            ("dns::udp", "kernel 6.1 lacks it"),
            ("probe::slow", ""),
            ("probe::v6", "no IPv6 here"),
        ];
        assert_eq!(skips, expected);
    }

    #[test]
    fn nothing_run_is_no_success() {
        assert!(!tally(&[], true).is_success());
        assert!(tally(&[DOC], true).is_success());
        assert!(!tally(&[DOC], false).is_success());
    }

    #[test]
    fn colours_are_ignored() {
        assert_eq!(without_colours("\x1b[1m\x1b[92m     Running\x1b[0m x"), "     Running x");
        assert_eq!(without_colours("plain"), "plain");
    }
}
