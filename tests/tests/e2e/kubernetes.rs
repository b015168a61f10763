//! Kubernetes' settings of a pod, down to the kernel. The API server is a double, the rest is real.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction, Family};
use redirect_testing::Fault;
use redirect_tests::{Cluster, Families, Pod, Server, Stack, wait};

use crate::context::{Context, for_every_kind, for_every_stack, trial};
use crate::exclusions::passes_by;
use crate::running_pods::becomes;
use crate::{inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "kubernetes::excluded_port", excluded_port);
    trials.extend(for_every_stack(context, "kubernetes::excluded_network", excluded_network));
    trials.extend(for_every_stack(context, "kubernetes::istio_exclusions", istio_exclusions));
    trials.push(trial(context, "kubernetes::bad_exclusions_are_refused", bad_exclusions));
    trials.push(trial(context, "kubernetes::annotations_go_with_the_agent", annotations_go));
    trials.push(trial(context, "kubernetes::annotations_stay_without_the_right", annotations_stay));
    trials.push(trial(
        context,
        "kubernetes::annotations_stay_with_captured_pods",
        annotations_stay_with_pods,
    ));
    trials
}

const PORT: u16 = 8443;

/// Enrolls a pod with these annotations.
fn enrolled(cluster: &Cluster, families: Families, annotations: &[(&str, &str)]) -> Result<Pod> {
    let pod = cluster.node().plain("pod", families)?;
    cluster.announce(&pod, annotations);
    pod.enroll()?;
    Ok(pod)
}

/// The annotation affects only its pod and its direction.
fn excluded_port(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let there = Server::start(other.netns(), stack, PORT, "there")?;
    let to = (other.address(stack.family())?, PORT);

    let pod = enrolled(&cluster, families, &[("ambient-redirect.io/exclude-outbound-ports", "8443, 9999")])?;
    passes_by(pod.netns(), &there, to, stack, &pod, Direction::Outbound)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;

    let neighbour = enrolled(&cluster, families, &[("ambient-redirect.io/exclude-inbound-ports", "8443")])?;
    let here = Server::start(neighbour.netns(), stack, PORT, "here")?;
    let to_here = (neighbour.address(stack.family())?, PORT);
    passes_by(other.netns(), &here, to_here, stack, &neighbour, Direction::Inbound)?;
    let connection = neighbour.connect(stack, to.into())?;
    ensure!(!connection.is_direct(), "{:?}", connection.heard);
    Ok(())
}

fn excluded_network(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let family = stack.family();
    let single = format!("{}/{}", other.address(family)?, if family == Family::Ipv4 { 32 } else { 128 });
    for direction in [Direction::Outbound, Direction::Inbound] {
        let name = format!("ambient-redirect.io/exclude-{}-networks", direction.label());
        let pod = enrolled(&cluster, Families::Dual, &[(name.as_str(), single.as_str())])?;
        let (client, server) = if direction == Direction::Outbound { (&pod, &other) } else { (&other, &pod) };
        let listening = server.listen(stack)?;
        let to = (server.address(family)?, listening.port());
        passes_by(client.netns(), &listening, to, stack, &pod, direction)?;
        // Neither the other direction nor the other family is excluded.
        if direction == Direction::Outbound {
            inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
        } else {
            outbound::passes_the_proxy_once(&pod, &other, stack)?;
        }
        let foreign = if family == Family::Ipv4 { Stack::V6 } else { Stack::V4 };
        outbound::passes_the_proxy_once(&pod, &other, foreign)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, foreign)?;
    }
    Ok(())
}

const ISTIO: [(&str, &str); 1] = [("traffic.sidecar.istio.io/excludeOutboundPorts", "8443")];

/// Honored only if enabled.
fn istio_exclusions(context: &Context, stack: Stack) -> Result<()> {
    for (arguments, honoured) in [(&["--istio-exclusions"][..], true), (&[], false)] {
        let cluster = Cluster::start(&context.session()?, arguments)?;
        let other = cluster.node().plain("other", Families::Dual)?;
        let there = Server::start(other.netns(), stack, PORT, "there")?;
        let pod = enrolled(&cluster, Families::Dual, &ISTIO)?;
        let to = (other.address(stack.family())?, PORT);
        if honoured {
            passes_by(pod.netns(), &there, to, stack, &pod, Direction::Outbound)?;
        } else {
            let connection = pod.connect(stack, to.into())?;
            ensure!(!connection.is_direct(), "{:?}", connection.heard);
        }
    }
    Ok(())
}

