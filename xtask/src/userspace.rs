//! User space, built with the profile that is shipped.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::architecture::Architecture;
use crate::progress::{self, Budget, Watch, say_cost};
use crate::setup::KernelSide;
use crate::workspace::Workspace;
use crate::{bpf, setup};

/// Where the programs that are shipped come from.
const PACKAGES: [&str; 8] =
    ["--package", "redirect-cli", "--bin", "redirect", "--package", "redirect-cni", "--bin", "redirect-cni"];

/// The programs that are shipped.
pub(crate) struct Programs {
    pub(crate) redirect: PathBuf,
    pub(crate) plugin: PathBuf,
}

/// Builds the kernel side, then user space around it, and with it `extra` packages of cargo's command line.
pub(crate) fn build(workspace: &Workspace, kernel_side: &KernelSide, extra: &[&str]) -> Result<Programs> {
    bpf::build(workspace, kernel_side, Architecture::HOST)?;
    cargo_build(workspace, Architecture::HOST, &workspace.target(""), extra)
}

/// As [`build`], for any architecture.
pub(crate) fn build_for(
    workspace: &Workspace,
    kernel_side: &KernelSide,
    architecture: Architecture,
) -> Result<Programs> {
    bpf::build(workspace, kernel_side, architecture)?;
    cargo_build(workspace, architecture, &workspace.target(""), &[])
}

/// Builds the kernel side, then user space for development, which is ready sooner.
pub(crate) fn build_for_development(workspace: &Workspace, kernel_side: &KernelSide) -> Result<Programs> {
    bpf::build(workspace, kernel_side, Architecture::HOST)?;
    let mut cargo = workspace.cargo();
    cargo.arg("build").args(PACKAGES);
    progress::watch(workspace, "building user space for development", "build", &mut cargo, Watch::Cargo)?;
    let folder = workspace.target("debug");
    Ok(Programs { redirect: folder.join("redirect"), plugin: folder.join("redirect-cni") })
}

/// Builds user space alone, below a directory of its own.
pub(crate) fn build_in(workspace: &Workspace, architecture: Architecture, folder: &Path) -> Result<Programs> {
    cargo_build(workspace, architecture, folder, &[])
}

fn cargo_build(
    workspace: &Workspace,
    architecture: Architecture,
    folder: &Path,
    extra: &[&str],
) -> Result<Programs> {
    let target = architecture.target();
    let mut cargo = workspace.cargo();
    // The target is named, even if it is this machine's, so that flags do not reach build scripts and procedural macros,
    // which can't be static.
    cargo.args(["build", "--release", "--target", target]).args(PACKAGES).args(extra);
    cargo.env("CARGO_TARGET_DIR", folder).env("CARGO_ENCODED_RUSTFLAGS", flags(workspace).join("\x1f"));
    let mut what = "building user space".to_owned();
    if architecture != Architecture::HOST {
        let linker = format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_"));
        cargo.env(linker, architecture.compiler());
        cargo.env("REDIRECT_BPF_OBJECT", bpf::object(workspace, architecture));
        what += &format!(" for {}", architecture.name());
    }
    progress::watch(workspace, &what, "build", &mut cargo, Watch::Cargo)?;
    say_cost(Budget::Programs);
    let release = folder.join(target).join("release");
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
