//! `redirect validate`.

use std::process::ExitCode;
use std::time::Duration;

use super::Output;
use super::show::{json, table};
use crate::validate::{Finding, validate};

/// How it is looked.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Port to connect to; it must not be excluded from capture
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    port: u16,
    /// How long to wait for an answer, in seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..), value_name = "SECONDS")]
    timeout: u64,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Exits with 1 if the pod has an address of a family that is not captured, or has no address at all.
pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let findings = validate(options.port, Duration::from_secs(options.timeout))?;
    match options.output {
        Output::Json => json(&findings)?,
        Output::Table => println!("{}", text(&findings)),
    }
    let families: Vec<bool> = findings.iter().filter_map(|finding| finding.captured).collect();
    let good = !families.is_empty() && families.iter().all(|captured| *captured);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(findings: &[Finding]) -> String {
    let mut shown = table(&["family", "captured", "detail"]);
    for finding in findings {
        let captured = match finding.captured {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        shown.add_row([&finding.family, captured, &finding.detail]);
    }
    shown.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_that_is_not_captured_stands_out() {
        let finding = |family: &str, captured, detail: &str| Finding {
            family: family.into(),
            captured,
            detail: detail.into(),
        };
        let findings = [
            finding(
                "IPv4",
                Some(true),
                "a proxy accepted the connection to 192.0.2.1:80, which no network has",
            ),
            finding("IPv6", Some(false), "nothing accepted the connection to [2001:db8::1]:80: timed out"),
        ];
        insta::assert_snapshot!("validate", text(&findings));
    }
}
