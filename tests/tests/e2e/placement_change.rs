//! An agent of the other placement takes over: it takes over the pods one by one, no new connection fails, none bypasses the
//! proxies, open ones continue, and nothing of the former placement is left when its proxy has ended.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::INGRESS_DEVICE;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::{FactState, PodState};
use redirect_tests::agent::spelled;
use redirect_tests::cgroup::Cgroup;
use redirect_tests::kernel::Footprint;
use redirect_tests::load::{self, Target};
use redirect_tests::{Families, Node, NodeOptions, Pod, ProxyKind, ProxyOptions, Server, Stack, wait};

use crate::context::{Context, for_every_stack};
use crate::inspect::show;
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let orders = [("agent_first", First::Agent), ("proxy_first", First::Proxy)];
    let trials = orders.map(|(name, first)| {
        let test = move |context: &Context, stack: Stack| there_and_back(context, stack, first);
        for_every_stack(context, &format!("placement_change::{name}"), test)
    });
    trials.into_iter().flatten().collect()
}

/// Which part of the new placement starts first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Agent,
    Proxy,
}

/// Longer than any attempt may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The pause between a client's connections.
const PAUSE: Duration = Duration::from_millis(20);

/// The pause between events.
const A_WHILE: Duration = Duration::from_millis(500);

fn other(placement: Placement) -> Placement {
    match placement {
        Placement::Pod => Placement::Node,
        Placement::Node => Placement::Pod,
    }
}

fn there_and_back(context: &Context, stack: Stack, first: First) -> Result<()> {
    context.needs(ProxyKind::Embedded, "a ztunnel's listeners are in pods")?;
    let from = context.placement();
    let session = context.session()?;
    let name = format!("{}-{first:?}-{}", spelled(from), stack.label());
    let [one, two, three] =
        ["former", "next", "last"].map(|which| session.cgroup().child(&format!("{which}-proxy-{name}")));
    let (one, two, three) = (one?, two?, three?);
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let before = Footprint::of(node.netns())?;
    start_agent(&node, from)?;
    start_proxy(&node, &one, from)?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    let outside = node.plain("outside", Families::Dual)?;
    for (to, cgroup) in [(other(from), &two), (from, &three)] {
        changes(&node, (&client, &server, &outside), stack, first, (to, cgroup))?;
        nothing_is_left(&node, to, &before, &[&client, &server])?;
    }
    for pod in [&client, &server] {
        outbound::passes_the_proxy_once(pod, &outside, stack)?;
        inbound::passes_the_proxy_once(outside.netns(), pod, stack)?;
    }
    Ok(())
}

fn start_agent(node: &Node, placement: Placement) -> Result<()> {
    let arguments = ["--on-exit", "keep", "--placement", spelled(placement)];
    node.start_agent(&arguments.map(str::to_owned))
}

fn start_proxy(node: &Node, cgroup: &Cgroup, placement: Placement) -> Result<()> {
    let options =
        ProxyOptions { cgroup: Some(cgroup), placement: Some(placement), ..ProxyOptions::default() };
    node.start_proxy_with(&options)
}

