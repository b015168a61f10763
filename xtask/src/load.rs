//! `cargo xtask load`: runs the agent of this working tree on this host.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::workspace::Workspace;
use crate::{host, progress, setup, userspace};

pub(crate) fn load(workspace: &Workspace, agent: &[OsString]) -> Result<()> {
    host::check()?;
    let programs = userspace::build(workspace, &setup::kernel_side(workspace)?, &[])?;
    let mut command = workspace.command_here(programs.redirect);
    command.arg("agent").args(agent);
    match become_it(&mut command)? {}
}

/// Replaces this process, so that signals reach the program and its exit code is returned.
pub(crate) fn become_it(command: &mut Command) -> Result<Infallible> {
    progress::say(&format!("running {command:?}"));
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}
