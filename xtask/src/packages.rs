//! What comes from the distribution: looked for first, installed with apt where it is missing, named where there is
//! no apt.

use std::cell::Cell;
use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress;
use crate::workspace::{Workspace, which};

/// Something that a distribution provides.
pub(crate) struct Package {
    /// Its package in Debian.
    pub(crate) name: String,
    /// What shows that it is there, wherever it came from.
    pub(crate) evidence: Evidence,
    /// Why it is needed.
    pub(crate) reason: &'static str,
}

pub(crate) enum Evidence {
    /// A program in `PATH`.
    Program(&'static str),
    /// One of several files.
    File(&'static [&'static str]),
    /// Only the distribution knows.
    Installed,
}

impl Package {
    pub(crate) fn new(name: impl Into<String>, evidence: Evidence, reason: &'static str) -> Self {
        Self { name: name.into(), evidence, reason }
    }

    fn is_evident(&self) -> bool {
        match self.evidence {
            Evidence::Program(program) => which(program).is_some(),
            Evidence::File(paths) => paths.iter().any(|path| Path::new(path).exists()),
            Evidence::Installed => false,
        }
    }
}

/// What tests and demo run.
pub(crate) fn of_the_tests() -> Vec<Package> {
    const CNI: &[&str] = &["/usr/lib/cni/bridge", "/opt/cni/bin/bridge", "/usr/libexec/cni/bridge"];
    const FONT: &[&str] = &["/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"];
    const BUSYBOX: &[&str] = &["/bin/busybox", "/usr/bin/busybox"];
    vec![
        Package::new(
            "iproute2",
            Evidence::Program("ip"),
            "network namespaces, routes and rules of the tests",
        ),
        Package::new("nftables", Evidence::Program("nft"), "network address translation of the tests"),
        Package::new("bpftool", Evidence::Program("bpftool"), "tests list programs, links and maps with it"),
        Package::new(
            "containernetworking-plugins",
            Evidence::File(CNI),
            "the CNI chain of the end-to-end tests",
        ),
        Package::new("iptables", Evidence::Program("iptables-restore"), "the benchmark compares with it"),
        Package::new("nftables", Evidence::Program("nft"), "the benchmark compares with it"),
        Package::new("fonts-dejavu-core", Evidence::File(FONT), "the font of the benchmark's plots"),
        Package::new(
            "prometheus",
            Evidence::Program("promtool"),
            "tests check metrics and alerts with promtool",
        ),
        Package::new("bind9-dnsutils", Evidence::Program("dig"), "tests ask DNS servers with dig"),
        Package::new("ldnsutils", Evidence::Program("drill"), "tests ask DNS servers with drill"),
        Package::new("haproxy", Evidence::Program("haproxy"), "the node proxy of some tests"),
        Package::new("podman", Evidence::Program("podman"), "the DaemonSet's pod is run as a container"),
        Package::new("runc", Evidence::Program("runc"), "podman and containerd run containers with it"),
        Package::new("containerd", Evidence::Program("containerd"), "tests run containers with its ctr"),
        Package::new("busybox-static", Evidence::File(BUSYBOX), "the content of the tests' containers"),
        Package::new("systemd", Evidence::Program("systemd-analyze"), "tests have it verify units"),
        Package::new("shellcheck", Evidence::Program("shellcheck"), "lints the scripts in deploy"),
        Package::new(
            "musl-tools",
            Evidence::Program("musl-gcc"),
            "tests ask DNS servers with musl's resolver, in a program that they compile",
        ),
    ]
}

/// What runs tests on other kernels.
pub(crate) fn of_the_machines() -> Vec<Package> {
    const AUTHORITIES: &[&str] = &["/etc/ssl/certs/ca-certificates.crt"];
    let programs = [
        ("qemu-system-x86", "qemu-system-x86_64"),
        ("cpio", "cpio"),
        ("kmod", "modprobe"),
        ("xz-utils", "xz"),
        ("zstd", "zstd"),
        ("binutils", "strip"),
    ]
    .map(|(name, program)| (name, Evidence::Program(program)));
    programs
        .into_iter()
        .chain([("ca-certificates", Evidence::File(AUTHORITIES))])
        .map(|(name, evidence)| Package::new(name, evidence, "tests boot other kernels with it"))
        .collect()
}

/// The programs of these packages that are not there.
pub(crate) fn missing(wanted: &[Package]) -> Option<String> {
    let missing = wanted.iter().filter(|package| !package.is_evident()).map(|package| package.name.as_str());
    Some(missing.collect::<Vec<_>>().join(", ")).filter(|names| !names.is_empty())
}

