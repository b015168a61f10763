//! Finds what is needed; installs what is missing. Quick when nothing is.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::packages::{self, Packages};
use crate::progress;
use crate::toolchain::{self, Rustc};
use crate::workspace::Workspace;
use crate::{helm, linker};

/// What builds the kernel side.
pub(crate) struct KernelSide {
    pub(crate) rustc: Rustc,
    pub(crate) linker: PathBuf,
}

/// What builds, tests and demo need.
pub(crate) fn everything(workspace: &Workspace) -> Result<KernelSide> {
    let packages = Packages::new(workspace);
    packages.ensure(&packages::of_the_tests())?;
    helm::ensure(workspace, &packages)?;
    // Tests on other kernels are skipped, and say so, where there are no machines.
    if let Err(error) = packages.ensure(&packages::of_the_machines()) {
        progress::say(&format!("no tests on other kernels: {error:#}"));
    }
    find_kernel_side(workspace, &packages)
}

/// What builds need.
pub(crate) fn kernel_side(workspace: &Workspace) -> Result<KernelSide> {
    find_kernel_side(workspace, &Packages::new(workspace))
}

/// What linting the kernel side needs.
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
        Err(complaint) => bail!("{complaint:#}\nremedy: {}", toolchain::BY_HAND),
    };
    progress::say(&format!("kernel side's compiler: {}", rustc.describe()));
    let linker = linker::ensure(workspace, packages, &rustc)?;
    progress::say(&format!("kernel side's linker: {}", workspace.show(&linker)));
    Ok(KernelSide { rustc, linker })
}

fn install_rustc(workspace: &Workspace, packages: &Packages<'_>) -> Result<Rustc> {
    let wanted = toolchain::packages();
    let wanted: Vec<_> = wanted.iter().collect();
    packages.install(&wanted)?;
    let found = Rustc::find(workspace);
    // What stale lists offer may be too old.
    if found.is_err() && packages.refresh() {
        packages.install(&wanted)?;
        return Rustc::find(workspace);
    }
    found
}
