//! The agent's log: one line for each change of a pod's state, and nothing about connections.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::dial;
use redirect_tests::{Cluster, Families, Node, Stack, wait};
use serde_json::Value;

use crate::coexistence::add_filter;
use crate::context::{Context, for_every_stack, trial};
use crate::{inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = vec![
        trial(context, "logs::a_line_for_each_change_of_a_pod", changes),
        trial(context, "logs::a_pod_that_changes_in_kubernetes", in_kubernetes),
        trial(context, "logs::levels_by_module", levels),
    ];
    trials.extend(for_every_stack(context, "logs::nothing_of_connections", connections));
    trials.extend(for_every_stack(context, "logs::what_the_kernel_side_drops", drops));
    trials
}

fn log(node: &Node) -> Result<String> {
    node.with_agent(|agent| Ok(agent.process().log()))
}

/// The whole log as JSON. Its last line may be incomplete.
pub(crate) fn lines(node: &Node) -> Result<Vec<Value>> {
    let log = log(node)?;
    let complete = log.rsplit_once('\n').map_or("", |(complete, _)| complete);
    let parsed = complete.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned()));
    parsed.collect()
}

/// Waits for the log lines about a pod, and checks that they are complete.
fn say(node: &Node, uid: &str, families: &str, messages: &[&str]) -> Result<()> {
    let mut found = Vec::new();
    let said = wait::until_true("lines about the pod", wait::SOON, || {
        found = lines(node)?.into_iter().filter(|line| line["uid"] == uid).collect();
        Ok(found.len() >= messages.len())
    });
    said.with_context(|| format!("{found:#?}"))?;
    let heard: Vec<_> = found.iter().map(|line| line["message"].as_str().unwrap_or_default()).collect();
    ensure!(heard == messages, "{found:#?}");
    for line in &found {
        ensure!(line["families"] == families && line["microseconds"].as_u64() > Some(0), "{line:#}");
        ensure!(line["timestamp"].is_string() && line["level"].is_string(), "{line:#}");
        ensure!(
            line["target"].as_str().is_some_and(|target| target.starts_with("redirect_agent::")),
            "{line:#}"
        );
    }
    Ok(())
}

fn names(families: Families) -> String {
    families.iter().map(redirect_ebpf::Family::name).collect::<Vec<_>>().join(", ")
}

fn changes(context: &Context) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--log-format", "json"])?;
    for families in Families::ALL {
        let pod = node.enrolled("pod", families)?;
        let uid = pod.identity().uid.clone();
        pod.unenroll()?;
        // Another filter is at our place.
        add_filter(&pod, "arp", "1", "ingress")?;
        restarts::message(pod.enroll())?;
        let messages = ["pod enrolled", "pod un-enrolled", "cannot enroll pod"];
        say(&node, &uid, &names(families), &messages)?;
    }
    Ok(())
}

fn in_kubernetes(context: &Context) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &["--log-format", "json"])?;
    for families in Families::ALL {
        let pod = cluster.node().plain("pod", families)?;
        cluster.announce(&pod, &[]);
        pod.enroll()?;
        cluster.announce(&pod, &[("ambient-redirect.io/exclude-outbound-ports", "8443")]);
        let messages = ["pod enrolled", "pod changed"];
        say(cluster.node(), &pod.identity().uid, &names(families), &messages)?;
    }
    Ok(())
}

fn levels(context: &Context) -> Result<()> {
    const MODULE: &str = "redirect_agent::pods";
    let levels = format!("warn,{MODULE}=info");
    let node = Node::with_arguments(&context.session()?, &["--log-format", "json", "--log", &levels])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    say(&node, &pod.identity().uid, "IPv4, IPv6", &["pod enrolled"])?;
    let lines = lines(&node)?;
    let modules: BTreeSet<_> = lines
        .iter()
        .filter(|line| line["level"] == "INFO")
        .filter_map(|line| line["target"].as_str())
        .collect();
    ensure!(modules.iter().all(|module| module.starts_with(MODULE)), "{modules:?}");
    // Elsewhere all modules log.
    ensure!(log(&*context.node()?)?.contains("agent is ready"));
    Ok(())
}

/// Not even at the most verbose level.
fn connections(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--log", "trace"])?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    for _ in 0..3 {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    let log = log(&node)?;
    ensure!(log.contains(&pod.identity().uid), "{log}");
    // The other pod's address would only appear in lines about connections.
    let address = other.address(stack.family())?.to_string();
    ensure!(!log.contains(&address), "{address} is in {log}");
    Ok(())
}

/// Refused connections, as a sum, at debug level.
fn drops(context: &Context, stack: Stack) -> Result<()> {
    const MANY: u64 = 3;
    let arguments = ["--without-proxy", "refuse", "--log", "debug", "--log-format", "json"];
    let node = Node::with_arguments(&context.session()?, &arguments)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    node.kill_proxy()?;
    for _ in 0..MANY {
        ensure!(pod.netns().run(|| dial(stack, to, wait::SOON))?.is_err());
    }
    let told = || -> Result<u64> {
        let is_drop = |line: &Value| {
            line["message"] == "kernel dropped connections"
                && line["family"] == stack.family().name()
                && line["direction"] == "outbound"
                && line["reason"] == "no_listener"
                && line["level"] == "DEBUG"
        };
        Ok(lines(&node)?
            .iter()
            .filter(|line| is_drop(line))
            .filter_map(|line| line["connections"].as_u64())
            .sum())
    };
    wait::until_true("sum of dropped connections", wait::SOON, || Ok(told()? == MANY))
        .with_context(|| log(&node).unwrap_or_default())
}
