//! `cargo xtask transcript`: what an operator sees, from a real run, for the documentation.

use anyhow::Result;

use crate::load::become_it;
use crate::workspace::Workspace;
use crate::{host, packages, setup, userspace};

const PROGRAM: &str = "redirect-transcript";

pub(crate) fn transcript(workspace: &Workspace) -> Result<()> {
    host::check()?;
    let kernel_side = setup::kernel_side_and(workspace, &packages::for_pods())?;
    let programs = userspace::build(workspace, &kernel_side, &[PROGRAM])?;
    let mut command = workspace.command_here(programs.redirect.with_file_name(PROGRAM));
    command.env("REDIRECT_BIN", programs.redirect).env("REDIRECT_CNI_BIN", programs.plugin);
    match become_it(command.arg(workspace.root("deploy/docs/observe.md")))? {}
}
