//! The gate on the host end of a pod's device: it stops traffic that gets past the programs in the pod.
//!
//! The pod controls its namespace: with `CAP_NET_RAW` a process sends frames that skip TC programs, with `CAP_NET_ADMIN` it
//! attaches filters before ours, or moves the device away.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Family, Reason, Verdict};
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::PodState;
use redirect_tests::connection::dial;
use redirect_tests::stack::canonical;
use redirect_tests::wait::SOON;
use redirect_tests::{Connection, Families, Netns, Node, Pod, Stack, wait};

use crate::context::{Context, for_every_stack, for_every_stack_in_pods, trial};
use crate::odd_sockets::{LONG_ENOUGH, Scene, fails};
use crate::raw::{self, Ethernet};
use crate::wire::link_address;
use crate::{inbound, outbound};

/// The difference in placement `node`.
const ELSEWHERE: &str = "the programs on the host's end capture there";

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 7] = [
        ("frame_past_the_qdisc", |context, stack| frames(context, stack, Ethernet::past_qdisc(0))),
        ("frame_by_xdp", |context, stack| frames(context, stack, Ethernet::by_xdp())),
        ("frame_behind_a_priority_tag", |context, stack| frames(context, stack, Ethernet::past_qdisc(1))),
        ("frame_behind_four_priority_tags", |context, stack| frames(context, stack, Ethernet::past_qdisc(4))),
        ("frame_of_another_type", |context, stack| frames(context, stack, Ethernet::of_arp())),
        ("filter_before_ours", filter_before_ours),
        ("device_and_proxy_live_through_an_upgrade", upgrade),
    ];
    let mut trials: Vec<_> = tests
        .into_iter()
        .flat_map(|(name, test)| {
            for_every_stack_in_pods(context, &format!("host_gate::{name}"), ELSEWHERE, test)
        })
        .collect();
    trials.extend(for_every_stack(context, "host_gate::device_that_was_moved", moved_device));
    trials.push(trial(context, "host_gate::comes_back_and_goes_with_the_pod", comes_and_goes));
    trials
}

/// The other end of the pod's `eth0`.
pub(crate) fn end_on_host(node: &Node, pod: &Pod) -> Result<String> {
    let device = pod.netns().json("ip -j link show dev eth0")?;
    let index = device[0]["link_index"].as_u64().context("eth0 is no veth")?;
    let links = node.netns().json("ip -j link")?;
    let end = links.as_array().into_iter().flatten().find(|link| link["ifindex"].as_u64() == Some(index));
    Ok(end.and_then(|link| link["ifname"].as_str()).context("no other end")?.to_owned())
}

/// How many packets from pods were dropped for these reasons, in either family, because VLAN tags hide the
/// family.
fn dropped_outbound(node: &Node, reasons: &[Reason]) -> Result<u64> {
    let status = node.status()?;
    let counted = status.counters.iter().filter(|counter| {
        counter.direction == Way::Outbound.label()
            && counter.verdict == Verdict::Dropped.label()
            && reasons.iter().any(|reason| counter.reason == reason.label())
    });
    Ok(counted.map(|counter| counter.connections).sum())
}

/// Sends a SYN to a port of another pod.
fn send(kind: Ethernet, pod: &Pod, to: (&Pod, SocketAddr)) -> Result<()> {
    let family = if to.1.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    let syn = raw::syn(pod.address(family)?, 40_000, to.1, 1);
    let ends = (link_address(to.0.netns())?, link_address(pod.netns())?);
    pod.netns().run(|| kind.send(ends, &syn))?
}

/// SYNs that skip the socket hooks. As a control, the same frames from a pod that is not enrolled must arrive.
fn frames(context: &Context, stack: Stack, kind: Ethernet) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let plain = scene.client.node().plain("plain", Families::Dual)?;
    let send = |pod: &Pod| send(kind, pod, (&scene.server, scene.to));
    for _ in 0..3 {
        send(&scene.client)?;
    }
    thread::sleep(LONG_ENOUGH / 5);
    ensure!(scene.segments_came()? == 0, "frames came to the server");
    let dropped =
        dropped_outbound(scene.client.node(), &[Reason::PastPod, Reason::Unmarked, Reason::Malformed])?;
    ensure!(dropped >= 3, "{dropped} frames were counted");
    send(&plain)?;
    wait::until_true("segment of a pod that is not enrolled", SOON, || Ok(scene.segments_came()? > 0))
}

