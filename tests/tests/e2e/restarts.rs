//! Agent and proxy stop, restart, or end for good.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use libtest_mimic::Trial;
use redirect_tests::cni::PluginError;
use redirect_tests::kernel::Footprint;
use redirect_tests::stack::canonical;
use redirect_tests::{Connection, Direction, Families, Node, NodeOptions, Pod, Stack};

use crate::context::{Context, for_every_stack, trial};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "restarts::proxy_down_holds_outbound", |context, stack| {
        proxy_down_holds(context, stack, Direction::Outbound)
    });
    trials.extend(for_every_stack(context, "restarts::proxy_down_holds_inbound", |context, stack| {
        proxy_down_holds(context, stack, Direction::Inbound)
    }));
    trials.push(trial(context, "restarts::add_without_proxy_is_undone", add_without_proxy));
    trials.push(trial(context, "restarts::add_without_agent_names_the_socket", add_without_agent));
    trials.push(trial(context, "restarts::failed_add_gives_everything_back", failed_add));
    trials.push(trial(context, "restarts::end_of_the_agent_leaves_nothing", end_of_the_agent));
    trials
}

/// A connection attempt without a proxy never reaches the application; the proxy that returns serves it.
fn proxy_down_holds(context: &Context, stack: Stack, direction: Direction) -> Result<()> {
    const DOWN: Duration = Duration::from_millis(600);
    const PATIENCE: Duration = Duration::from_secs(15);
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (client, server) = match direction {
        Direction::Outbound => (&pod, &other),
        Direction::Inbound => (&other, &pod),
    };
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    node.kill_proxy()?;
    let connection = thread::scope(|scope| {
        let attempt = scope.spawn(|| Connection::open_within(client.netns(), stack, to, PATIENCE));
        thread::sleep(DOWN);
        ensure!(!attempt.is_finished(), "an answer without a proxy: {:?}", attempt.join());
        ensure!(listening.accepted().is_empty(), "the application was reached without the proxy");
        node.start_proxy()?;
        attempt.join().map_err(|_| anyhow!("the client panicked"))?
    })?;
    let entries = pod.proxied(direction, to)?;
    let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(entry.source == canonical(connection.local_name), "{entry:#?}");
    let accepted = listening.accepted();
    ensure!(accepted == [connection.heard], "the application saw {accepted:?}");
    Ok(())
}

fn add_without_proxy(context: &Context) -> Result<()> {
    let node = Node::with(&context.session()?, NodeOptions { proxy: false, ..NodeOptions::default() })?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(pod.netns())?;
    let text = message(pod.enroll())?;
    ensure!(text.contains("proxy"), "the proxy is not in {text:?}");
    ensure!(text.contains(&pod.identity().to_string()), "the pod is not in {text:?}");
    let after = Footprint::of(pod.netns())?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    ensure!(node.report(&pod)?.is_none(), "the agent still knows the pod");
    for stack in Stack::ALL {
        let listening = other.listen(stack)?;
        let connection = pod.connect(stack, other.endpoint(stack.family(), listening.port())?)?;
        ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    }

    node.start_proxy()?;
    pod.enroll().context("with a proxy")?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    Ok(())
}

fn add_without_agent(context: &Context) -> Result<()> {
    let nothing = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, nothing)?;
    let pod = node.plain("pod", Families::Dual)?;
    let text = message(pod.enroll())?;
    let socket = node.agent_socket().display().to_string();
    ensure!(text.contains(&socket), "{socket} is not in {text:?}");
    pod.unenroll().context("DEL without an agent")
}

/// The runtime's whole chain, on a node on which our plugin must fail.
fn failed_add(context: &Context) -> Result<()> {
    let node = Node::with(&context.session()?, NodeOptions { proxy: false, ..NodeOptions::default() })?;
    let veths = || node.netns().json("ip -j link show type veth");
    let before = veths()?;
    message(node.enrolled("pod", Families::Dual))?;
    let after = veths()?;
    ensure!(after == before, "left on the node: {after:#}, not {before:#}");
    let status = node.status()?;
    ensure!(node.with_agent(|agent| agent.pods())?.is_empty());
    ensure!(status.proxies.is_empty());
    Ok(())
}

fn end_of_the_agent(context: &Context) -> Result<()> {
    let node = Node::with(
        &context.session()?,
        NodeOptions { agent: false, proxy: false, ..NodeOptions::default() },
    )?;
    let pods: Vec<Pod> =
        Families::ALL.into_iter().map(|families| node.plain("pod", families)).collect::<Result<_>>()?;
    let places = || [node.netns()].into_iter().chain(pods.iter().map(Pod::netns));
    let footprints = || places().map(Footprint::of).collect::<Result<Vec<_>>>();
    let before = footprints()?;
    node.start_agent(&[])?;
    node.start_proxy()?;
    for pod in &pods {
        pod.enroll()?;
        for stack in pod.families().stacks() {
            inbound::passes_the_proxy_once(node.netns(), pod, stack)?;
        }
    }
    node.stop_agent()?;
    let after = footprints()?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    ensure!(!node.agent_socket().exists(), "{} is still there", node.agent_socket().display());
    for pod in &pods {
        for stack in pod.families().stacks() {
            let listening = pod.listen(stack)?;
            let to = pod.endpoint(stack.family(), listening.port())?;
            let connection = Connection::open(node.netns(), stack, to)?;
            ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
        }
    }
    Ok(())
}

/// The text of a plugin's error, which must have the specified form.
pub(crate) fn message<T>(outcome: Result<T>) -> Result<String> {
    let error = outcome.err().context("ADD succeeded")?;
    let plugin = error.chain().any(<dyn std::error::Error>::is::<PluginError>);
    ensure!(plugin, "not an error of the specification's form: {error:#}");
    Ok(format!("{error:#}"))
}
