//! `cargo xtask transcript`: what an operator sees, from a real run, for the documentation.

use std::process::Command;

use anyhow::Result;

use crate::load::become_it;
use crate::workspace::Workspace;
use crate::{host, setup, userspace};

const PACKAGE: [&str; 4] = ["--package", "redirect-tests", "--bin", "redirect-transcript"];

pub(crate) fn transcript(workspace: &Workspace) -> Result<()> {
    host::check()?;
    let programs = userspace::build(workspace, &setup::everything(workspace)?, &PACKAGE)?;
    let mut command = Command::new(programs.redirect.with_file_name("redirect-transcript"));
    command.env("REDIRECT_BIN", programs.redirect).env("REDIRECT_CNI_BIN", programs.plugin);
    match become_it(command.arg(workspace.root("deploy/docs/observe.md")))? {}
}
