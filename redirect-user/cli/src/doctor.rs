//! Checks whether this node can run the data path, by probing, never by the kernel's version.
//!
//! `redirect doctor` prints every [`Check`]; the agent refuses to start when one of [`redirect_linux::probe`] fails. One file
//! per further group of checks.

mod chain;
mod gates;
mod netfilter;
mod others;
mod placements;
mod programs;
mod shortcuts;
mod sysctls;

use std::path::PathBuf;

use redirect_linux::probe;
pub(crate) use redirect_linux::probe::{Cause, Check, State};

use redirect_agent::checkpoints::{self, Checkpoints, Found};
use redirect_agent::install;
use redirect_datapath::linux::{self, TcMethod};

/// What is asked of the node.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Requirements {
    /// Root of the cgroup2 hierarchy (default: the cgroup2 mount)
    #[arg(long, value_name = "DIRECTORY")]
    pub cgroup: Option<PathBuf>,
    /// Directory on a bpffs for the pins of maps and links
    #[arg(long, default_value = linux::DEFAULT_DIRECTORY, env = "REDIRECT_PIN_DIR", value_name = "DIRECTORY")]
    pub pin_dir: PathBuf,
    /// How to attach TC programs
    #[arg(long, value_enum, default_value_t)]
    pub tc: TcMethod,
    /// Directory of the checkpoints of enrolled pods
    #[arg(long, default_value = checkpoints::DEFAULT_DIRECTORY, env = "REDIRECT_STATE_DIR", value_name = "DIRECTORY")]
    pub state_dir: PathBuf,
    /// Where the node's CNI chain is.
    #[command(flatten)]
    pub chain: install::Directories,
}

/// A group of checks.
type Group = fn(&Requirements) -> Vec<Check>;

/// The further groups.
const FURTHER: [Group; 9] = [
    programs::checks,
    sysctls::checks,
    others::at_cgroup,
    others::on_devices,
    gates::check,
    shortcuts::check,
    placements::check,
    netfilter::checks,
    chain::checks,
];

/// All checks. Blocks for a moment.
#[must_use]
pub(crate) fn examine(requirements: &Requirements) -> Vec<Check> {
    let required =
        probe::Requirements { cgroup: requirements.cgroup.clone(), pin_dir: requirements.pin_dir.clone() };
    let mut checks = probe::examine(&required);
    checks.extend(FURTHER.iter().flat_map(|group| group(requirements)));
    checks
}

/// The pods that an agent captures on this node, with the namespaces that still exist.
fn enrolled(requirements: &Requirements) -> std::io::Result<Vec<Found>> {
    checkpoints::find(Checkpoints::at(&requirements.state_dir).read()?)
}

/// The worst state among them.
#[must_use]
pub(crate) fn verdict(checks: &[Check]) -> State {
    checks.iter().map(|check| check.state).max().unwrap_or(State::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_check_is_the_verdict() {
        let fine = Check::ok("a", "");
        let odd = Check::warn("b", "", "");
        let bad = Check::fail("c", Cause::Btf, "", "");
        assert_eq!(verdict(&[]), State::Ok);
        assert_eq!(verdict(&[fine.clone(), fine.clone()]), State::Ok);
        assert_eq!(verdict(&[odd.clone(), fine.clone()]), State::Warn);
        assert_eq!(verdict(&[fine, bad, odd]), State::Fail);
    }
}