/// A filter with our priority that is added later runs before ours (`cls_bpf` inserts at the head), and passes everything; a rule
/// leads past the proxy. The host end drops packets that leave, or answer a connection from outside.
fn filter_before_ours(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let netns = scene.client.netns();
    for side in ["egress", "ingress"] {
        let mut tc = Command::new("tc");
        let words = "filter add dev eth0 SIDE protocol all pref 1 bpf bytecode";
        tc.args(words.replace("SIDE", side).split(' '));
        tc.args(["1,6 0 0 4294967295,", "flowid", "1:1"]);
        netns.output(tc, b"")?;
    }
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule add pref 10 lookup main"))?;
    }
    fails(&scene.socket()?, scene.destination())?;
    scene.was_held(Way::Outbound, Reason::PastPod)?;

    let listening = scene.client.listen(stack)?;
    let to = scene.client.endpoint(stack.family(), listening.port())?;
    let outcome = scene.server.netns().run(|| dial(stack, to, LONG_ENOUGH))?;
    ensure!(
        outcome.is_err() && listening.accepted().is_empty(),
        "past the proxy: {:?}",
        listening.accepted()
    );
    // By the gate at the socket lookup, or else on the host, where the answer would leave.
    let dropped =
        scene.dropped(Way::Inbound, Reason::Uncaptured)? + scene.dropped(Way::Inbound, Reason::PastPod)?;
    ensure!(dropped > 0, "nothing counted the connection");
    Ok(())
}

/// The device is moved to a namespace without our programs. It still counts as the pod's.
fn moved_device(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let (node, nested) = (scene.client.node(), Netns::new("nested")?);
    scene.client.netns().ip(&format!("link set eth0 netns {}", nested.path().display()))?;
    for family in Family::ALL {
        let (own, gateway) = (scene.client.address(family)?, node.gateway(family));
        let length = if family == Family::Ipv4 { "16" } else { "64 nodad" };
        nested.ip_batch(&[format!("address replace {own}/{length} dev eth0"), "link set eth0 up".into()])?;
        nested.ip_batch(&[format!("route replace default via {gateway}")])?;
    }
    wait::until_true("report of the device", SOON, || {
        let report = node.report(&scene.client)?.context("the pod is gone")?;
        Ok(report.state == PodState::Broken && report.strayed.len() == 1)
    })?;
    let outcome = nested.run(|| dial(stack, scene.to, LONG_ENOUGH))?;
    if context.placement() == Placement::Node {
        // Captured as before.
        let direct = |stream: std::net::TcpStream| -> Result<bool> {
            let local = canonical(stream.local_addr()?);
            Ok(scene.listening.accepted().iter().any(|heard| heard.peer == local))
        };
        if let Ok(stream) = outcome {
            ensure!(!direct(stream)?, "past the proxy");
        }
        return Ok(());
    }
    ensure!(outcome.is_err(), "the connection was made");
    scene.was_held(Way::Outbound, Reason::PastPod)
}

/// The number of gates, according to the agent.
fn gates(node: &Node) -> Result<usize> {
    let programs = node.status()?.programs;
    Ok(programs.iter().find(|program| program.name == "host_gate").map_or(0, |program| program.links))
}

fn comes_and_goes(context: &Context) -> Result<()> {
    context.needs_placement_pod(ELSEWHERE)?;
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let end = end_on_host(&node, &pod)?;
    let shown = || -> Result<String> {
        let mut tc = Command::new("tc");
        tc.args(["filter", "show", "dev", &end, "ingress"]);
        Ok(String::from_utf8(node.netns().output(tc, b"")?)?)
    };
    let is_there = || -> Result<bool> { Ok(shown()?.contains("host_gate")) };
    ensure!(is_there()? && gates(&node)? == 1, "{}", shown()?);
    let stops = || -> Result<bool> {
        let before = dropped_outbound(&node, &[Reason::PastPod])?;
        send(Ethernet::past_qdisc(0), &pod, (&other, SocketAddr::new(other.address(Family::Ipv4)?, 9)))?;
        thread::sleep(LONG_ENOUGH / 20);
        Ok(dropped_outbound(&node, &[Reason::PastPod])? > before)
    };
    ensure!(stops()?, "it lets frames pass");
    let mut tc = Command::new("tc");
    tc.args(["filter", "del", "dev", &end, "ingress", "pref", "1"]);
    node.netns().output(tc, b"")?;
    // As a link, if the kernel supports them, because the device carries traffic.
    wait::until_true("gate that was removed", SOON, || Ok(gates(&node)? == 1 && stops()?))?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    pod.unenroll()?;
    ensure!(gates(&node)? == 0 && !is_there()? && !stops()?, "{}", shown()?);
    let connection = pod.connect(Stack::V4, SocketAddr::new(other.address(Family::Ipv4)?, 9));
    ensure!(connection.is_err_and(|error| format!("{error:#}").contains("refused")), "nothing is in its way");
    Ok(())
}

/// An agent that finds a pod without the gate, as enrolled by an earlier build, attaches one. Connections continue.
fn upgrade(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let node = scene.client.node();
    let end = end_on_host(node, &scene.client)?;
    let mut connection = scene.client.connect(stack, scene.to)?;
    connection.exchange("before")?;
    node.kill_agent()?;
    let mut tc = Command::new("tc");
    tc.args(["filter", "del", "dev", &end, "ingress", "pref", "1"]);
    node.netns().output(tc, b"")?;
    node.start_agent(&[])?;
    ensure!(gates(node)? == 1);
    connection.exchange("after")?;
    let another: Connection = scene.client.connect(stack, scene.to)?;
    scene.came_by_the_proxy(&[connection, another])
}
