//! `redirect pod` and `redirect explain` agree with `ip` and the sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND, RULE_PRIORITY_DELIVERY, RULE_PRIORITY_SOURCE};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::{Expectation, Explanation, FactState, PodDetail, PodState};
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Node, Pod, PodSpec, ProxyKind, Stack, agent, wait};
use redirect_zds::client::{Backoff, Workloads, follow};
use redirect_zds::messages::WorkloadInfo;
use tokio::runtime::Runtime;

use crate::context::{Context, for_every_stack, trial};
use crate::exclusions;
use crate::flows::pinned;

/// A network that no test routes.
const V4: &str = "192.0.2.1:80";
const V6: &str = "[2001:db8::1]:80";
const MAPPED: &str = "[::ffff:192.0.2.1]:80";

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = vec![
        trial(context, "inspect::a_pod_is_shown_as_ip_shows_it", pod),
        trial(context, "inspect::a_pod_that_is_not_enrolled_is_an_error", absent),
        trial(context, "inspect::a_missing_listener_is_named", silent),
        trial(context, "inspect::completion_names_the_commands", completion),
    ];
    trials.extend(for_every_stack(context, "inspect::a_decision_is_the_kernel_s", decisions));
    trials.extend(for_every_stack(context, "inspect::what_is_broken_is_named", broken));
    trials.extend(for_every_stack(context, "inspect::service_account", service_account));
    trials
}

fn redirect(node: &Node, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(&node.session().binaries().redirect);
    command.args(arguments).arg("--socket").arg(node.agent_socket()).args(["-o", "json"]);
    Ok(command.output()?)
}

pub(crate) fn explain(node: &Node, pod: &Pod, to: &str) -> Result<(Explanation, Option<i32>)> {
    let output = redirect(node, &["explain", "--from", &pod.identity().to_string(), "--to", to])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    Ok((serde_json::from_slice(&output.stdout).with_context(|| stderr.into_owned())?, output.status.code()))
}

pub(crate) fn show(node: &Node, pod: &Pod) -> Result<(PodDetail, Option<i32>)> {
    let output = redirect(node, &["pod", &pod.identity().to_string()])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    Ok((serde_json::from_slice(&output.stdout).with_context(|| stderr.into_owned())?, output.status.code()))
}

/// The priorities of the rules of an enrolled pod.
const OURS: std::ops::RangeInclusive<u64> = RULE_PRIORITY_SOURCE as u64..=RULE_PRIORITY_DELIVERY as u64;

fn pod(context: &Context) -> Result<()> {
    let node = context.node()?;
    for families in Families::ALL {
        let pod = node.enrolled("pod", families)?;
        let (detail, code) = show(&node, &pod)?;
        ensure!(code == Some(0), "{detail:#?}");
        let tunnels = context.proxy()? == ProxyKind::Ztunnel;
        for expectation in &detail.expectations {
            let unused = !tunnels && expectation.what.contains("port 15008");
            let wanted = if unused { FactState::Unused } else { FactState::Present };
            ensure!(expectation.state == wanted, "{expectation:?}");
        }
        let named = |part: &str| detail.expectations.iter().filter(|of| of.what.contains(part)).count();
        let footprint = Footprint::of(pod.netns())?;
        let is_ours = |rule: &&serde_json::Value| {
            rule["priority"].as_u64().is_some_and(|priority| OURS.contains(&priority))
        };
        let rules = footprint.rules.iter().filter(is_ours).count();
        ensure!(named(" rule for ") == rules, "{detail:#?}\n{footprint:#?}");
        ensure!(named(" route ") == footprint.routes.len(), "{detail:#?}\n{footprint:#?}");
        for address in pod.addresses() {
            ensure!(named(&format!("map entry of address {address}")) == 1, "{detail:#?}");
        }
        let bound = listeners(&pod)?;
        for family in Family::ALL {
            for (transport, port) in
                [("TCP", 15001), ("TCP", 15006), ("TCP", 15008), ("TCP", 15053), ("UDP", 15053)]
            {
                let expected = usize::from(pod.families().has(family));
                let what = format!("listener of the node proxy, {transport} port {port}, {family}");
                ensure!(named(&what) == expected, "{what}: {detail:#?}");
                let there = bound.contains(&(transport.to_lowercase(), port));
                ensure!(there == (tunnels || port != 15008), "{what}: {bound:?}");
            }
        }
    }
    Ok(())
}

/// The ports that `ss` shows where the proxy's sockets are.
pub(crate) fn listeners(pod: &Pod) -> Result<Vec<(String, u16)>> {
    let mut ss = Command::new("ss");
    ss.args(["--no-header", "--listening", "--numeric", "--tcp", "--udp"]);
    let output = pod.proxy_netns().output(ss, b"")?;
    let text = String::from_utf8(output)?;
    let ports = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (transport, local) = (words.next()?, words.nth(3)?);
        Some((transport.to_owned(), local.rsplit_once(':')?.1.parse().ok()?))
    });
    Ok(ports.collect())
}

