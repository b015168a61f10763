//! The kubelet's connections to enrolled pods reach the applications without the proxy; no other connections from the
//! node do.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::count::Reason;
use redirect_ebpf::{Direction, Family, Verdict};
use redirect_tests::process::Process;
use redirect_tests::stack::canonical;
use redirect_tests::testbed::Answer;
use redirect_tests::{Caller, Entry, Families, Netns, Node, NodeOptions, Pod, PodSpec, Stack, wait};

use redirect_protocol::placement::Placement;

use crate::context::{Context, for_every_kind, for_every_stack, trial};
use crate::inbound;
use crate::reports::counted;

/// The deadline for recognizing a restarted kubelet.
const RECOGNISED: Duration = Duration::from_secs(2);

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "probes::reach_the_application", reach_the_application);
    trials.extend(for_every_stack(context, "probes::closed_port", closed_port));
    trials.extend(for_every_stack(context, "probes::without_a_proxy", without_a_proxy));
    trials.extend(for_every_kind(context, "probes::others_on_the_node_are_captured", others_on_the_node));
    trials.extend(for_every_stack(context, "probes::port_of_a_probe_is_no_exemption", port_of_a_probe));
    trials.extend(for_every_kind(context, "probes::kubelets_cgroup_in_a_pod_is_captured", in_a_pod));
    trials.extend(for_every_kind(context, "probes::routed_pod", routed_pod));
    trials.push(trial(context, "probes::link_local_node::v6", link_local_node));
    trials.extend(for_every_stack(context, "probes::kubelet_restarts", kubelet_restarts));
    trials.push(trial(context, "probes::cgroup_that_appears_later", cgroup_appears_later));
    trials.extend(for_every_stack(context, "probes::kubelet_by_name", kubelet_by_name));
    trials.push(trial(context, "probes::kubelet_by_name_restarts", kubelet_by_name_restarts));
    trials.push(trial(context, "probes::impostors_by_name", impostors_by_name));
    trials
}

/// A node and its kubelet.
pub(crate) struct Probing {
    pub(crate) node: Arc<Node>,
    pub(crate) kubelet: Caller,
}

/// A node whose kubelet is identified by its cgroup.
pub(crate) fn probing(context: &Context) -> Result<Probing> {
    let (session, node) = (context.session()?, empty_node(context)?);
    let name = cgroup_name(&node);
    let kubelet = Caller::new(&session, &name)?;
    run(&node, &["--probe-cgroups", &name])?;
    wait_for_links(&node, 1)?;
    Ok(Probing { node, kubelet })
}

fn empty_node(context: &Context) -> Result<Arc<Node>> {
    Node::with(&context.session()?, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })
}

fn cgroup_name(node: &Node) -> String {
    format!("kubelet-of-{}", node.netns().name())
}

