//! `redirect pods` counts the connections of each pod: exactly its own, while it is enrolled.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction, Verdict};
use redirect_protocol::wire::PodCounter;
use redirect_tests::connection::dial;
use redirect_tests::wait::SOON;
use redirect_tests::{Families, Node, Pod, Stack};

use crate::context::{Context, for_every_stack};
use crate::{inbound, inspect, outbound};

const TIMES: u64 = 3;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "pod_counters::count_the_pod_s_own", own);
    trials.extend(for_every_stack(context, "pod_counters::outlive_the_agent_but_not_the_pod", lifetime));
    trials
}

/// Checks the counters of the pod in the command line's output.
fn counts(pod: &Pod, stack: Stack, expected: &[(Direction, Verdict, u64)]) -> Result<()> {
    let expected = expected.iter().map(|(direction, verdict, connections)| PodCounter {
        family: stack.family().to_string(),
        direction: direction.label().into(),
        verdict: verdict.label().into(),
        connections: *connections,
    });
    let expected: Vec<_> = expected.collect();
    let found = pod.node().report(pod)?.context("an enrolled pod")?.counters;
    ensure!(found == expected, "{}: {found:#?} instead of {expected:#?}", pod.identity());
    let (detail, _) = inspect::show(pod.node(), pod)?;
    ensure!(detail.report.counters == expected, "{detail:#?}");
    Ok(())
}

fn own(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.enrolled("other", Families::Dual)?);
    let plain = node.plain("plain", Families::Dual)?;
    for _ in 0..TIMES {
        outbound::passes_the_proxy_once(&pod, &plain, stack)?;
        inbound::passes_the_proxy_once(plain.netns(), &pod, stack)?;
    }
    counts(&other, stack, &[])?;
    // Each end of a connection counts it.
    let listening = other.listen(stack)?;
    pod.connect(stack, other.endpoint(stack.family(), listening.port())?)?.exchange("hello")?;
    let captured = |direction, connections| (direction, Verdict::Captured, connections);
    counts(&pod, stack, &[captured(Direction::Outbound, TIMES + 1), captured(Direction::Inbound, TIMES)])?;
    counts(&other, stack, &[captured(Direction::Inbound, 1)])
}

fn lifetime(context: &Context, stack: Stack) -> Result<()> {
    let arguments = ["--on-exit", "keep", "--without-proxy", "refuse", "--exclude-outbound-ports", "9"];
    let node = Node::with_arguments(&context.session()?, &arguments)?;
    let (pod, plain) = (node.enrolled("pod", Families::Dual)?, node.plain("plain", Families::Dual)?);
    let family = stack.family();
    outbound::passes_the_proxy_once(&pod, &plain, stack)?;
    refused(&pod, stack, (node.gateway(family), 9).into(), 1)?;
    node.kill_proxy()?;
    refused(&pod, stack, plain.endpoint(family, 80)?, TIMES)?;
    refused(&plain, stack, pod.endpoint(family, 80)?, 1)?;
    let all = |captured| {
        [
            (Direction::Outbound, Verdict::Captured, captured),
            (Direction::Outbound, Verdict::Passed, 1),
            (Direction::Outbound, Verdict::Dropped, TIMES),
            (Direction::Inbound, Verdict::Dropped, 1),
        ]
    };
    counts(&pod, stack, &all(1))?;

    node.kill_agent()?;
    node.start_agent(&arguments.map(str::to_owned))?;
    counts(&pod, stack, &all(1))?;
    node.start_proxy()?;
    outbound::passes_the_proxy_once(&pod, &plain, stack)?;
    counts(&pod, stack, &all(2))?;

    ensure!(entries(&node)? == 1);
    pod.unenroll()?;
    ensure!(entries(&node)? == 0);
    pod.enroll()?;
    counts(&pod, stack, &[])
}

/// Attempts without an answer.
fn refused(client: &Pod, stack: Stack, to: SocketAddr, attempts: u64) -> Result<()> {
    for _ in 0..attempts {
        let error = client.netns().run(|| dial(stack, to, SOON))?.err().context("an answer")?;
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "{to}: {error}");
    }
    Ok(())
}

/// The number of pods with counters.
fn entries(node: &Node) -> Result<usize> {
    let maps = node.status()?.maps;
    let map = maps.iter().find(|map| map.name == "POD_COUNTERS");
    Ok(map.with_context(|| format!("{maps:#?}"))?.entries)
}
