//! `redirect uninstall`.

use std::path::Path;
use std::process::ExitCode;

use super::{Output, Uninstall, exit};
use redirect_agent::install;
use redirect_agent::uninstall::{NamespaceReport, Report, uninstall};
use redirect_datapath::linux::{HostReport, InUse};

/// The exit code when an agent runs.
const IN_USE: u8 = 3;

/// Exit code 0: nothing is left; 1: something could not be removed.
pub(super) fn run(command: &Uninstall) -> ExitCode {
    match uninstall(&command.options) {
        Ok(mut report) => {
            match install::remove(&command.chain) {
                Ok(changed) => report.chain = changed,
                Err(error) => {
                    report.errors.push(format!("cannot remove the plugin from the CNI chain: {error}"));
                }
            }
            exit(show(&report, command.output))
        }
        Err(error) => match error.downcast_ref::<InUse>() {
            Some(InUse(directory)) => {
                eprintln!("redirect: {}", in_use(directory, &command.options.pin_dir));
                ExitCode::from(IN_USE)
            }
            None => exit(Err(error)),
        },
    }
}

/// How to proceed while an agent runs.
fn in_use(directory: &Path, ours: &Path) -> String {
    let running = format!("an agent runs and uses {}", directory.display());
    if directory == ours {
        format!("{running}: stop it first (delete its DaemonSet), or use --force")
    } else {
        format!(
            "{running}: --known-only leaves its pods alone; stop it first, or use --force, to remove them \
             as well"
        )
    }
}

fn show(report: &Report, output: Output) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(report)?),
        Output::Table => {
            for NamespaceReport { inode, pod, removed } in &report.namespaces {
                let pod = pod
                    .as_ref()
                    .map_or_else(|| "a pod without a checkpoint".into(), |pod| format!("pod {pod}"));
                println!(
                    "{pod}, network namespace {inode}: removed {} TC filters, {} rules, {} routes; turned off {} sysctls",
                    removed.filters, removed.rules, removed.routes, removed.sysctls
                );
            }
            let HostReport { filters, rules, ingress_device, notrack } = report.host;
            if report.host != HostReport::default() {
                let device = if ingress_device { "the device redirect0" } else { "no device" };
                let table = if notrack { ", the nftables table ambient-redirect" } else { "" };
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
            let found = report.namespaces.len() + report.pins.len() + report.checkpoints + report.chain.len();
            if found + report.errors.len() == 0 && report.host == HostReport::default() {
                println!("nothing to remove");
            }
        }
    }
    if report.errors.is_empty() { Ok(()) } else { anyhow::bail!("{}", report.errors.join("\n")) }
}