fn run(node: &Node, arguments: &[&str]) -> Result<()> {
    node.start_agent(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    node.start_proxy()
}

fn wait_for_links(node: &Node, links: usize) -> Result<()> {
    wait::until_true("attached probe program", RECOGNISED, || {
        Ok(node.status()?.programs.iter().any(|program| program.name == "probe" && program.links == links))
    })
}

/// A call to a server in the pod, and whether the proxy had it.
fn call(caller: &Caller, from: &Netns, pod: &Pod, stack: Stack) -> Result<(Answer, bool)> {
    let (listening, log) = (pod.listen(stack)?, pod.node().access_log());
    let to = pod.endpoint(stack.family(), listening.port())?;
    let answer = caller.call(from, stack, to)?;
    ensure!(answer.error.is_none(), "{answer:?}");
    ensure!(answer.getpeername == Some(stack.spell(to)), "{answer:?}");
    ensure!(listening.accepted().len() == 1, "{:?}", listening.accepted());
    // An earlier server may have had the same port.
    let source = canonical(answer.getsockname.context("no source")?);
    // Without the scope of a link-local address, whose number differs at the other end.
    let is_this = |entry: &Entry| {
        entry.original_destination == to
            && (entry.source.ip(), entry.source.port()) == (source.ip(), source.port())
    };
    if answer.is_direct() {
        let entries = log.connections_so_far(is_this)?;
        ensure!(entries.is_empty(), "direct, but in the access log: {answer:?}, {entries:#?}");
        return Ok((answer, false));
    }
    log.connections(&format!("{answer:?}"), is_this)?;
    Ok((answer, true))
}

pub(crate) fn is_exempt(caller: &Caller, from: &Netns, pod: &Pod, stack: Stack) -> Result<Answer> {
    let (answer, proxied) = call(caller, from, pod, stack)?;
    ensure!(!proxied, "a probe went through the proxy: {answer:?}");
    Ok(answer)
}

fn is_captured(caller: &Caller, from: &Netns, pod: &Pod, stack: Stack) -> Result<()> {
    let (answer, proxied) = call(caller, from, pod, stack)?;
    ensure!(proxied, "no probe, but not in the access log: {answer:?}");
    Ok(())
}

fn reach_the_application(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", families)?;
    for round in 1..=3 {
        let answer = is_exempt(&kubelet, node.netns(), &pod, stack)?;
        let source = answer.heard.context("no greeting")?.peer.ip();
        ensure!(source == node.gateway(stack.family()), "the application saw {source}");
        let probes = |family| {
            let status = node.status()?;
            anyhow::Ok(counted(&status, family, Direction::Inbound, Verdict::Passed, Reason::Probe))
        };
        for family in Family::ALL {
            let expected = if family == stack.family() { round } else { 0 };
            ensure!(probes(family)? == expected, "{family}: {:#?}", node.status()?.counters);
        }
    }
    // All other connections to the same pod pass the proxy.
    inbound::passes_the_proxy_once(node.netns(), &pod, stack)
}

fn closed_port(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let answer = kubelet.call(node.netns(), stack, pod.endpoint(stack.family(), 9)?)?;
    ensure!(answer.error.as_ref().is_some_and(|error| error.contains("refused")), "{answer:?}");
    ensure!(pod.proxied_at_all()?.is_empty(), "{:#?}", pod.proxied_at_all()?);
    Ok(())
}

/// A pod must not be restarted because the proxy is away.
fn without_a_proxy(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    node.kill_proxy()?;
    is_exempt(&kubelet, node.netns(), &pod, stack).map(drop)
}

/// A process of the host, and one of a pod with the host's network: both in cgroups of their own.
fn others_on_the_node(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", families)?;
    let others = ["service", "pod-with-host-network"];
    for name in others {
        let other = Caller::new(node.session(), &format!("{name}-of-{}", node.netns().name()))?;
        is_captured(&other, node.netns(), &pod, stack)?;
        // Not even right after a probe.
        is_exempt(&kubelet, node.netns(), &pod, stack)?;
        is_captured(&other, node.netns(), &pod, stack)?;
    }
    inbound::passes_the_proxy_once(node.netns(), &pod, stack)
}

/// The exemption belongs to the kubelet's socket. The next socket with its address and port is captured.
fn port_of_a_probe(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    // The port is free again one second after the kubelet has closed its connection.
    node.netns().set_sysctl("net.ipv4.tcp_tw_reuse", "1")?;
    let listening = pod.listen(stack)?;
    let to = stack.spell(pod.endpoint(stack.family(), listening.port())?);
    let answer = kubelet.call(node.netns(), stack, to)?;
    ensure!(answer.is_direct(), "a probe went through the proxy: {answer:?}");
    let source = answer.getsockname.context("no source")?;
    std::thread::sleep(Duration::from_millis(2100));
    let stream = node.netns().run(|| -> Result<_> {
        let socket = socket2::Socket::new(stack.domain(), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
        socket.connect_timeout(&to.into(), wait::patient(wait::SOON))?;
        socket.set_read_timeout(Some(wait::patient(wait::SOON)))?;
        Ok(std::net::TcpStream::from(socket))
    })??;
    let connection = redirect_tests::Connection::greeted(stream)?;
    ensure!(!connection.is_direct(), "past the proxy: {:?}", connection.heard);
    Ok(())
}

/// Processes that the kubelet starts inside pods are no probers.
fn in_a_pod(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", families)?;
    let (plain, enrolled) =
        (node.plain("plain", Families::Dual)?, node.enrolled("enrolled", Families::Dual)?);
    is_captured(&kubelet, plain.netns(), &pod, stack)?;
    is_captured(&kubelet, enrolled.netns(), &pod, stack)?;
    ensure!(enrolled.proxied_at_all()?.len() == 1, "{:#?}", enrolled.proxied_at_all()?);
    Ok(())
}

/// A pod that is not on the bridge.
pub(crate) fn routed(node: &Arc<Node>, families: Families) -> Result<Pod> {
    start_routed(node, node.numbered("pod", families))
}

/// As [`routed`], with a specification of the pod.
pub(crate) fn start_routed(node: &Arc<Node>, spec: PodSpec) -> Result<Pod> {
    let pod = Pod::start(node, spec.routed())?;
    wait::until_true("addresses of the node in use", wait::SOON, || {
        let tentative = node.netns().json("ip -j -6 address show tentative")?;
        Ok(tentative.as_array().into_iter().flatten().all(|device| device["ifname"].is_null()))
    })?;
    Ok(pod)
}

/// Without a bridge: the node has a device for each pod, and a route to it.
fn routed_pod(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = routed(&node, families)?;
    let answer = is_exempt(&kubelet, node.netns(), &pod, stack)?;
    let source = answer.heard.context("no greeting")?.peer.ip();
    ensure!(source == node.gateway(stack.family()), "the application saw {source}");
    inbound::passes_the_proxy_once(node.netns(), &pod, stack)
}

/// A node whose only IPv6 addresses towards the pod are link-local ones.
fn link_local_node(context: &Context) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    for families in [Families::Dual, Families::V6Only] {
        let pod = routed(&node, families)?;
        let address = pod.address(Family::Ipv6)?;
        // The node loses its global addresses, so its connections have a link-local source.
        let devices = node.netns().json("ip -j -6 address show scope global")?;
        for device in devices.as_array().into_iter().flatten() {
            let name = device["ifname"].as_str().context("an interface has a name")?;
            node.netns().ip(&format!("-6 address flush dev {name} scope global"))?;
        }
        let route = node.netns().json(&format!("ip -j -6 route get {address}"))?;
        ensure!(route[0]["prefsrc"].as_str().is_some_and(|source| source.starts_with("fe80:")), "{route:#}");
        let answer = is_exempt(&kubelet, node.netns(), &pod, Stack::V6)?;
        let source = answer.heard.context("no greeting")?.peer.ip();
        ensure!(source.to_string().starts_with("fe80:"), "the application saw {source}");
        let other = Caller::new(node.session(), &format!("service-of-{}", node.netns().name()))?;
        match context.placement() {
            Placement::Pod => is_captured(&other, node.netns(), &pod, Stack::V6)?,
            // The proxy could not answer on the pod's link.
            Placement::Node => {
                let listening = pod.listen(Stack::V6)?;
                let answer =
                    other.call(node.netns(), Stack::V6, pod.endpoint(Family::Ipv6, listening.port())?)?;
                ensure!(answer.error.is_some() && listening.accepted().is_empty(), "{answer:?}");
            }
        }
    }
    Ok(())
}

/// systemd removes a service's cgroup when it stops, and creates another one with the same name when it
/// starts.
fn kubelet_restarts(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, mut kubelet } = probing(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    for _ in 0..3 {
        is_exempt(&kubelet, node.netns(), &pod, stack)?;
        drop(kubelet);
        wait_for_links(&node, 0)?;
        kubelet = Caller::new(node.session(), &cgroup_name(&node))?;
        wait_for_links(&node, 1)?;
    }
    is_exempt(&kubelet, node.netns(), &pod, stack).map(drop)
}

fn cgroup_appears_later(context: &Context) -> Result<()> {
    let node = empty_node(context)?;
    let slice = format!("slice-of-{}", node.netns().name());
    run(&node, &["--probe-cgroups", &format!("/{slice}/kubelet.service,/no-such-cgroup")])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let slice = node.session().cgroup().child(&slice)?;
    let kubelet = Caller::within(node.session(), &slice, "kubelet.service")?;
    wait_for_links(&node, 1)?;
    for stack in Stack::ALL {
        is_exempt(&kubelet, node.netns(), &pod, stack)?;
    }
    Ok(())
}

/// An idle process with this name, in the caller's cgroup; the cgroup's other processes connect.
fn sleeper(node: &Node, caller: &Caller, from: &Netns, name: &str, wrapper: &[&str]) -> Result<Process> {
    let program = node.dir().join(name);
    if !program.exists() {
        symlink("/bin/sleep", &program)?;
    }
    let mut words = wrapper.iter().map(ToString::to_string).chain([program.display().to_string()]);
    let mut command = Command::new(words.next().context("no program")?);
    command.args(words).arg("600");
    Process::spawn(name, command, from, caller.cgroup(), &node.dir().join(format!("{name}.log")))
}

fn process_name(node: &Node) -> String {
    format!("klet-{}-with-a-long-name", node.netns().name())
}

fn kubelet_by_name(context: &Context, stack: Stack) -> Result<()> {
    let node = empty_node(context)?;
    let (kubelet, name) = (Caller::new(node.session(), &cgroup_name(&node))?, process_name(&node));
    let _sleeper = sleeper(&node, &kubelet, node.netns(), &name, &[])?;
    run(&node, &["--probe-processes", &format!("no-such-process,{name}")])?;
    wait_for_links(&node, 1)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    is_exempt(&kubelet, node.netns(), &pod, stack)?;
    inbound::passes_the_proxy_once(node.netns(), &pod, stack)
}

fn kubelet_by_name_restarts(context: &Context) -> Result<()> {
    let node = empty_node(context)?;
    let name = process_name(&node);
    let mut kubelet = Caller::new(node.session(), &cgroup_name(&node))?;
    let mut process = sleeper(&node, &kubelet, node.netns(), &name, &[])?;
    run(&node, &["--probe-processes", &name])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    for _ in 0..2 {
        wait_for_links(&node, 1)?;
        for stack in Stack::ALL {
            is_exempt(&kubelet, node.netns(), &pod, stack)?;
        }
        drop(process);
        drop(kubelet);
        wait_for_links(&node, 0)?;
        kubelet = Caller::new(node.session(), &cgroup_name(&node))?;
        process = sleeper(&node, &kubelet, node.netns(), &name, &[])?;
    }
    wait_for_links(&node, 1)?;
    drop(process);
    Ok(())
}

/// Processes of pods, even with the host's network, can choose any name.
fn impostors_by_name(context: &Context) -> Result<()> {
    let node = empty_node(context)?;
    let (impostor, name) = (Caller::new(node.session(), &cgroup_name(&node))?, process_name(&node));
    let elsewhere = node.plain("plain", Families::Dual)?;
    let _in_a_pod = sleeper(&node, &impostor, elsewhere.netns(), &name, &[])?;
    let unshare = ["unshare", "--pid", "--fork", "--kill-child"];
    let mut with_host_network = sleeper(&node, &impostor, node.netns(), &name, &unshare)?;
    run(&node, &["--probe-processes", &name])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    for stack in Stack::ALL {
        is_captured(&impostor, node.netns(), &pod, stack)?;
        is_captured(&impostor, elsewhere.netns(), &pod, stack)?;
    }
    wait_for_links(&node, 0)?;
    // It ignores other signals while its child lives.
    with_host_network.kill().map(drop)
}
