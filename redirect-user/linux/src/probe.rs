//! Probes for everything that the agent requires, by trying it, never by the kernel's version.

mod families;
mod kernel;
mod mounts;
mod privileges;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

pub use tiny::tc_may_keep_sockets;

/// The node's configuration that the probes check.
#[derive(Clone, Debug)]
pub struct Requirements {
    /// Root of the cgroup2 hierarchy; found among the mounts if not set.
    pub cgroup: Option<PathBuf>,
    /// Where the agent is to pin maps and links.
    pub pin_dir: PathBuf,
}

/// A group of checks.
type Group = fn(&Requirements) -> Vec<Check>;

/// The required groups.
const REQUIRED: [Group; 4] = [privileges::checks, mounts::checks, kernel::checks, families::checks];

/// A single check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its subject.
    pub check: String,
    /// Its result.
    pub state: State,
    /// Details of the result.
    pub detail: String,
    /// The remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Why the agent refuses to start, if it does.
    #[serde(skip)]
    cause: Option<Cause>,
}

/// Results, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Passed.
    Ok,
    /// The data path works, with the stated limitation.
    Warn,
    /// The data path does not work.
    Fail,
}

/// Why the agent refuses to start. The number is its exit code; `redirect uninstall` has 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The probe itself failed.
    Untried = 1,
    /// The kernel has no BTF.
    Btf = 4,
    /// No cgroup2 hierarchy.
    Cgroup = 5,
    /// No bpffs for the pins.
    Bpffs = 6,
    /// The kernel reported that it lacks a feature that the data path needs.
    Kernel = 7,
    /// Not root, or without the capabilities.
    Privileges = 8,
}

impl Check {
    /// A check that passed.
    pub fn ok(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { check: check.into(), state: State::Ok, detail: detail.into(), remedy: None, cause: None }
    }

    /// The data path works, with a limitation.
    pub fn warn(check: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Warn, remedy: Some(remedy.into()), ..Self::ok(check, detail) }
    }

    /// A failure that does not prevent the agent from starting.
    pub fn broken(check: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Fail, ..Self::warn(check, detail, remedy) }
    }

    /// A failure that prevents the agent from starting.
    pub fn fail(
        check: impl Into<String>,
        cause: Cause,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { state: State::Fail, cause: Some(cause), ..Self::warn(check, detail, remedy) }
    }
}

/// The agent can't run on this node.
#[derive(Debug, thiserror::Error)]
#[error("this node can't run the data path:\n{}", list(failed))]
pub struct Refusal {
    failed: Vec<Check>,
    cause: Cause,
}

impl Refusal {
    /// The agent's exit code: that of the first failure.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.cause as u8)
    }
}

fn list(failed: &[Check]) -> String {
    let line = |check: &Check| {
        let remedy = check.remedy.iter().map(|remedy| format!("\n    remedy: {remedy}"));
        format!("  {}: {}{}", check.check, check.detail, remedy.collect::<String>())
    };
    failed.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Checks all requirements of the agent. Blocks for a moment.
#[must_use]
pub fn examine(requirements: &Requirements) -> Vec<Check> {
    REQUIRED.iter().flat_map(|group| group(requirements)).collect()
}

/// Checks the agent's requirements, and logs problems that do not prevent it from running. Returns all checks.
pub fn require(requirements: &Requirements) -> Result<Vec<Check>, Refusal> {
    let (failed, fine): (Vec<_>, Vec<_>) =
        examine(requirements).into_iter().partition(|check| check.state == State::Fail);
    if let Some(cause) = failed.iter().find_map(|check| check.cause) {
        return Err(Refusal { failed, cause });
    }
    for check in fine.iter().filter(|check| check.state == State::Warn) {
        tracing::warn!(remedy = check.remedy, "{}: {}", check.check, check.detail);
    }
    Ok(fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_all_that_failed() {
        let failed = vec![
            Check::fail("BTF", Cause::Btf, "gone", "bring it"),
            Check::fail("cgroup2", Cause::Cgroup, "too", "mount"),
        ];
        let text = Refusal { failed, cause: Cause::Btf }.to_string();
        assert_eq!(
            text,
            "this node can't run the data path:\n  BTF: gone\n    remedy: bring it\n  cgroup2: too\n    remedy: mount"
        );
    }
}
