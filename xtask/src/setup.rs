//! Finds requirements, and installs missing ones. Quick if nothing is missing.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::packages::{self, Package, Packages};
use crate::progress;
use crate::toolchain::{self, Rustc};
use crate::workspace::Workspace;
use crate::{helm, linker};

/// The tools that build the kernel side.
pub(crate) struct KernelSide {
    pub(crate) rustc: Rustc,
    pub(crate) linker: PathBuf,
}

/// The requirements of all tasks.
pub(crate) fn everything(workspace: &Workspace) -> Result<()> {
    let packages = Packages::new(workspace);
    let lists = [packages::for_pods(), packages::for_bench(), packages::for_tests(), packages::for_scripts()];
    packages.ensure(&lists.concat())?;
    packages.ensure(&packages::for_machines())?;
    helm::ensure(workspace, &packages)?;
    kernel_side_lints(workspace).map(drop)
}

/// The requirements of builds.
pub(crate) fn kernel_side(workspace: &Workspace) -> Result<KernelSide> {
    kernel_side_and(workspace, &[])
}

/// The requirements of builds, and these packages.
pub(crate) fn kernel_side_and(workspace: &Workspace, others: &[Package]) -> Result<KernelSide> {
    let packages = Packages::new(workspace);
    packages.ensure(others)?;
    find_kernel_side(workspace, &packages)
}

/// The requirements of tests, on this host and in virtual machines.
pub(crate) fn tests(workspace: &Workspace, machines: bool) -> Result<KernelSide> {
    let packages = Packages::new(workspace);
    packages.ensure(&[packages::for_pods(), packages::for_tests()].concat())?;
    if machines {
        packages.ensure(&packages::for_machines())?;
    }
    helm::ensure(workspace, &packages)?;
    find_kernel_side(workspace, &packages)
}

/// The requirements of linting the kernel side.
pub(crate) fn kernel_side_lints(workspace: &Workspace) -> Result<KernelSide> {
    let packages = Packages::new(workspace);
    let kernel_side = find_kernel_side(workspace, &packages)?;
    packages.ensure(&kernel_side.rustc.clippy_packages())?;
    Ok(kernel_side)
}

fn find_kernel_side(workspace: &Workspace, packages: &Packages<'_>) -> Result<KernelSide> {
    let rustc = match Rustc::find(workspace) {
        Ok(rustc) => rustc,
        Err(complaint) if packages.has_apt() => install_rustc(workspace, packages).context(complaint)?,
        Err(complaint) => return Err(complaint),
    };
    progress::say(&format!("kernel side's compiler: {}", rustc.describe()));
    let linker = linker::ensure(workspace, packages, &rustc)?;
    progress::say(&format!("kernel side's linker: {}", workspace.show(&linker)));
    Ok(KernelSide { rustc, linker })
}

fn install_rustc(workspace: &Workspace, packages: &Packages<'_>) -> Result<Rustc> {
    let wanted = toolchain::packages();
    packages.install_together(&wanted)?;
    let found = Rustc::find(workspace);
    // Stale lists may offer outdated packages.
    if found.is_err() && packages.refresh() {
        packages.install_together(&wanted)?;
        return Rustc::find(workspace);
    }
    found
}
