//! `cargo xtask <task>`: everything a contributor or CI does with this repository, from a fresh clone on.

mod architecture;
mod bench;
mod bpf;
mod deb;
mod demo;
mod e2e;
mod helm;
mod host;
mod image;
mod licenses;
mod linker;
mod load;
mod man;
mod packages;
mod progress;
mod release;
mod setup;
mod tally;
mod test;
mod toolchain;
mod transcript;
mod userspace;
mod vm;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use architecture::Architecture;
use workspace::Workspace;

/// Tasks of ambient-redirect. Each does what it depends on: `cargo xtask test` works in a fresh clone.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Finds, or installs, what all tasks need. Each task does the same for what it needs itself.
    Setup,
    /// Builds the kernel side into target/bpf/redirect.o.
    BuildEbpf,
    /// Lints the kernel side for the BPF target; warnings are errors.
    ClippyEbpf,
    /// Builds both sides, release profile.
    Build,
    /// Writes the manual pages of `redirect` into target/man.
    Man,
    /// Builds, then writes deploy/docs/reference.md: the options of every command.
    Reference,
    /// Builds, then runs the agent on this host in the foreground. Needs root.
    Load {
        /// Arguments of `redirect agent`, after `--`.
        #[arg(last = true)]
        agent: Vec<OsString>,
    },
    /// Builds, then shows pods whose traffic is captured, on this host, without a cluster. Needs root.
    Demo {
        /// Arguments of the demo, such as `--keep`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        demo: Vec<OsString>,
    },
    /// Builds, then measures side by side with iptables, nftables and no redirection; results in target/bench. Needs root.
    Bench(bench::Options),
    /// Writes the container image, as an OCI archive, into target/image.
    Image(image::Settings),
    /// Writes a Debian package, for nodes without Kubernetes, into target/deb.
    Deb,
    /// Builds what is published with a release into target/dist: images of both architectures, bills of materials, chart,
    /// Debian package, checksums.
    Release,
    /// Writes deploy/manifests from the chart.
    Manifests(helm::Settings),
    /// Builds, then installs, uses, upgrades and uninstalls all of it on a Kubernetes cluster, with a report.
    E2e(e2e::Options),
    /// Refuses packages whose license or source is not permitted.
    Licenses,
    /// Builds, then writes deploy/docs/observe.md: what an operator sees, from a real run. Needs root.
    Transcript,
    /// Runs unit and end-to-end tests. Needs root.
    Test(test::Selection),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            progress::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let workspace = Workspace::find();
    match task {
        Task::Setup => setup::everything(&workspace)?,
        Task::BuildEbpf => bpf::build(&workspace, &setup::kernel_side(&workspace)?, Architecture::HOST)?,
        Task::ClippyEbpf => bpf::clippy(&workspace)?,
        Task::Build => userspace::build_and_show(&workspace)?,
        Task::Man => man::man(&workspace)?,
        Task::Reference => man::reference(&workspace)?,
        Task::Load { agent } => load::load(&workspace, &agent)?,
        Task::Demo { demo } => demo::demo(&workspace, &demo)?,
        Task::Bench(options) => bench::bench(&workspace, &options)?,
        Task::Image(settings) => image::image(&workspace, &settings)?,
        Task::Deb => deb::deb(&workspace)?,
        Task::Release => release::release(&workspace)?,
        Task::Manifests(settings) => helm::manifests(&workspace, &settings)?,
        Task::E2e(options) => return e2e::e2e(&workspace, &options),
        Task::Transcript => transcript::transcript(&workspace)?,
        Task::Licenses => licenses::check(&workspace)?,
        Task::Test(selection) => return test::test(&workspace, &selection),
    }
    Ok(ExitCode::SUCCESS)
}
