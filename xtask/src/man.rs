//! `cargo xtask man` and `cargo xtask reference`: manual pages and the option reference, from `redirect` itself.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;
use crate::{progress, setup, userspace};

pub(crate) fn man(workspace: &Workspace) -> Result<()> {
    let programs = userspace::build(workspace, &setup::kernel_side(workspace)?, &[])?;
    let pages = workspace.target("man");
    let mut redirect = Command::new(&programs.redirect);
    redirect.arg("man").arg(&pages);
    progress::run(workspace, "writing manual pages", "man", &mut redirect)?;
    println!("{}", workspace.show(&pages));
    Ok(())
}

/// A test of the command line compares the file with the program's output.
pub(crate) fn reference(workspace: &Workspace) -> Result<()> {
    let programs = userspace::build(workspace, &setup::kernel_side(workspace)?, &[])?;
    let output = Command::new(&programs.redirect).arg("reference").output().context("cannot run redirect")?;
    ensure!(
        output.status.success(),
        "redirect reference failed\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let path = workspace.root("deploy/docs/reference.md");
    fs::write(&path, output.stdout).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", workspace.show(&path));
    Ok(())
}