/// The distribution's package manager, which refreshes its lists at most once.
pub(crate) struct Packages<'a> {
    workspace: &'a Workspace,
    refreshed: Cell<bool>,
}

impl<'a> Packages<'a> {
    pub(crate) fn new(workspace: &'a Workspace) -> Self {
        Self { workspace, refreshed: Cell::new(false) }
    }

    /// Sees to it that all of `wanted` is there.
    pub(crate) fn ensure(&self, wanted: &[Package]) -> Result<()> {
        let mut missing: Vec<&Package> = wanted.iter().filter(|package| !package.is_evident()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let installed = self.installed(&missing)?;
        missing.retain(|package| !installed.contains(&package.name));
        self.install(&missing)
    }

    /// Installs packages, or newer versions of them.
    pub(crate) fn install(&self, packages: &[&Package]) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        for package in packages {
            progress::say(&format!("missing: {} ({})", package.name, package.reason));
        }
        let names: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
        let by_hand = names.join(" ");
        if !self.has_apt() {
            bail!(
                "this is not a Debian: install what provides these Debian packages, then try again: {by_hand}"
            );
        }
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "not root, cannot install packages\nremedy: sudo apt-get install --no-install-recommends {by_hand}"
            );
        }
        if !self.all_have_candidates(&names)? {
            self.refresh();
        }
        let first = self.apt_install(&names);
        if first.is_err() && self.refresh() {
            progress::say("the lists of packages may have been stale: trying once more");
            return self.apt_install(&names);
        }
        first.with_context(|| format!("cannot install {by_hand}"))
    }

    pub(crate) fn has_apt(&self) -> bool {
        which("apt-get").is_some() && which("dpkg-query").is_some()
    }

    /// Fetches the lists of packages unless that was done before, and says whether it did.
    pub(crate) fn refresh(&self) -> bool {
        if self.refreshed.replace(true) {
            return false;
        }
        // A source that cannot be read is no obstacle as long as the others have the packages.
        let update = apt_get(self.workspace, &["update"]);
        if let Err(error) =
            progress::run(self.workspace, "refreshing apt's lists", "apt-update", &mut { update })
        {
            progress::say(&format!("going on with the lists that there are: {error:#}"));
        }
        true
    }

    fn apt_install(&self, names: &[&str]) -> Result<()> {
        let mut install =
            apt_get(self.workspace, &["install", "--yes", "--no-install-recommends", "--no-remove"]);
        install.args(names);
        progress::run(self.workspace, &format!("installing {}", names.join(" ")), "apt-install", &mut install)
    }

    fn installed(&self, packages: &[&Package]) -> Result<HashSet<String>> {
        if !self.has_apt() {
            return Ok(HashSet::new());
        }
        let mut query = self.workspace.command("dpkg-query");
        query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]);
        query.args(packages.iter().map(|package| &package.name));
        // Its exit code is 1 when it does not know one of the packages.
        let output = query.output().context("cannot run dpkg-query")?;
        Ok(parse_installed(&String::from_utf8_lossy(&output.stdout)))
    }

    fn all_have_candidates(&self, names: &[&str]) -> Result<bool> {
        let output =
            self.workspace.command("apt-cache").arg("policy").args(names).env("LC_ALL", "C").output();
        let output = output.context("cannot run apt-cache")?;
        let known = parse_candidates(&String::from_utf8_lossy(&output.stdout));
        Ok(names.iter().all(|name| known.contains(*name)))
    }
}

fn apt_get(workspace: &Workspace, arguments: &[&str]) -> Command {
    let mut command = workspace.command("apt-get");
    command.args(["-q", "-o", "DPkg::Lock::Timeout=120"]).args(arguments);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// The installed packages, from lines `<package> <status>` of dpkg-query.
fn parse_installed(text: &str) -> HashSet<String> {
    text.lines().filter_map(|line| line.strip_suffix(" installed")).map(str::to_owned).collect()
}

/// The packages that could be installed, from `apt-cache policy`.
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
    fn candidates_are_packages_with_a_version() {
        let text = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n     \
                    1.96.0+dfsg1-1~deb12u2 500\n        500 http://deb.debian.org/debian-security main\nold:\n  \
                    Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(parse_candidates(text), set(&["rustc-web"]));
        assert_eq!(parse_candidates(""), set(&[]));
    }
}
