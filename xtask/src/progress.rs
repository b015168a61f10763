//! The output of tasks: one line per step, with its progress and duration. Long output of commands goes to a log, whose end
//! is shown if the command fails.

mod cost;
mod line;
mod watch;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;
use line::Line;

pub(crate) use cost::{Budget, say_cost};
pub(crate) use watch::Watch;

/// How much of a failed command's log is shown.
const TAIL_LINES: usize = 60;

/// Prints a line. Progress goes to stderr: a task's result is the only thing on stdout.
pub(crate) fn say(line: &str) {
    // If stderr is closed, there is no reader anyway.
    let _ = writeln!(io::stderr(), "{line}");
}

/// Runs a step: prints its name, then its duration in seconds.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let line = Line::start(what);
    let result = work();
    line.end(result.is_ok());
    result
}

/// A step that runs one command, whose output goes to `target/xtask/<log>.log`.
pub(crate) fn run(workspace: &Workspace, what: &str, log: &str, command: &mut Command) -> Result<()> {
    watch(workspace, what, log, command, Watch::Clock)
}

/// The same for a command that reports its progress.
pub(crate) fn watch(
    workspace: &Workspace,
    what: &str,
    log: &str,
    command: &mut Command,
    watch: Watch,
) -> Result<()> {
    let log = workspace.target(format!("xtask/{log}.log"));
    let mut line = Line::start(what);
    let result = run_logged(&log, command, watch, &mut line);
    line.end(result.is_ok());
    result
}

fn run_logged(log: &Path, command: &mut Command, watch: Watch, line: &mut Line) -> Result<()> {
    let folder = log.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    writeln!(file, "{command:?}")?;
    let program = command.get_program().display().to_string();
    let status = watch
        .follow(command, &file, |state| line.show(state))
        .with_context(|| format!("cannot run {program}"))?;
    if status.success() {
        return Ok(());
    }
    let output = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let hint = remedy(&output).map(|remedy| format!("\nremedy: {remedy}")).unwrap_or_default();
    bail!("{program} failed ({status})\n{}\nall of it: {}{hint}", tail(&output), log.display());
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    shown.iter().map(|line| format!("  | {line}\n")).collect::<String>().trim_end().to_owned()
}

/// The remedy for a failure that a command's output identifies.
fn remedy(output: &str) -> Option<&'static str> {
    const KNOWN: [(&[&str], &str); 4] = [
        (
            &["Temporary failure resolving", "Failed to fetch", "Could not connect to"],
            "no network for apt: check the proxy (http_proxy, /etc/apt/apt.conf.d) or install the packages by hand",
        ),
        (
            &["Unable to locate package", "has no installation candidate"],
            "add Debian's security repository to apt's sources",
        ),
        (
            &[
                "Could not resolve host",
                "failed to download",
                "Unable to update registry",
                "spurious network error",
            ],
            "no network for cargo: check the proxy (https_proxy, CARGO_HTTP_PROXY) or run `cargo fetch` where there is one",
        ),
        (&["No space left on device"], "free some disk space; `cargo clean` helps"),
    ];
    let (_, remedy) = KNOWN.iter().find(|(signs, _)| signs.iter().any(|sign| output.contains(sign)))?;
    Some(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_are_found_in_the_output_of_commands() {
        let cases = [
            (
                "W: Failed to fetch http://deb.debian.org/x  Temporary failure resolving 'deb.debian.org'",
                "for apt",
            ),
            ("E: Unable to locate package rustc-web", "security repository"),
            ("error: failed to download from `https://index.crates.io/config.json`", "for cargo"),
            ("error: could not write: No space left on device (os error 28)", "disk space"),
        ];
        for (output, expected) in cases {
            assert!(remedy(output).is_some_and(|found| found.contains(expected)), "{output}");
        }
        assert_eq!(remedy("error[E0308]: mismatched types"), None);
    }

    #[test]
    fn the_tail_is_the_end() {
        let text: String = (0..100).map(|line| format!("{line}\n")).collect();
        assert_eq!(tail(&text).lines().count(), TAIL_LINES);
        assert!(tail(&text).ends_with("| 99"));
        assert_eq!(tail("one\ntwo\n"), "  | one\n  | two");
    }
}
