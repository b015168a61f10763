//! Single families: pods and nodes without IPv6, pods without IPv4.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::connection::dial;
use redirect_tests::wait;
use redirect_tests::{Connection, Families, Node, NodeOptions, Pod, ProxyKind, ProxyOptions, Stack};

use crate::context::{Context, trial};
use crate::odd_sockets::dropped;
use crate::{inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    if !Path::new("/proc/net/if_inet6").exists() {
        return vec![trial(context, "without_ipv6::off_in_the_kernel", off_in_the_kernel)];
    }
    type Test = fn(&Context) -> Result<()>;
    let tests: [(&str, Test); 7] = [
        ("off_in_the_pod", off_in_the_pod),
        ("off_on_the_pods_lo", off_on_the_pods_lo),
        ("off_on_lo_of_a_pod_with_addresses", off_on_lo_of_a_pod_with_addresses),
        ("off_on_the_pods_device", off_on_the_pods_device),
        ("link_local_alone", link_local_alone),
        ("off_on_the_node", off_on_the_node),
        ("without_ipv4", without_ipv4),
    ];
    let mut trials: Vec<Trial> =
        tests.into_iter().map(|(name, test)| trial(context, format!("without_ipv6::{name}"), test)).collect();
    for (setting, word) in [("hold", "held"), ("refuse", "refused")] {
        trials.push(trial(context, format!("without_ipv6::off_in_the_proxy_is_{word}"), move |context| {
            off_in_the_proxy(context, setting)
        }));
    }
    trials
}

/// Long enough to resolve the neighbors of a new address.
const PATIENCE: Duration = Duration::from_millis(2500);

/// The stacks that use IPv4.
const IPV4: [Stack; 2] = [Stack::V4, Stack::Mapped];

/// Captured in both directions with these stacks.
fn works(pod: &Pod, other: &Pod, stacks: &[Stack]) -> Result<()> {
    for &stack in stacks {
        outbound::passes_the_proxy_once(pod, other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

/// A pod without our plugin, with IPv6 disabled in parts of its namespace.
fn pod_with_ipv6_off(node: &Arc<Node>, families: Families, scopes: &[&str]) -> Result<Pod> {
    let pod = node.plain("pod", families)?;
    for scope in scopes {
        pod.netns().set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "1")?;
    }
    Ok(pod)
}

fn agent_says(node: &Node, pod: &Pod, what: &str) -> Result<()> {
    let log = fs::read_to_string(node.dir().join("agent.log"))?;
    let name = pod.identity().to_string();
    let said = log.lines().any(|line| line.contains(what) && line.contains(&name));
    ensure!(said, "no line with {what:?} and {name:?} in the agent's log:\n{log}");
    Ok(())
}

fn off_in_the_pod(context: &Context) -> Result<()> {
    let node = context.node()?;
    let other = node.plain("other", Families::Dual)?;
    let pod = pod_with_ipv6_off(&node, Families::V4Only, &["all", "default", "lo"])?;
    pod.enroll()?;
    agent_says(&node, &pod, "IPv6 is disabled on the pod's lo")?;
    works(&pod, &other, &IPV4)
}

/// Its device still has IPv6. An address that it gets later is no way around the proxy, in either direction.
fn off_on_the_pods_lo(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let other = node.plain("other", Families::Dual)?;
    let pod = pod_with_ipv6_off(&node, Families::V4Only, &["lo"])?;
    pod.enroll()?;
    agent_says(&node, &pod, "IPv6 is disabled on the pod's lo")?;
    works(&pod, &other, &IPV4)?;

    let late = node.address(Family::Ipv6, 0x3e00);
    pod.netns().ip(&format!("address add {late}/64 dev eth0 nodad"))?;
    let (listening, other_listening) = (pod.listen(Stack::V6)?, other.listen(Stack::V6)?);
    let attempts = [
        (pod.netns(), other.endpoint(Family::Ipv6, other_listening.port())?, Way::Outbound, Reason::Unmarked),
        (other.netns(), (late, listening.port()).into(), Way::Inbound, Reason::NoListener),
    ];
    for (netns, to, way, reason) in attempts {
        if way == Way::Inbound && context.proxy()? == ProxyKind::Ztunnel {
            // To the kernel the pod has IPv6: it accepts the connection, which ends there.
            let attempt = Connection::open_within(netns, Stack::V6, to, PATIENCE);
            ensure!(attempt.is_err(), "the application answered: {attempt:?}");
            continue;
        }
        let outcome = netns.run(|| dial(Stack::V6, to, PATIENCE))?;
        ensure!(outcome.is_err(), "the {} connection to {to} was made", way.label());
        let dropped = dropped(&node, Stack::V6, way, reason)?;
        ensure!(dropped > 0, "nothing was counted as {} {}: {outcome:?}", way.label(), reason.label());
    }
    ensure!(listening.accepted().is_empty() && other_listening.accepted().is_empty());
    Ok(())
}

/// Half of its connections could not be captured: it is refused, with the remedy.
fn off_on_lo_of_a_pod_with_addresses(context: &Context) -> Result<()> {
    let node = context.node()?;
    let pod = pod_with_ipv6_off(&node, Families::Dual, &["lo"])?;
    let text = restarts::message(pod.enroll())?;
    let name = pod.identity().to_string();
    for wanted in [name.as_str(), "IPv6", "net.ipv6.conf.lo.disable_ipv6=0"] {
        ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
    }
    pod.netns().set_sysctl("net.ipv6.conf.lo.disable_ipv6", "0")?;
    pod.enroll().context("with IPv6 on lo")
}

fn off_on_the_pods_device(context: &Context) -> Result<()> {
    let node = context.node()?;
    let other = node.plain("other", Families::Dual)?;
    let pod = pod_with_ipv6_off(&node, Families::V4Only, &["eth0"])?;
    pod.enroll()?;
    works(&pod, &other, &IPV4)
}

/// As in every pod whose node has IPv6 but whose network does not.
fn link_local_alone(context: &Context) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::V4Only)?, node.plain("other", Families::Dual)?);
    let text = pod.netns().ip("-6 address show dev eth0")?;
    ensure!(text.contains("fe80::") && !text.contains("global"), "{text}");
    pod.enroll()?;
    works(&pod, &other, &IPV4)
}

