//! The distribution's package manager.

use std::cell::Cell;
use std::collections::HashSet;
use std::process::Command;

use anyhow::{Context, Result};

use crate::progress::{self, Watch};
use crate::workspace::Workspace;

/// Refreshes its lists at most once.
pub(super) struct Apt<'a> {
    workspace: &'a Workspace,
    /// More options of apt.
    options: &'a [String],
    refreshed: Cell<bool>,
}

impl<'a> Apt<'a> {
    pub(super) fn new(workspace: &'a Workspace, options: &'a [String]) -> Self {
        Self { workspace, options, refreshed: Cell::new(false) }
    }

    /// Fetches the package lists unless that was done before. Returns whether it did.
    pub(super) fn refresh(&self) -> bool {
        if self.refreshed.replace(true) {
            return false;
        }
        // An unreachable source does not matter as long as the others have the packages.
        let mut update = self.apt_get(&["update"]);
        let updated =
            progress::watch(self.workspace, "refreshing apt's lists", "apt-update", &mut update, Watch::Apt);
        if let Err(error) = updated {
            progress::say(&format!("going on with the lists that there are: {error:#}"));
        }
        true
    }

    pub(super) fn install(&self, names: &[&str]) -> Result<()> {
        let mut install = self.apt_get(&INSTALL);
        install.args(names);
        let what = format!("installing {}", names.join(" "));
        progress::watch(self.workspace, &what, "apt-install", &mut install, Watch::Apt)
    }

    /// What prevents the installation of these, if anything.
    pub(super) fn simulate(&self, names: &[&str]) -> Result<Option<String>> {
        let mut simulation = self.apt_get(&INSTALL);
        let output = simulation.arg("--simulate").args(names).output().context("cannot run apt-get")?;
        if output.status.success() {
            return Ok(None);
        }
        let said = [output.stdout, output.stderr].concat();
        Ok(Some(complaint(&String::from_utf8_lossy(&said))))
    }

    /// Which of these are installed.
    pub(super) fn installed(&self, names: &[&str]) -> Result<HashSet<String>> {
        let mut query = self.workspace.command("dpkg-query");
        query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]).args(names);
        // Its exit code is 1 if it does not know one of the packages.
        let output = query.output().context("cannot run dpkg-query")?;
        Ok(parse_installed(&String::from_utf8_lossy(&output.stdout)))
    }

    pub(super) fn all_have_candidates(&self, names: &[&str]) -> Result<bool> {
        let mut policy = self.workspace.command("apt-cache");
        policy.arg("policy").args(with_flags(self.options)).args(names).env("LC_ALL", "C");
        let output = policy.output().context("cannot run apt-cache")?;
        let known = parse_candidates(&String::from_utf8_lossy(&output.stdout));
        Ok(names.iter().all(|name| known.contains(*name)))
    }

    fn apt_get(&self, arguments: &[&str]) -> Command {
        let mut command = self.workspace.command("apt-get");
        command.args(["-q", "-o", "DPkg::Lock::Timeout=120"]).args(with_flags(self.options)).args(arguments);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        command
    }
}

/// Options in the format of apt's programs.
pub(super) fn with_flags(options: &[String]) -> impl Iterator<Item = &str> {
    options.iter().flat_map(|option| ["-o", option.as_str()])
}

/// Never removes a package.
const INSTALL: [&str; 4] = ["install", "--yes", "--no-install-recommends", "--no-remove"];

/// The reason why apt can't install a package, from its output.
fn complaint(text: &str) -> String {
    const REASONS: [&str; 3] = ["Depends: ", "Conflicts: ", "Breaks: "];
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if let Some(heading) = lines.iter().position(|line| line.contains("packages will be REMOVED")) {
        let removed = lines.get(heading + 1).copied().unwrap_or_default();
        return format!("apt would remove {removed}");
    }
    let reason = lines.iter().find(|line| REASONS.iter().any(|word| line.contains(word)));
    let error = || lines.iter().find_map(|line| line.strip_prefix("E: "));
    let text = reason.copied().or_else(error).unwrap_or("apt refuses");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The installed packages, from lines `<package> <status>` of dpkg-query.
fn parse_installed(text: &str) -> HashSet<String> {
    text.lines().filter_map(|line| line.strip_suffix(" installed")).map(str::to_owned).collect()
}

/// The installable packages, from `apt-cache policy`.
fn parse_candidates(text: &str) -> HashSet<String> {
    let mut name = "";
    let mut known = HashSet::new();
    for line in text.lines() {
        if let Some(header) = line.strip_suffix(':').filter(|line| !line.starts_with(' ')) {
            name = header;
        } else if line.trim().strip_prefix("Candidate: ").is_some_and(|version| version != "(none)") {
            known.insert(name.to_owned());
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> HashSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn installed_packages_are_those_that_dpkg_calls_installed() {
        let cases: [(&str, &[&str]); 4] = [
            ("", &[]),
            ("bpftool installed\nzlib1g-dev installed\n", &["bpftool", "zlib1g-dev"]),
            ("bpftool config-files\ntcpdump not-installed\nethtool installed\n", &["ethtool"]),
            ("zlib1g-dev installed\nzlib1g-dev installed\n", &["zlib1g-dev"]),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_installed(text), set(expected), "{text}");
        }
    }

    #[test]
    fn the_reason_of_a_refusal_is_read_from_apt() {
        let unmet = "Reading package lists...\nThe following packages have unmet dependencies:\n qemu-system-x86 : Depends: \
                     qemu-system-common (>> 1:7.2) but it is not going to be installed\nE: Unable to correct problems, you \
                     have held broken packages.\n";
        let removal = "The following packages will be REMOVED:\n  qemu-utils\nE: Packages need to be removed but remove is \
                       disabled.\n";
        let cases = [
            (
                unmet,
                "qemu-system-x86 : Depends: qemu-system-common (>> 1:7.2) but it is not going to be installed",
            ),
            (removal, "apt would remove qemu-utils"),
            ("E: Unable to locate package x\n", "Unable to locate package x"),
            ("", "apt refuses"),
        ];
        for (text, expected) in cases {
            assert_eq!(complaint(text), expected, "{text}");
        }
    }

    #[test]
    fn candidates_are_packages_with_a_version() {
        let text = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n     \
                    1.96.0+dfsg1-1~deb12u2 500\n        500 http://deb.debian.org/debian-security main\nold:\n  \
                    Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(parse_candidates(text), set(&["rustc-web"]));
        assert_eq!(parse_candidates(""), set(&[]));
    }
}
