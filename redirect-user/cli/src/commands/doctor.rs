//! `redirect doctor`.

use std::process::ExitCode;

use super::Output;
use super::show::{json, table};
use crate::doctor::{self, Check, Requirements, State};

/// What to examine, and how to print it.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    // Must stay last: its heading would apply to the options after it.
    #[command(flatten)]
    requirements: Requirements,
}

pub(super) fn doctor(options: &Options) -> anyhow::Result<ExitCode> {
    let checks = doctor::examine(&options.requirements);
    match options.output {
        Output::Json => json(&checks)?,
        Output::Table => println!("{}", text(&checks)),
    }
    Ok(match doctor::verdict(&checks) {
        State::Ok => ExitCode::SUCCESS,
        State::Warn => ExitCode::from(1),
        State::Fail => ExitCode::from(2),
    })
}

fn text(checks: &[Check]) -> String {
    let mut shown = table(&["check", "state", "detail"]);
    for check in checks {
        let state = match check.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Fail => "FAIL",
        };
        let remedy = check.remedy.iter().map(|remedy| format!("\nremedy: {remedy}")).collect::<String>();
        shown.add_row([check.check.clone(), state.into(), format!("{}{remedy}", check.detail)]);
    }
    shown.to_string()
}
