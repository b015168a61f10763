//! `cargo xtask bench`: this project side by side with iptables, nftables and no redirection.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::load::become_it;
use crate::workspace::Workspace;
use crate::{host, packages, setup, userspace};

const PROGRAM: &str = "redirect-bench";

/// What is passed on.
#[derive(Args)]
pub(crate) struct Options {
    /// Also write the summary into deploy/docs/benchmark.md.
    #[arg(long)]
    docs: bool,
    /// Arguments of the benchmark: `--quick`, `--proxy PATH`, `--only sink,path`, `--help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    bench: Vec<OsString>,
}

pub(crate) fn bench(workspace: &Workspace, options: &Options) -> Result<()> {
    host::check()?;
    let kernel_side =
        setup::kernel_side_and(workspace, &[packages::for_pods(), packages::for_bench()].concat())?;
    let programs = userspace::build(workspace, &kernel_side, &[PROGRAM])?;
    let mut command = workspace.command_here(programs.redirect.with_file_name(PROGRAM));
    command.env("REDIRECT_BIN", programs.redirect).env("REDIRECT_CNI_BIN", programs.plugin);
    command.arg("run").arg("--output").arg(workspace.target("bench"));
    if options.docs {
        command.arg("--docs").arg(workspace.root("deploy/docs/benchmark.md"));
    }
    match become_it(command.args(&options.bench))? {}
}
