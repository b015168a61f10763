//! `cargo xtask demo`: pods whose traffic is steered, without a cluster.

use std::ffi::OsString;
use std::process::Command;

use anyhow::Result;

use crate::load::become_it;
use crate::workspace::Workspace;
use crate::{host, setup, userspace};

const PACKAGE: [&str; 4] = ["--package", "redirect-tests", "--bin", "redirect-demo"];

pub(crate) fn demo(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    host::check()?;
    let programs = userspace::build(workspace, &setup::everything(workspace)?, &PACKAGE)?;
    let mut command = Command::new(programs.redirect.with_file_name("redirect-demo"));
    command.arg("--redirect").arg(programs.redirect).arg("--plugin").arg(programs.plugin);
    command.args(arguments);
    match become_it(&mut command)? {}
}
