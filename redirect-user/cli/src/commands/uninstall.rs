//! `redirect uninstall`.

use std::process::ExitCode;

use super::{Output, Uninstall, exit};
use redirect_agent::install;
use redirect_agent::uninstall::{NamespaceReport, Report, uninstall};
use redirect_datapath::linux::HostReport;

/// The exit code when an agent runs.
const IN_USE: u8 = 3;

/// Code 0: nothing is left, whether there was something or not; 1: something is.
pub(super) fn run(command: &Uninstall) -> ExitCode {
    match uninstall(&command.options) {
        Ok(Some(mut report)) => {
            match install::remove(&command.chain) {
                Ok(changed) => report.chain = changed,
                Err(error) => report.errors.push(format!("the CNI chain keeps the plugin: {error}")),
            }
            exit(show(&report, command.output))
        }
        Ok(None) => {
            let directory = command.options.pin_dir.display();
            eprintln!(
                "redirect: an agent runs and uses {directory}: end it first (its DaemonSet, say), or use --force"
            );
            ExitCode::from(IN_USE)
        }
        Err(error) => exit(Err(error)),
    }
}

fn show(report: &Report, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
        Output::Table => {
            for NamespaceReport { inode, pod, removed } in &report.namespaces {
                let pod =
                    pod.as_ref().map_or_else(|| "a pod of no record".into(), |pod| format!("pod {pod}"));
                println!(
                    "{pod}, network namespace {inode}: removed {} TC filters, {} rules, {} routes; turned off {} sysctls",
                    removed.filters, removed.rules, removed.routes, removed.sysctls
                );
            }
            let HostReport { filters, rules, entrance, untracked } = report.host;
            if report.host != HostReport::default() {
                let device = if entrance { "the device redirect0" } else { "no device" };
                let table = if untracked { ", the nftables table ambient-redirect" } else { "" };
                println!(
                    "the host's network namespace: removed {filters} TC filters, {rules} rules, {device}{table}"
                );
            }
            for pin in &report.pins {
                println!("removed {}", pin.display());
            }
            for path in &report.chain {
                println!("CNI chain: changed {}", path.display());
            }
            let found = report.namespaces.len() + report.pins.len() + report.records + report.chain.len();
            if found + report.errors.len() == 0 && report.host == HostReport::default() {
                println!("nothing was there");
            }
        }
    }
    if report.errors.is_empty() { Ok(()) } else { anyhow::bail!("{}", report.errors.join("\n")) }
}
