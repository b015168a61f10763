//! User space, built with the profile that is shipped.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::setup::KernelSide;
use crate::workspace::Workspace;
use crate::{bpf, progress, setup};

/// The programs that are shipped.
pub(crate) struct Programs {
    pub(crate) redirect: PathBuf,
    pub(crate) plugin: PathBuf,
}

/// The target that is built for. It is named, even if it is this machine's, so that flags do not reach build scripts and
/// procedural macros, which can't be static.
pub(crate) const TARGET: &str =
    if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };

/// Builds the kernel side, then user space around it, and with it `extra` packages of cargo's command line.
pub(crate) fn build(workspace: &Workspace, kernel_side: &KernelSide, extra: &[&str]) -> Result<Programs> {
    bpf::build(workspace, kernel_side)?;
    cargo_build(workspace, &workspace.target(""), extra)
}

/// Builds the kernel side, then user space for development, which is ready sooner.
pub(crate) fn build_for_development(workspace: &Workspace, kernel_side: &KernelSide) -> Result<Programs> {
    bpf::build(workspace, kernel_side)?;
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--package", "redirect-user", "--bin", "redirect", "--bin", "redirect-cni"]);
    progress::run(workspace, "building user space for development", "build", &mut cargo)?;
    let folder = workspace.target("debug");
    Ok(Programs { redirect: folder.join("redirect"), plugin: folder.join("redirect-cni") })
}

/// Builds user space alone, below a directory of its own.
pub(crate) fn build_in(workspace: &Workspace, target: &Path) -> Result<Programs> {
    cargo_build(workspace, target, &[])
}

fn cargo_build(workspace: &Workspace, target: &Path, extra: &[&str]) -> Result<Programs> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--release", "--target", TARGET, "--package", "redirect-user"]);
    cargo.args(["--bin", "redirect", "--bin", "redirect-cni"]).args(extra);
    cargo.env("CARGO_TARGET_DIR", target).env("CARGO_ENCODED_RUSTFLAGS", flags(workspace).join("\x1f"));
    progress::run(workspace, "building user space", "build", &mut cargo)?;
    let release = target.join(TARGET).join("release");
    Ok(Programs { redirect: release.join("redirect"), plugin: release.join("redirect-cni") })
}

/// Static programs run in an image of their own and on any distribution; no path of this machine is in them.
fn flags(workspace: &Workspace) -> Vec<String> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec!["-Ctarget-feature=+crt-static".into(), "-Cstrip=symbols".into()];
    flags.extend(cargo_home.map(|home| remap(&home, "/cargo")));
    // The last one that matches counts.
    flags.push(remap(&workspace.root(""), "/src"));
    flags
}

/// `cargo xtask build`.
pub(crate) fn build_and_show(workspace: &Workspace) -> Result<()> {
    let programs = build(workspace, &setup::kernel_side(workspace)?, &[])?;
    for path in [&programs.redirect, &programs.plugin] {
        let size = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        println!("{}: {:.1} MiB", workspace.show(path), size as f64 / f64::from(1 << 20));
    }
    Ok(())
}
