//! Writes the transcript of a real run into the documentation.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use redirect_tests::session::Binaries;
use redirect_tests::{Session, signals, transcript};

#[derive(Debug, Parser)]
struct Arguments {
    /// The document.
    path: PathBuf,
}

fn main() -> Result<ExitCode> {
    let Arguments { path } = Arguments::parse();
    signals::install()?;
    let binaries = Binaries::from_env()?;
    binaries.check()?;
    let session = Session::start(binaries)?;
    let document = transcript::record(&session);
    let left = session.leftovers()?;
    for thing in &left {
        eprintln!("left behind: {thing}");
    }
    std::fs::write(&path, document?).with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
