//! The Debian package from `cargo xtask deb`: its contents, and that it can be installed, run and removed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{root, run};

fn package() -> Result<PathBuf> {
    let path = root().join("target/deb/ambient-redirect.deb");
    ensure!(path.exists(), "{} is missing: cargo xtask deb", path.display());
    Ok(path)
}

/// Names, modes and owners, as Debian has them.
pub(crate) fn contents() -> Result<()> {
    let listing = run(Command::new("dpkg-deb").arg("--contents").arg(package()?))?;
    let mut found = Vec::new();
    for line in listing.lines() {
        let mut words = line.split_whitespace();
        let (mode, owner) = (words.next().context("a mode")?, words.next().context("an owner")?);
        let path = words.nth(3).context("a path")?.trim_start_matches('.').to_owned();
        ensure!(owner == "root/root", "{line}");
        let program = path.starts_with("/usr/lib/ambient-redirect/redirect");
        let expected = match (mode.as_bytes().first(), program) {
            (Some(b'd'), _) | (_, true) => "rwxr-xr-x",
            (Some(b'l'), _) => "rwxrwxrwx",
            _ => "rw-r--r--",
        };
        ensure!(&mode[1..] == expected, "{line}");
        found.push(path);
    }
    for wanted in [
        "/usr/bin/redirect",
        "/usr/lib/ambient-redirect/redirect",
        "/usr/lib/ambient-redirect/redirect-cni",
        "/usr/lib/systemd/system/ambient-redirect.service",
        "/usr/lib/systemd/system/ambient-redirect-proxy.service",
        "/etc/default/ambient-redirect",
        "/usr/share/doc/ambient-redirect/copyright",
        "/usr/share/doc/ambient-redirect/changelog.gz",
        "/usr/share/man/man1/redirect.1.gz",
        "/usr/share/man/man1/redirect-agent.1.gz",
        "/usr/share/bash-completion/completions/redirect",
    ] {
        ensure!(found.iter().any(|path| path == wanted), "no {wanted} in\n{listing}");
    }
    let fields = run(Command::new("dpkg-deb").arg("--field").arg(package()?))?;
    for wanted in ["Package: ambient-redirect", "Version: ", "Architecture: ", "Description: "] {
        ensure!(fields.lines().any(|line| line.starts_with(wanted)), "no {wanted} in\n{fields}");
    }
    Ok(())
}

/// A dpkg with a database of its own, below a directory.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let database = scratch.path().join("var/lib/dpkg");
        fs::create_dir_all(database.join("info"))?;
        fs::create_dir(database.join("updates"))?;
        fs::write(database.join("status"), "")?;
        Ok(Self(scratch))
    }

    fn dpkg(&self, arguments: &[&str]) -> Result<String> {
        let mut dpkg = Command::new("dpkg");
        // Its own scripts then leave this machine alone: they see DPKG_ROOT.
        dpkg.arg("--root").arg(self.0.path()).args(["--force-script-chrootless", "--log=/dev/null"]);
        run(dpkg.args(arguments))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }
}

pub(crate) fn installs_and_goes() -> Result<()> {
    let scratch = Scratch::new()?;
    let package = package()?;
    let package = package.to_str().context("a path in UTF-8")?;
    // The second time is an upgrade.
    for _ in 0..2 {
        scratch.dpkg(&["--install", package])?;
        let verified = scratch.dpkg(&["--verify", "ambient-redirect"])?;
        ensure!(verified.is_empty(), "files differ from their checksums: {verified}");
    }
    let redirect = scratch.path("usr/bin/redirect");
    let version = run(Command::new(&redirect).arg("--version"))?;
    ensure!(version.starts_with("redirect "), "{version}");
    installs_the_plugin(&redirect, &scratch.path("chain"))?;
    units(scratch.0.path())?;

    scratch.dpkg(&["--remove", "ambient-redirect"])?;
    ensure!(!redirect.exists() && scratch.path("etc/default/ambient-redirect").exists());
    scratch.dpkg(&["--purge", "ambient-redirect"])?;
    ensure!(!scratch.path("etc/default/ambient-redirect").exists(), "purge leaves the configuration");
    ensure!(scratch.dpkg(&["--get-selections"])?.is_empty(), "dpkg still knows the package");
    Ok(())
}

/// The program finds the plugin beside itself, even when it is run through a link.
fn installs_the_plugin(redirect: &Path, directory: &Path) -> Result<()> {
    let (configurations, plugins) = (directory.join("net.d"), directory.join("bin"));
    fs::create_dir_all(&configurations)?;
    fs::create_dir(&plugins)?;
    let chain = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}]}"#;
    fs::write(configurations.join("10-n.conflist"), chain)?;
    let mut install = Command::new(redirect);
    install.arg("install").arg("--cni-conf-dir").arg(&configurations).arg("--cni-bin-dir").arg(&plugins);
    let output = install.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    // No agent runs, so the chain stays as it is.
    ensure!(!output.status.success() && complaint.contains("the agent cannot be reached"), "{complaint}");
    let mode = fs::metadata(plugins.join("redirect-cni"))?.mode();
    ensure!(mode & 0o111 != 0, "the plugin can't be run: {mode:o}");
    run(install.arg("--remove")).map(drop)
}

/// systemd can parse the units, and finds their programs.
fn units(root: &Path) -> Result<()> {
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no", "--root"]).arg(root);
    verify.args(["ambient-redirect.service", "ambient-redirect-proxy.service"]);
    let output = verify.output().context("needs systemd-analyze: cargo xtask setup")?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaints.trim().is_empty(), "systemd-analyze verify: {complaints}");
    Ok(())
}
