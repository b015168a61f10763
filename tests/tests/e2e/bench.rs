//! The benchmark works: every arm is what it claims to be, every experiment completes, and the output exists. Each
//! measurement is short; its results do not matter here.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![trial(context, "bench::every_experiment_and_arm_works", |context| {
        let output = tempfile::tempdir()?;
        let session = context.session()?;
        let binaries = session.binaries();
        let program = binaries.testbed.with_file_name("redirect-bench");
        let mut command = Command::new(&program);
        command.args(["run", "--smoke", "--output"]).arg(output.path());
        // Any build will do.
        let build = tempfile::tempdir()?;
        symlink(&binaries.redirect, build.path().join("redirect"))?;
        symlink(&binaries.plugin, build.path().join("redirect-cni"))?;
        command.arg("--against").arg(build.path());
        command.env("REDIRECT_BIN", &binaries.redirect).env("REDIRECT_CNI_BIN", &binaries.plugin);
        let run = command.output().with_context(|| program.display().to_string())?;
        let errors = String::from_utf8_lossy(&run.stderr);
        ensure!(run.status.success(), "{}: {errors}", run.status);

        let data: serde_json::Value = serde_json::from_slice(&fs::read(output.path().join("data.json"))?)?;
        for scene in ["sink-outbound", "sink-inbound", "path"] {
            let floors: &[&str] = if scene == "path" { &[] } else { &["floor", "again"] };
            for arm in floors.iter().chain(&["none", "ebpf", "against", "iptables", "nft"]) {
                for stack in ["v4", "v6"] {
                    let samples = data["samples"].as_array().context("samples")?;
                    let of = samples.iter().filter(|sample| {
                        sample["scene"] == scene && sample["arm"] == *arm && sample["stack"] == stack
                    });
                    ensure!(of.count() == 4, "{scene}, {arm}, {stack}: not four kinds of measurement");
                }
            }
        }
        let against = &data["enrollment"]["against"][0];
        ensure!(against.as_array().is_some_and(|list| !list.is_empty()), "the other build enrolled nothing");
        for part in ["turns", "hooks", "many", "latencies"] {
            ensure!(data[part].as_array().is_some_and(|list| !list.is_empty()), "{part} is empty");
        }
        for name in ["report.md", "samples.csv", "outbound.svg", "path.svg", "enrollment.svg"] {
            let length = fs::metadata(output.path().join(name)).context(name)?.len();
            ensure!(length > 1000, "{name} has {length} bytes");
        }
        Ok(())
    })]
}
