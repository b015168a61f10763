//! `cargo xtask demo`: pods whose traffic is captured, without a cluster.

use std::ffi::OsString;

use anyhow::Result;

use crate::load::become_it;
use crate::workspace::Workspace;
use crate::{host, packages, setup, userspace};

const PROGRAM: &str = "redirect-demo";

pub(crate) fn demo(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    host::check()?;
    let kernel_side = setup::kernel_side_and(workspace, &packages::for_pods())?;
    let programs = userspace::build(workspace, &kernel_side, &[PROGRAM])?;
    let mut command = workspace.command_here(programs.redirect.with_file_name(PROGRAM));
    command.arg("--redirect").arg(programs.redirect).arg("--plugin").arg(programs.plugin);
    command.args(arguments);
    match become_it(&mut command)? {}
}
