//! User space, built with the release profile.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::architecture::Architecture;
use crate::progress::{self, Budget, Watch, say_cost};
use crate::setup::KernelSide;
use crate::workspace::{Workspace, cargo_home};
use crate::{bpf, setup};

/// The shipped programs, for cargo's command line. Always selects the whole workspace: Cargo unifies the features of shared
/// packages, so programs, demo, benchmark and tests are built from the same artifacts.
const PROGRAMS: [&str; 5] = ["--workspace", "--bin", "redirect", "--bin", "redirect-cni"];

/// How the workspace is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Artifacts {
    /// As shipped.
    Shipped,
    /// With cargo's development profile: compiles faster after a change, and runs slower.
    Development,
}

impl Artifacts {
    /// A cargo command for this machine.
    pub(crate) fn cargo(self, workspace: &Workspace, subcommand: &str) -> Command {
        match self {
            Self::Shipped => cargo(workspace, subcommand, Architecture::HOST),
            Self::Development => {
                let mut cargo = workspace.cargo();
                cargo.arg(subcommand);
                cargo
            }
        }
    }

    /// The directory of programs built for this machine.
    pub(crate) fn folder(self, workspace: &Workspace) -> PathBuf {
        match self {
            Self::Shipped => workspace.target(Architecture::HOST.target()).join("release"),
            Self::Development => workspace.target("debug"),
        }
    }
}

/// The shipped programs.
pub(crate) struct Programs {
    pub(crate) redirect: PathBuf,
    pub(crate) plugin: PathBuf,
}

/// Builds the kernel side, then user space, which embeds it, and other programs of the workspace.
pub(crate) fn build(workspace: &Workspace, kernel_side: &KernelSide, others: &[&str]) -> Result<Programs> {
    bpf::build(workspace, kernel_side, Architecture::HOST)?;
    cargo_build(workspace, Architecture::HOST, &workspace.target(""), others)
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

/// Builds the kernel side, then user space with the development profile, which compiles faster.
pub(crate) fn build_for_development(workspace: &Workspace, kernel_side: &KernelSide) -> Result<Programs> {
    bpf::build(workspace, kernel_side, Architecture::HOST)?;
    let mut cargo = Artifacts::Development.cargo(workspace, "build");
    cargo.args(PROGRAMS);
    progress::watch(workspace, "building user space for development", "build", &mut cargo, Watch::Cargo)?;
    let folder = Artifacts::Development.folder(workspace);
    Ok(Programs { redirect: folder.join("redirect"), plugin: folder.join("redirect-cni") })
}

/// Builds only user space, in a separate directory.
pub(crate) fn build_in(workspace: &Workspace, architecture: Architecture, folder: &Path) -> Result<Programs> {
    cargo_build(workspace, architecture, folder, &[])
}

fn cargo_build(
    workspace: &Workspace,
    architecture: Architecture,
    folder: &Path,
    others: &[&str],
) -> Result<Programs> {
    let target = architecture.target();
    let mut cargo = cargo(workspace, "build", architecture);
    cargo.args(PROGRAMS).args(others.iter().flat_map(|other| ["--bin", other]));
    cargo.env("CARGO_TARGET_DIR", folder);
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

/// A cargo command with the shared artifacts' profile, target and flags.
fn cargo(workspace: &Workspace, subcommand: &str, architecture: Architecture) -> Command {
    let mut cargo = workspace.cargo();
    // The target is always named, even this machine's, so that the flags do not apply to build scripts and procedural
    // macros, which can't be static.
    cargo.args([subcommand, "--release", "--target", architecture.target()]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags().join("\x1f"));
    cargo
}

/// Static programs run in an otherwise empty image and on any distribution. They contain no paths of this machine, not
/// even that of the clone: cargo uses relative paths for the workspace's own sources.
fn flags() -> Vec<String> {
    let mut flags = vec!["-Ctarget-feature=+crt-static".into()];
    flags.extend(cargo_home().map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));
    flags
}

/// Paths that would make programs differ between machines.
pub(crate) fn places(workspace: &Workspace) -> Vec<String> {
    let clone = Some(workspace.root(""));
    clone.into_iter().chain(cargo_home()).map(|path| path.display().to_string()).collect()
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
