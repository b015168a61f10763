//! The applications of [`redirect_tests::testbed`] as a program, to be run in pods by hand.

use clap::Parser;
use redirect_tests::testbed::{self, Application};

#[derive(Debug, Parser)]
#[command(about = "Applications for the pods of tests")]
struct Arguments {
    #[command(subcommand)]
    application: Application,
}

fn main() -> anyhow::Result<()> {
    testbed::run(Arguments::parse().application)
}
