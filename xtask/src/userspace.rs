//! User space, built with the profile that is shipped.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::setup::KernelSide;
use crate::workspace::Workspace;
use crate::{bpf, progress, setup};

/// The programs that are shipped.
pub(crate) struct Programs {
    pub(crate) redirect: PathBuf,
    pub(crate) plugin: PathBuf,
}

/// Builds the kernel side, then user space around it, and with it `extra` packages of cargo's command line.
pub(crate) fn build(workspace: &Workspace, kernel_side: &KernelSide, extra: &[&str]) -> Result<Programs> {
    bpf::build(workspace, kernel_side)?;
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--release", "--package", "redirect-user"]);
    cargo.args(["--bin", "redirect", "--bin", "redirect-cni"]).args(extra);
    progress::run(workspace, "building user space", "build", &mut cargo)?;
    let release = workspace.target("release");
    Ok(Programs { redirect: release.join("redirect"), plugin: release.join("redirect-cni") })
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