fn absent(context: &Context) -> Result<()> {
    let node = context.node()?;
    let plain = node.plain("plain", Families::Dual)?;
    let name = plain.identity().to_string();
    for arguments in [&["pod", &name][..], &["explain", "--from", &name, "--to", V6]] {
        let output = redirect(&node, arguments)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(2) && text.contains("is not enrolled"), "{arguments:?}: {text}");
    }
    Ok(())
}

fn completion(context: &Context) -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let session = context.session()?;
        let output = Command::new(&session.binaries().redirect).args(["completion", shell]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && text.contains("explain"), "{shell}: {text}");
    }
    Ok(())
}

fn destination(stack: Stack) -> &'static str {
    match stack {
        Stack::V4 => V4,
        Stack::V6 => V6,
        Stack::Mapped => MAPPED,
    }
}

fn decisions(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let own = stack.spell(pod.endpoint(stack.family(), 80)?).to_string();
    for (to, captured, word) in
        [(destination(stack), true, "goes to the node proxy"), (&own, false, "own_address")]
    {
        let (explanation, code) = explain(&node, &pod, to)?;
        ensure!(code == Some(0), "{explanation:#?}");
        ensure!(explanation.family == stack.family().name(), "{explanation:#?}");
        ensure!(explanation.captured == captured && explanation.verdict.contains(word), "{explanation:#?}");
    }
    Ok(())
}

/// Removes state without notifications. Returns the report about it.
fn spoil(context: &Context, pod: &Pod, family: Family) -> Result<String> {
    if context.placement() == Placement::Pod {
        let sysctl = match family {
            Family::Ipv4 => "net.ipv4.fwmark_reflect",
            Family::Ipv6 => "net.ipv6.fwmark_reflect",
        };
        pod.netns().set_sysctl(sysctl, "0")?;
        return Ok(format!("sysctl {sysctl}"));
    }
    let address = pod.address(family)?;
    let (map, key) = match address {
        IpAddr::V4(address) => ("POD_IPV4", address.octets().to_vec()),
        IpAddr::V6(address) => ("POD_IPV6", address.octets().to_vec()),
    };
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "delete", "pinned"]).arg(pinned(pod.node(), map)?).arg("key");
    let output = bpftool.args(key.iter().map(ToString::to_string)).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    // The second time there is nothing to remove.
    ensure!(output.status.success() || stderr.contains("No such file"), "{stderr}");
    Ok(format!("map entry of address {address}"))
}

/// Damage that the agent has not noticed yet. The other family is intact.
fn broken(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--check-interval", "3600"])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    in_time(|| {
        let spoilt = spoil(context, &pod, stack.family())?;
        let complaint = format!("{spoilt} is missing");
        for other in Stack::ALL {
            let (explanation, code) = explain(&node, &pod, destination(other))?;
            let wrong = other.family() == stack.family();
            ensure!(code == Some(i32::from(wrong)) && explanation.captured, "{other:?}: {explanation:#?}");
            ensure!(explanation.wrong.first() == wrong.then_some(&complaint), "{other:?}: {explanation:#?}");
        }
        let (detail, code) = show(&node, &pod)?;
        let fault = |of: &&Expectation| !matches!(of.state, FactState::Present | FactState::Unused);
        let found = detail.expectations.iter().filter(fault);
        let missing: Vec<_> = found.map(|of| &of.what).collect();
        ensure!(code == Some(1) && missing == [&spoilt], "{detail:#?}");
        Ok(())
    })?;

    node.kill_proxy()?;
    node.with_agent(|agent| agent.wait_for_no_proxy())?;
    in_time(|| {
        let complaint = format!("{} is missing", spoil(context, &pod, stack.family())?);
        let (explanation, _) = explain(&node, &pod, destination(stack))?;
        ensure!(
            explanation.wrong == [complaint, "no node proxy is connected".to_owned()],
            "{explanation:#?}"
        );
        Ok(())
    })?;
    // And no process listens any more.
    let (detail, _) = show(&node, &pod)?;
    let listening: Vec<_> =
        detail.expectations.iter().filter(|of| of.what.starts_with("listener of the node proxy")).collect();
    ensure!(listening.len() == 10, "{detail:#?}");
    ensure!(listening.iter().all(|of| of.state == FactState::Missing), "{detail:#?}");
    ensure!(!listeners(&pod)?.iter().any(|(_, port)| (15001..=15053).contains(port)));
    ensure!(node.report(&pod)?.is_some_and(|report| report.state == PodState::Waiting));
    Ok(())
}

/// A proxy that exists, but does not listen for the connection's family; in a pod, for none.
fn silent(context: &Context) -> Result<()> {
    let node = context.session().and_then(|session| Node::start(&session))?;
    let pod = node.enrolled("pod", Families::Dual)?;
    node.kill_proxy()?;
    for stack in Stack::ALL {
        let (explanation, code) = explain(&node, &pod, destination(stack))?;
        ensure!(code == Some(1) && explanation.captured, "{explanation:#?}");
        ensure!(explanation.wrong == ["no node proxy is connected"], "{explanation:#?}");
    }
    if context.placement() == Placement::Pod {
        let _idle = idle_proxy(&node, Told::default())?;
        return lacks_listeners(&node, &pod, &Family::ALL);
    }
    for family in Family::ALL {
        let listening = listen_beside(&node, family)?;
        lacks_listeners(&node, &pod, &[family])?;
        drop(listening);
        node.with_agent(|agent| agent.wait_for_no_proxy())?;
    }
    Ok(())
}

