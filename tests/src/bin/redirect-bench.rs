//! Measures this project side by side with iptables, nftables and no redirection.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use redirect_tests::bench::{load, plots, report, run, sink, targets, world};
use redirect_tests::proxy::ProxyKind;
use redirect_tests::session::Binaries;
use redirect_tests::{Session, signals};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

/// What this program is.
#[derive(Debug, Subcommand)]
enum Role {
    /// Runs the benchmark.
    Run(run::Options),
    /// A load generator.
    #[command(hide = true)]
    Load(load::Options),
    /// A node proxy that answers itself.
    #[command(hide = true)]
    Sink(sink::Options),
    /// A server.
    #[command(hide = true)]
    Serve(world::ServeOptions),
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().role {
        Role::Run(options) => return benchmark(&options),
        Role::Load(options) => load::run(&options)?,
        Role::Sink(options) => sink::run(&options)?,
        Role::Serve(options) => world::serve(&options)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn benchmark(options: &run::Options) -> Result<ExitCode> {
    signals::install()?;
    let mut binaries = Binaries::from_env()?;
    if let Some(proxy) = &options.proxy {
        binaries.kind = ProxyKind::of(proxy)?;
        binaries.proxy = std::path::absolute(proxy)?;
    }
    binaries.check()?;
    // The agent's state is on a tmpfs, as it is on a node (`/run`).
    let tmpfs = Path::new("/dev/shm");
    if tmpfs.is_dir() && tempfile::env::override_temp_dir(tmpfs).is_err() {
        bail!("temporary files were made before their directory was chosen");
    }
    let session = Session::start(binaries)?;
    let data = run::run(&session, options);
    let left = session.leftovers()?;
    for thing in &left {
        eprintln!("left behind: {thing}");
    }
    let data = data?;
    let directory = &options.output;
    fs::create_dir_all(directory)?;
    fs::write(directory.join("data.json"), serde_json::to_vec(&data)?)?;
    fs::write(directory.join("samples.csv"), report::csv(&data))?;
    fs::write(directory.join("report.md"), report::markdown(&data))?;
    plots::draw(&data, directory)?;
    if let Some(path) = &options.docs {
        let document = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let document = report::replace(&document, &report::documented(&data));
        let document = document.with_context(|| format!("{} lacks the markers", path.display()))?;
        fs::write(path, document)?;
    }
    println!("{}", report::targets(&targets::evaluate(&data)));
    println!("report, plots and data: {}", directory.display());
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