/// One bad value among good ones: the pod is refused with a message and an event, and has no state in the kernel.
fn bad_exclusions(context: &Context) -> Result<()> {
    let cases = [
        ("ambient-redirect.io/exclude-outbound-networks", "10.0.0.0/8,10.0.0.0/33", "10.0.0.0/33"),
        ("ambient-redirect.io/exclude-inbound-networks", "2001:db8::/64, fd00::/129", "fd00::/129"),
        ("ambient-redirect.io/exclude-outbound-ports", "80,http", "http"),
        ("ambient-redirect.io/exclude-inbound-ports", "65536", "65536"),
    ];
    let cluster = Cluster::start(&context.session()?, &[])?;
    for (name, value, bad) in cases {
        let pod = cluster.node().plain("pod", Families::Dual)?;
        cluster.announce(&pod, &[(name, value)]);
        let text = restarts::message(pod.enroll())?;
        for wanted in [name, bad] {
            ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
        }
        let told = wait::until_true("event", wait::SOON, || {
            Ok(cluster.events(&pod).iter().any(|note| note.contains(name) && note.contains(bad)))
        });
        told.with_context(|| format!("{name}={value}: {:?}", cluster.api().world().events))?;
        for family in ["-4", "-6"] {
            let rules = pod.netns().ip(&format!("{family} rule"))?;
            ensure!(!rules.contains("15001"), "{rules}");
        }
        ensure!(cluster.node().report(&pod)?.is_none(), "the agent has it");
        // With a good value, it is enrolled.
        cluster
            .announce(&pod, &[(name, value.split(',').next().filter(|first| *first != bad).unwrap_or(""))]);
        // The agent may not have seen it yet.
        let mut outcome = Ok(());
        let enrolled = wait::until_true("enrollment with a good value", wait::SOON, || {
            outcome = pod.enroll();
            Ok(outcome.is_ok())
        });
        outcome.and(enrolled)?;
        let other = cluster.node().plain("other", Families::Dual)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, Stack::V6)?;
    }
    Ok(())
}

/// A pod whose annotation says that it is captured, and a server beside it.
fn shown(cluster: &Cluster) -> Result<(Pod, Pod)> {
    let (pod, other) =
        (enrolled(cluster, Families::Dual, &[])?, cluster.node().plain("other", Families::Dual)?);
    becomes(cluster, &pod, Some("enabled"))?;
    Ok((pod, other))
}

/// The agent has removed everything on exit: the pod is not captured, in any family.
fn is_plain(pod: &Pod, other: &Pod) -> Result<()> {
    for stack in Stack::ALL {
        let listening = other.listen(stack)?;
        let to = other.endpoint(stack.family(), listening.port())?;
        ensure!(pod.connect(stack, to)?.is_direct(), "{stack}: still captured");
    }
    Ok(())
}

fn annotations_go(context: &Context) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &["--on-exit", "remove"])?;
    let (pod, other) = shown(&cluster)?;
    cluster.node().end_agent()?;
    ensure!(cluster.redirection(&pod).is_none(), "it is {:?}", cluster.redirection(&pod));
    is_plain(&pod, &other)
}

/// Without permission for the annotations, everything else is removed, and the log has the remedy.
fn annotations_stay(context: &Context) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &["--on-exit", "remove"])?;
    let (pod, other) = shown(&cluster)?;
    cluster.api().fail_next("PATCH ", Fault::Status(403));
    cluster.node().end_agent()?;
    ensure!(cluster.api().faults_left() == 0, "nobody tried");
    ensure!(cluster.redirection(&pod).as_deref() == Some("enabled"));
    let log = std::fs::read_to_string(cluster.node().dir().join("agent.log"))?;
    for wanted in [pod.identity().to_string().as_str(), "kubectl annotate pods"] {
        ensure!(log.contains(wanted), "{wanted} is not in {log}");
    }
    is_plain(&pod, &other)
}

/// The next agent finds them as they are.
fn annotations_stay_with_pods(context: &Context) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &["--on-exit", "keep"])?;
    let (pod, other) = shown(&cluster)?;
    cluster.node().end_agent()?;
    ensure!(cluster.redirection(&pod).as_deref() == Some("enabled"), "it is {:?}", cluster.redirection(&pod));
    Stack::ALL.into_iter().try_for_each(|stack| outbound::passes_the_proxy_once(&pod, &other, stack))
}