fn changes(
    node: &Node,
    (client, server, outside): (&Pod, &Pod, &Pod),
    stack: Stack,
    first: First,
    (to, cgroup): (Placement, &Cgroup),
) -> Result<()> {
    let ways = [(client, server), (client, outside), (outside, client), (outside, server)];
    let reached = || ways.iter().map(|(_, server)| server.listen(stack)).collect::<Result<Vec<_>>>();
    // Proxies of both placements choose delivery ports independently, so the open connections have servers of their
    // own.
    let (servers, talked_to) = (reached()?, reached()?);
    let towards = |servers: &[Server]| {
        let ends = ways.iter().zip(servers).map(|((from, pod), server)| {
            Ok(Target { from: from.netns(), stack, to: pod.endpoint(stack.family(), server.port())? })
        });
        ends.collect::<Result<Vec<_>>>()
    };
    let (targets, talking) = (towards(&servers)?, towards(&talked_to)?);
    let options = ProxyOptions { cgroup: Some(cgroup), placement: Some(to), ..ProxyOptions::default() };
    let over = AtomicBool::new(false);
    let mut former = None;
    let (tally, lines) = thread::scope(|scope| -> Result<_> {
        let over = &over;
        let talks: Vec<_> = talking
            .iter()
            .map(|target| {
                scope.spawn(move || {
                    let mut lines = 0;
                    let talked = load::talk(target, LIMIT, || over.load(Ordering::Relaxed), &mut lines);
                    talked.map(|()| lines)
                })
            })
            .collect();
        let tally = load::paced(&targets, LIMIT, PAUSE, || {
            thread::sleep(A_WHILE);
            node.end_agent()?;
            let agent = || start_agent(node, to);
            match first {
                First::Agent => {
                    agent()?;
                    thread::sleep(A_WHILE);
                    former = node.start_another_proxy(&options)?;
                }
                First::Proxy => {
                    former = node.begin_another_proxy(&options)?;
                    thread::sleep(A_WHILE);
                    agent()?;
                    node.wait_for_proxy()?;
                }
            }
            for pod in [client, server] {
                wait::until_true("pod that has come over", wait::SOON, || {
                    Ok(node.report(pod)?.is_some_and(|report| report.state == PodState::Captured))
                })?;
            }
            let (detail, _) = show(node, server)?;
            let surplus = |state| state == FactState::Surplus;
            ensure!(
                detail.expectations.iter().any(|expected| surplus(expected.state)),
                "`redirect pod` does not show what open connections still need: {:?}",
                detail.expectations
            );
            ensure!(placements_found(node)?["state"] == "warn", "`redirect doctor` finds nothing wrong");
            thread::sleep(A_WHILE);
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        let mut lines = 0;
        for talk in talks {
            lines += talk
                .join()
                .map_err(|_| anyhow!("a client panicked"))?
                .with_context(|| format!("an open connection, to placement {}", spelled(to)))?;
        }
        Ok((tally?, lines))
    })?;
    println!(
        "to placement {}, {first:?} first, {stack}: {tally}; {lines} lines on open connections",
        spelled(to)
    );
    ensure!(tally.failed.is_empty() && tally.bypassed == 0, "{tally}: {:#?}", tally.failed);
    ensure!(tally.succeeded() > 200 && lines > 100, "hardly any load: {tally}; {lines} lines");
    // Only the proxy of the new placement runs from here on.
    former.context("no proxy ran before")?.process().terminate()?;
    let tally = load::paced(&targets, LIMIT, PAUSE, || {
        thread::sleep(2 * A_WHILE);
        Ok(())
    })?;
    ensure!(
        tally.failed.is_empty() && tally.bypassed == 0,
        "without the former proxy: {tally}: {:#?}",
        tally.failed
    );
    Ok(())
}

/// The report of `redirect doctor` on placements.
fn placements_found(node: &Node) -> Result<serde_json::Value> {
    let mut command = Command::new(&node.session().binaries().redirect);
    command.args(["doctor", "-o", "json", "--pin-dir"]).arg(node.pin_dir());
    command.arg("--state-dir").arg(node.state_dir());
    let output = node.netns().run(|| command.output())??;
    let checks: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    checks.into_iter().find(|check| check["check"] == "placement").context("no such check")
}

/// Only state of the new placement is left.
fn nothing_is_left(node: &Arc<Node>, placement: Placement, before: &Footprint, pods: &[&Pod]) -> Result<()> {
    let links = node.pin_dir().join("links");
    let left = || -> Result<Vec<String>> {
        let names = fs::read_dir(&links)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names = names.collect::<Result<Vec<String>>>()?;
        let is_left = |name: &String| match placement {
            Placement::Pod => {
                name.ends_with("-host") || name.starts_with("from_pod") || name.starts_with("to_pod")
            }
            Placement::Node => {
                [
                    "outbound",
                    "sendmsg",
                    "recvmsg",
                    "getpeername",
                    "loopback",
                    "inbound",
                    "egress",
                    "host_gate",
                ]
                .iter()
                .any(|program| name.starts_with(program))
                    || (name.contains("listener") && !name.ends_with("-host"))
            }
        };
        let mut left: Vec<String> = names.into_iter().filter(is_left).collect();
        match placement {
            Placement::Pod => {
                let now = Footprint::of(node.netns())?;
                let changed = |now: &dyn std::fmt::Debug, then: &dyn std::fmt::Debug| {
                    let (now, then) = (format!("{now:?}"), format!("{then:?}"));
                    (now != then).then_some(now)
                };
                left.extend(changed(&now.rules, &before.rules));
                left.extend(changed(&now.sysctls, &before.sysctls));
                let links = node.netns().json("ip -j link show")?;
                let named = |link: &serde_json::Value| link["ifname"] == INGRESS_DEVICE;
                left.extend(
                    links.as_array().into_iter().flatten().find(|link| named(link)).map(ToString::to_string),
                );
            }
            Placement::Node => {
                let plain = Footprint::of(node.plain("plain", Families::Dual)?.netns())?;
                for pod in pods {
                    left.extend(Footprint::of(pod.netns())?.difference(&plain));
                }
            }
        }
        let doctor = placements_found(node)?;
        left.extend((doctor["state"] != "ok").then(|| doctor.to_string()));
        for pod in pods {
            let (detail, _) = show(node, pod)?;
            let is_odd = |state| !matches!(state, FactState::Present | FactState::Unused);
            let odd = detail.expectations.into_iter().filter(|expected| is_odd(expected.state));
            left.extend(odd.map(|expected| format!("{expected:?}")));
        }
        Ok(left)
    };
    let done = wait::until_true("clean node", 2 * wait::SOON, || Ok(left()?.is_empty()));
    done.with_context(|| format!("left behind by the former placement: {:#?}", left()))
}
