//! The same with tcx links instead of clsact filters (`--tc tcx`).

use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Node, Stack};

use crate::context::{Context, for_every_stack, for_every_stack_in_pods, needs_tcx, trial};
use crate::{inbound, outbound, second_network};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "tc_method::tcx_captures_both_ways", captures);
    trials.extend(for_every_stack_in_pods(
        context,
        "tc_method::tcx_on_an_interface_added_later",
        second_network::REASON,
        later,
    ));
    trials.push(trial(context, "tc_method::tcx_leaves_nothing", leaves_nothing));
    trials
}

fn node(context: &Context) -> Result<Arc<Node>> {
    needs_tcx()?;
    Node::with_arguments(&context.session()?, &["--tc", "tcx"])
}

fn captures(context: &Context, stack: Stack) -> Result<()> {
    let node = node(context)?;
    ensure!(node.status()?.tcx, "the agent does not use tcx");
    for families in Families::ALL.into_iter().filter(|families| families.has(stack.family())) {
        let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    Ok(())
}

fn later(context: &Context, stack: Stack) -> Result<()> {
    second_network::inbound(&node(context)?, stack)
}

fn leaves_nothing(context: &Context) -> Result<()> {
    let node = node(context)?;
    let pods = [node.plain("one", Families::Dual)?, node.plain("two", Families::V6Only)?];
    let before = pods.iter().map(|pod| Footprint::of(pod.netns())).collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        pod.enroll()?;
    }
    let objects = node.with_agent(|agent| agent.objects())?;
    // Each pod has `lo` and `eth0`, each of these a program for either family.
    ensure!(objects.links.len() >= 8, "{objects:?}");
    pods[0].unenroll()?;
    ensure!(Footprint::of(pods[0].netns())? == before[0]);
    // The agent's shutdown checks that its links are gone.
    node.stop_agent()?;
    let after = pods.iter().map(|pod| Footprint::of(pod.netns())).collect::<Result<Vec<_>>>()?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    Ok(())
}