/// The pod is acknowledged, and connections of exactly these families have no listener.
fn lacks_listeners(node: &Node, pod: &Pod, families: &[Family]) -> Result<()> {
    let served = || Ok(node.report(pod)?.is_some_and(|report| report.state == PodState::Captured));
    wait::until_true("pod that is acknowledged", wait::SOON, served)?;
    for stack in Stack::ALL {
        let family = stack.family();
        let missing = families.contains(&family);
        let complaint = format!("listener of the node proxy, TCP port 15001, {family} is missing");
        let (explanation, code) = explain(node, pod, destination(stack))?;
        ensure!(code == Some(i32::from(missing)) && explanation.captured, "{explanation:#?}");
        ensure!(explanation.wrong == Vec::from_iter(missing.then_some(complaint)), "{explanation:#?}");
    }
    Ok(())
}

/// A pod's service account comes from the runtime or the agent's option, or there is none. The agent announces it to the node
/// proxy, and `explain` notes what the agent can't know.
fn service_account(context: &Context, stack: Stack) -> Result<()> {
    context.needs_placement_pod("the agent sends no pods to a proxy on the host")?;
    let mapping = "default/named*=option,default/mapped-*=option,default/mapped-*=second";
    let node = Node::with_arguments(&context.session()?, &["--service-account", mapping])?;
    let cases = [("named", "runtime", "runtime"), ("mapped-1", "", "option"), ("unnamed", "", "")];
    let start = |(name, runtime, account): (&str, &str, &'static str)| {
        let spec = PodSpec::new(name, Families::Dual).with_service_account(runtime);
        Pod::start(&node, spec).map(|pod| (pod, account))
    };
    let pods = cases.into_iter().map(start).collect::<Result<Vec<_>>>()?;
    let told = Told::default();
    let _idle = idle_proxy(&node, told.clone())?;
    for (pod, account) in &pods {
        let uid = &pod.identity().uid;
        let of = || told.lock().ok().and_then(|told| told.get(uid).map(|info| info.service_account.clone()));
        wait::until_true("pod at the proxy", wait::SOON, || Ok(of().is_some()))?;
        ensure!(of().as_deref() == Some(account), "{}: {:?}", pod.identity(), of());
        let acknowledged = || Ok(node.report(pod)?.is_some_and(|report| report.proxy == Ok(())));
        wait::until_true("pod that is acknowledged", wait::SOON, acknowledged)?;
        let (explanation, code) = explain(&node, pod, destination(stack))?;
        ensure!(code == Some(0) && explanation.captured, "{explanation:#?}");
        let noted = explanation.notes.iter().any(|note| note.contains("--service-account"));
        ensure!(noted == account.is_empty(), "{explanation:#?}");
    }
    let (status, text) = exclusions::refused(context, &["--service-account", "default/sh*p=a"])?;
    ensure!(status.code() == Some(2) && text.contains("last character"), "{status}: {text}");
    Ok(())
}

/// The workloads announced to a node proxy, by UID.
type Told = Arc<Mutex<BTreeMap<String, WorkloadInfo>>>;

/// Acknowledges pods as the node proxy does, and listens nowhere, until it is dropped.
fn idle_proxy(node: &Node, told: Told) -> Result<Runtime> {
    struct Idle(Told);

    impl Workloads for Idle {
        async fn add(&mut self, uid: String, info: WorkloadInfo, _: NetNs) -> Result<(), String> {
            self.0.lock().map_err(|error| error.to_string())?.insert(uid, info);
            Ok(())
        }

        async fn remove(&mut self, _: &str) {}

        async fn retain(&mut self, _: &BTreeSet<String>) {}
    }

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let socket = agent::zds_socket(node.dir());
    runtime.spawn(async move { follow(&socket, &mut Idle(told), Backoff::default()).await });
    Ok(runtime)
}

/// Listens like a node proxy on the host, for the other family only.
fn listen_beside(node: &Node, family: Family) -> Result<Vec<TcpListener>> {
    let address: IpAddr = match family {
        Family::Ipv4 => Ipv6Addr::LOCALHOST.into(),
        Family::Ipv6 => Ipv4Addr::LOCALHOST.into(),
    };
    let bind = |port| TcpListener::bind((address, port));
    Ok(node
        .netns()
        .run(|| [PORT_OUTBOUND, PORT_INBOUND].into_iter().map(bind).collect::<io::Result<_>>())??)
}

/// Retries: late events on a new pod's devices may make the agent observe the pod and repair the damage.
fn in_time(attempt: impl Fn() -> Result<()>) -> Result<()> {
    let mut last = Ok(());
    let waited = wait::until_true("attempt that the agent does not interrupt", wait::SOON, || {
        last = attempt();
        Ok(last.is_ok())
    });
    last.and(waited)
}