fn off_on_the_node(context: &Context) -> Result<()> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    for scope in ["all", "default", "lo"] {
        node.netns().set_sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), "1")?;
    }
    node.start_agent(&[])?;
    node.start_proxy()?;
    let pod = node.enrolled("pod", Families::V4Only)?;
    let other = node.plain("other", Families::V4Only)?;
    works(&pod, &other, &IPV4)
}

/// Booted with `ipv6.disable=1`: sockets of the family can't even be created.
fn off_in_the_kernel(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let log = fs::read_to_string(node.dir().join("agent.log"))?;
    ensure!(log.contains("off in this kernel: pods have IPv4 only"), "{log}");
    let (pod, other) = (node.enrolled("pod", Families::V4Only)?, node.plain("other", Families::V4Only)?);
    works(&pod, &other, &[Stack::V4])?;
    let report = node.report(&pod)?.context("the agent does not know the pod")?;
    ensure!(report.captured == ["IPv4"], "{:?}", report.captured);
    pod.unenroll()
}

/// Except 127.0.0.1, which the kernel gives every namespace.
fn without_ipv4(context: &Context) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::V6Only)?, node.plain("other", Families::Dual)?);
    let text = pod.netns().ip("-4 address show")?;
    ensure!(text.matches("inet ").count() == 1 && text.contains("127.0.0.1/8"), "{text}");
    pod.enroll()?;
    works(&pod, &other, &[Stack::V6])?;
    let report = node.report(&pod)?.context("the agent does not know the pod")?;
    ensure!(report.captured == ["IPv6"], "{:?}", report.captured);
    pod.unenroll()
}

/// The proxy listens for IPv4 only: the pod's IPv6 connections find no proxy, and get nowhere.
fn off_in_the_proxy(context: &Context, setting: &str) -> Result<()> {
    let session = context.session()?;
    let options = NodeOptions {
        proxy: false,
        agent_arguments: vec![format!("--without-proxy={setting}")],
        ..NodeOptions::default()
    };
    let node = Node::with(&session, options)?;
    let environment = vec![("IPV6_ENABLED".to_owned(), "false".to_owned())];
    node.start_proxy_with(&ProxyOptions { environment, ..ProxyOptions::default() })?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    agent_says(&node, &pod, "node proxy listens in IPv4 only")?;
    works(&pod, &other, &IPV4)?;

    for (direction, client, server) in [(Way::Outbound, &pod, &other), (Way::Inbound, &other, &pod)] {
        let listening = server.listen(Stack::V6)?;
        let to = server.endpoint(Family::Ipv6, listening.port())?;
        let start = Instant::now();
        let error = client.netns().run(|| dial(Stack::V6, to, PATIENCE))?.err();
        let error = error.with_context(|| format!("the {} connection was made", direction.label()))?;
        if setting == "refuse" {
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
            ensure!(
                start.elapsed() < wait::patient(Duration::from_millis(500)),
                "only after {:?}",
                start.elapsed()
            );
        } else {
            ensure!(error.kind() == ErrorKind::TimedOut, "{error}");
        }
        ensure!(dropped(&node, Stack::V6, direction, Reason::NoListener)? > 0, "not counted");
        ensure!(listening.accepted().is_empty(), "past the proxy: {:?}", listening.accepted());
    }

    node.start_proxy()?;
    works(&pod, &other, &Stack::ALL)
}
