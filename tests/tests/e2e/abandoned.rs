//! Pods whose sandbox ends without a DEL: the agent and the proxy do not keep their namespace alive, and nothing
//! answers for their addresses.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::pod::Remains;
use redirect_tests::process::Process;
use redirect_tests::{Families, Node, Pod, Stack, wait};

use crate::context::{Context, for_every_stack, trial};
use crate::{inbound, outbound};

/// How long a namespace may stay on an idle machine.
const SOON: Duration = Duration::from_secs(1);

/// Longer than the agent takes to notice.
const A_WHILE: Duration = Duration::from_secs(2);

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let of_each = [
        for_every_stack(context, "abandoned::address_of_another_pod", address_of_another_pod),
        for_every_stack(context, "abandoned::while_no_agent_runs", while_no_agent_runs),
    ];
    let once = [
        trial(context, "abandoned::process_without_a_path", process_without_a_path),
        trial(context, "abandoned::many_at_once", many_at_once),
    ];
    of_each.into_iter().flatten().chain(once).collect()
}

/// The pod ends without a DEL while the proxy has one of its connections; then a pod that is not enrolled gets its addresses.
fn address_of_another_pod(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (addresses, other) = (node.to_choose(6), node.plain("other", Families::Dual)?);
    let pod = Pod::start(&node, node.numbered("pod", Families::Dual).with_addresses(&addresses))?;
    let server = other.listen(stack)?;
    let open = pod.connect(stack, other.endpoint(stack.family(), server.port())?)?;
    ensure!(!open.is_direct(), "past the proxy");
    let devices = devices(&node)?;
    // The proxy keeps its side for a moment.
    drop(open);
    end(pod, &node, devices)?;
    belongs_to_the_new(&node, &other, &addresses, stack)
}

fn while_no_agent_runs(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--on-exit", "keep"])?;
    let (addresses, other) = (node.to_choose(6), node.plain("other", Families::Dual)?);
    let pod = Pod::start(&node, node.numbered("pod", Families::Dual).with_addresses(&addresses))?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    node.kill_agent()?;
    drop(pod.end_without_del()?);
    node.start_agent(&["--on-exit", "keep"].map(str::to_owned))?;
    node.wait_for_proxy()?;
    ensure!(node.with_agent(|agent| agent.pods())?.is_empty(), "the pod is still known");
    belongs_to_the_new(&node, &other, &addresses, stack)
}

/// Ends a pod, and waits until its device is gone from the node.
fn end(pod: Pod, node: &Node, devices: usize) -> Result<()> {
    let ended = Instant::now();
    let remains = pod.vanish()?;
    wait::until_true("end of the namespace", wait::patient(A_WHILE), || Ok(self::devices(node)? < devices))?;
    let took = ended.elapsed();
    ensure!(took < wait::patient(SOON), "the namespace lived for {took:?}");
    ensure!(node.with_agent(|agent| agent.pods())?.is_empty(), "the pod is still known");
    ensure!(fs::read_dir(node.state_dir().join("pods"))?.count() == 0, "its checkpoint is left");
    // The DEL comes late, or never.
    remains.delete()
}

/// The number of pods' devices on the node.
fn devices(node: &Node) -> Result<usize> {
    let links = node.netns().ip("-o link show type veth")?;
    Ok(links.lines().count())
}

fn belongs_to_the_new(
    node: &Arc<Node>,
    other: &Pod,
    addresses: &[std::net::IpAddr],
    stack: Stack,
) -> Result<()> {
    let spec = node.numbered("new", Families::Dual).with_addresses(addresses);
    let new = Pod::start(node, spec.not_enrolled())?;
    node.netns().ip("neighbour flush all")?;
    other.netns().ip("neighbour flush all")?;
    let server = new.listen(stack)?;
    let to = new.endpoint(stack.family(), server.port())?;
    for attempt in 0..20 {
        let connection = other.connect(stack, to).with_context(|| format!("attempt {attempt}"))?;
        ensure!(connection.is_direct(), "a proxy answers for a pod that is not enrolled");
    }
    new.enroll()?;
    inbound::passes_the_proxy_once(other.netns(), &new, stack)?;
    outbound::passes_the_proxy_once(&new, other, stack)
}

/// The agent releases a pod when its last process has ended, not when its path disappears.
fn process_without_a_path(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let other = node.plain("other", Families::Dual)?;
    let pod = node.plain("pod", Families::Dual)?;
    let path = node.dir().join("netns");
    symlink(pod.netns().path(), &path)?;
    pod.enroll_at(path.clone())?;
    // Time for the agent to see it at its path.
    thread::sleep(Duration::from_secs(1));
    let mut command = std::process::Command::new(&context.session()?.binaries().testbed);
    command.args(["tcp-echo", "--listen", "127.0.0.1:9000", "--greeting", "pod"]);
    let cgroup = context.session()?.applications().child("sandbox")?;
    let mut process =
        Process::spawn("application", command, pod.netns(), &cgroup, &node.dir().join("application.log"))?;
    fs::remove_file(&path)?;
    thread::sleep(A_WHILE);
    process.must_run()?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    process.kill()?;
    wait::until_true("un-enrollment", wait::SOON, || Ok(node.with_agent(|agent| agent.pods())?.is_empty()))?;
    let server = other.listen(Stack::V4)?;
    let to = other.endpoint(Stack::V4.family(), server.port())?;
    ensure!(pod.connect(Stack::V4, to)?.is_direct(), "the pod is still captured");
    Ok(())
}

fn many_at_once(context: &Context) -> Result<()> {
    const PODS: usize = 20;
    let node = Node::start(&context.session()?)?;
    let stays = node.enrolled("stays", Families::Dual)?;
    let other = node.plain("other", Families::Dual)?;
    let few = devices(&node)?;
    let pods = (0..PODS).map(|_| node.enrolled("ends", Families::Dual)).collect::<Result<Vec<_>>>()?;
    let ended = Instant::now();
    let remains: Vec<Remains> = pods.into_iter().map(Pod::vanish).collect::<Result<_>>()?;
    wait::until_true("end of the namespaces", wait::patient(Duration::from_secs(5)), || {
        Ok(devices(&node)? == few)
    })?;
    println!("{PODS} namespaces ended within {:?}", ended.elapsed());
    remains.iter().try_for_each(Remains::delete)?;
    outbound::passes_the_proxy_once(&stays, &other, Stack::V6)
}
