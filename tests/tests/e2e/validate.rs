//! `redirect validate` in pods of every kind: it succeeds exactly if connections are captured.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::{Families, Node, Pod};
use serde_json::Value;

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for families in Families::ALL {
        let name = format!("validate::an_enrolled_pod_is_captured::{}", families.label());
        trials.push(trial(context, name, move |context| enrolled(context, families)));
        let name = format!("validate::another_pod_is_not::{}", families.label());
        trials.push(trial(context, name, move |context| plain(context, families)));
    }
    trials.push(trial(context, "validate::the_family_that_is_not_captured_is_named", one_family));
    trials
}

/// Whether a family is captured; `None` if the pod has no address of it.
type Finding = (Family, Option<bool>);

/// The arguments of the recommended init container.
fn sample() -> Result<Vec<String>> {
    let text = include_str!("../../../deploy/samples/validate.yaml");
    let sample: Value = serde_saphyr::from_str(text)?;
    let arguments = sample["spec"]["initContainers"][0]["args"].as_array().context("no arguments")?;
    Ok(arguments.iter().filter_map(|argument| argument.as_str().map(str::to_owned)).collect())
}

/// The finding for each family, and the exit code.
fn validate(pod: &Pod) -> Result<(Vec<Finding>, Option<i32>)> {
    let mut command = Command::new(&pod.node().session().binaries().redirect);
    command.args(sample()?).args(["--timeout", "2", "-o", "json"]);
    let output = pod.netns().execute(command, b"")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).with_context(|| stderr.into_owned())?;
    ensure!(findings.len() == Family::ALL.len(), "{findings:#?}");
    let captured = Family::ALL.into_iter().zip(&findings).map(|(family, finding)| {
        ensure!(finding["family"] == family.name(), "{finding}");
        Ok((family, finding["captured"].as_bool()))
    });
    Ok((captured.collect::<Result<_>>()?, output.status.code()))
}

fn expect(pod: &Pod, captured: bool) -> Result<()> {
    let (findings, code) = validate(pod)?;
    let expected = Family::ALL.map(|family| (family, pod.families().has(family).then_some(captured)));
    ensure!(findings == expected && code == Some(i32::from(!captured)), "{findings:?}, exit code {code:?}");
    Ok(())
}

fn enrolled(context: &Context, families: Families) -> Result<()> {
    let node = context.node()?;
    expect(&node.enrolled("pod", families)?, true)
}

fn plain(context: &Context, families: Families) -> Result<()> {
    let node = context.node()?;
    expect(&node.plain("plain", families)?, false)
}

/// The port is excluded in one family's networks only.
fn one_family(context: &Context) -> Result<()> {
    for (network, family) in [("192.0.2.0/24", Family::Ipv4), ("2001:db8::/32", Family::Ipv6)] {
        let node = Node::with_arguments(&context.session()?, &["--exclude-outbound-networks", network])?;
        let (findings, code) = validate(&node.enrolled("pod", Families::Dual)?)?;
        let expected = Family::ALL.map(|of| (of, Some(of != family)));
        ensure!(findings == expected && code == Some(1), "{network}: {findings:?}, exit code {code:?}");
    }
    Ok(())
}
