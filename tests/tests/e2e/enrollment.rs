//! Pods that join and leave the mesh while they run, and addresses that change owners.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_protocol::placement::Placement;
use redirect_tests::kernel::Footprint;
use redirect_tests::{Direction, Families, Node, Pod, Stack};

use crate::context::{Context, for_every_kind, for_every_stack, for_every_stack_in_pods, trial};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "enrollment::spares_open_connections", spares_open_connections);
    trials.extend(for_every_stack_in_pods(
        context,
        "enrollment::end_cuts_proxied_connections",
        "the proxy is not told: the next packet that the client sends has its connection reset",
        end_cuts,
    ));
    trials.extend(for_every_kind(context, "enrollment::end_leaves_no_trace", end_leaves_no_trace));
    trials.push(trial(context, "enrollment::del_is_idempotent", del_is_idempotent));
    trials.push(trial(context, "enrollment::late_del_spares_the_new_owner", late_del_spares_the_new_owner));
    trials.push(trial(context, "enrollment::address_comes_back", address_comes_back));
    trials.push(trial(context, "enrollment::pod_leaves_and_returns", pod_leaves_and_returns));
    trials.push(trial(context, "enrollment::check_tells_the_truth", check_tells_the_truth));
    trials
}

fn spares_open_connections(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (listening, other_listening) = (pod.listen(stack)?, other.listen(stack)?);
    let inward = pod.endpoint(stack.family(), listening.port())?;
    let outward = other.endpoint(stack.family(), other_listening.port())?;
    let mut connections = [pod.connect(stack, outward)?, other.connect(stack, inward)?];

    pod.enroll()?;
    for connection in &mut connections {
        ensure!(connection.is_direct(), "{:?}", connection.heard);
        connection.exchange("still here")?;
        ensure!(connection.transfer(&[1; 100_000])? == [1; 100_000]);
    }
    ensure!(pod.proxied_at_all()?.is_empty(), "{:#?}", pod.proxied_at_all()?);

    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    for connection in connections {
        ensure!(connection.finish()? > 100_000);
    }
    Ok(())
}

fn end_cuts(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (listening, other_listening) = (pod.listen(stack)?, other.listen(stack)?);
    let inward = pod.endpoint(stack.family(), listening.port())?;
    let outward = other.endpoint(stack.family(), other_listening.port())?;
    let connections = [pod.connect(stack, outward)?, other.connect(stack, inward)?];
    ensure!(pod.proxied(Direction::Outbound, outward)?.len() == 1);
    ensure!(pod.proxied(Direction::Inbound, inward)?.len() == 1);

    pod.unenroll()?;
    for mut connection in connections {
        ensure!(connection.is_cut_within(Duration::from_secs(3))?, "{:?} lives on", connection.heard);
    }
    for connection in [pod.connect(stack, outward)?, other.connect(stack, inward)?] {
        ensure!(connection.is_direct(), "{:?}", connection.heard);
    }
    ensure!(pod.proxied_at_all()?.len() == 2, "{:#?}", pod.proxied_at_all()?);
    Ok(())
}

fn end_leaves_no_trace(context: &Context, families: Families, _: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = node.plain("pod", families)?;
    let before = Footprint::of(pod.netns())?;
    pod.enroll()?;
    let changed = Footprint::of(pod.netns())? != before;
    ensure!(changed == (context.placement() == Placement::Pod), "changed by enrollment: {changed}");
    ensure!(node.report(&pod)?.is_some());
    pod.unenroll()?;
    let after = Footprint::of(pod.netns())?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    ensure!(node.report(&pod)?.is_none());
    Ok(())
}

fn del_is_idempotent(context: &Context) -> Result<()> {
    let node = context.node()?;
    let (never, once) = (node.plain("never", Families::Dual)?, node.enrolled("once", Families::Dual)?);
    never.unenroll().context("DEL of a pod that never was enrolled")?;
    for _ in 0..3 {
        once.unenroll()?;
    }
    let gone = node.enrolled("gone", Families::Dual)?;
    let remains = gone.end_without_del()?;
    for _ in 0..2 {
        remains.delete().context("DEL of a pod that is gone")?;
    }
    Ok(())
}

fn late_del_spares_the_new_owner(context: &Context) -> Result<()> {
    let node = context.node()?;
    let server = node.plain("server", Families::Dual)?;
    let addresses = node.to_choose(1);
    let old = Pod::start(&node, node.numbered("old", Families::Dual).with_addresses(&addresses))?;
    let remains = old.end_without_del()?;
    let new = Pod::start(&node, node.numbered("new", Families::Dual).with_addresses(&addresses))?;
    // Repairs of the old owner, which is captured until it is torn down, must not take the addresses back.
    for round in 0..3 {
        works(&new, &server).with_context(|| format!("before the old owner's DEL, round {round}"))?;
    }
    remains.delete()?;
    works(&new, &server).context("after the old owner's DEL")
}

fn address_comes_back(context: &Context) -> Result<()> {
    let node = context.node()?;
    let server = node.plain("server", Families::Dual)?;
    let addresses = node.to_choose(2);
    for round in 0..3 {
        let spec = node.numbered("again", Families::Dual).with_addresses(&addresses);
        let pod = Pod::start(&node, spec)?;
        works(&pod, &server).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn pod_leaves_and_returns(context: &Context) -> Result<()> {
    let node = context.node()?;
    let (pod, server) = (node.enrolled("pod", Families::Dual)?, node.plain("server", Families::Dual)?);
    for round in 0..3 {
        works(&pod, &server).with_context(|| format!("round {round}"))?;
        pod.unenroll()?;
        pod.enroll()?;
    }
    works(&pod, &server)
}

/// Captured both ways by every stack.
fn works(pod: &Pod, other: &Pod) -> Result<()> {
    // Its addresses belonged to another device a moment ago.
    for netns in [pod.node().netns(), other.netns()] {
        netns.ip("neighbour flush all")?;
    }
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(pod, other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

fn check_tells_the_truth(context: &Context) -> Result<()> {
    context.needs_placement_pod("there are no sysctls of ours in the pod")?;
    // Without periodic checks, which could repair it first.
    let node = Node::with_arguments(&context.session()?, &["--check-interval", "3600"])?;
    for (family, sysctl) in
        [(Family::Ipv4, "net.ipv4.fwmark_reflect"), (Family::Ipv6, "net.ipv6.fwmark_reflect")]
    {
        let pod = node.enrolled("pod", Families::Dual)?;
        pod.check().context("of a pod in order")?;
        pod.netns().set_sysctl(sysctl, "0")?;
        let error = pod.check().err().with_context(|| format!("{family}: the change went unnoticed"))?;
        let text = format!("{error:#}");
        ensure!(text.contains(sysctl), "{sysctl} is not in {text:?}");
    }
    Ok(())
}
