//! `cargo xtask man`: the manual pages, as `redirect` itself knows its commands.

use std::process::Command;

use anyhow::Result;

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
