//! Changes by other software in the kernel are detected, repaired and reported, while the agent runs and when
//! it starts.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{NetlinkAddr, getsockname, getsockopt, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::Pid;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{
    REPLY_TABLE, ROUTE_TABLE, RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY, RULE_PRIORITY_REFUSE,
    RULE_PRIORITY_SOURCE,
};
use redirect_tests::cluster::Cluster;
use redirect_tests::kernel::Footprint;
use redirect_tests::process::descriptor_of;
use redirect_tests::{Families, Node, NodeOptions, Pod, Stack, wait};
use serde_json::Value;

use crate::context::{Context, trial};
use crate::flows::pinned;
use crate::logs::lines;
use crate::{inbound, metrics, outbound};

/// The damage.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Rule(Family),
    Route(Family),
    Filter(Family),
    Qdisc,
    Sysctls,
    LoopbackDown,
    Pin,
    Detach,
    NodePin,
    NodeDetach,
    MapEntry,
    Counters,
}

impl Damage {
    const ALL: [Self; 15] = [
        Self::Rule(Family::Ipv4),
        Self::Rule(Family::Ipv6),
        Self::Route(Family::Ipv4),
        Self::Route(Family::Ipv6),
        Self::Filter(Family::Ipv4),
        Self::Filter(Family::Ipv6),
        Self::Qdisc,
        Self::Sysctls,
        Self::LoopbackDown,
        Self::Pin,
        Self::Detach,
        Self::NodePin,
        Self::NodeDetach,
        Self::MapEntry,
        Self::Counters,
    ];

    /// The kind of the repair.
    const fn kind(self) -> &'static str {
        match self {
            Self::Rule(_) => "rule",
            Self::Route(_) => "route",
            Self::Filter(_) | Self::Qdisc => "program",
            Self::Sysctls => "sysctl",
            Self::LoopbackDown => "interface",
            Self::Pin | Self::Detach | Self::NodePin | Self::NodeDetach => "link",
            Self::MapEntry | Self::Counters => "map",
        }
    }

    fn name(self) -> String {
        let text = format!("{self:?}").to_lowercase().replace('(', "_").replace(')', "");
        text.replace("node", "node_")
            .replace("mapentry", "map_entry")
            .replace("loopbackdown", "loopback_down")
    }

    fn inflict(self, node: &Node, pod: &Pod) -> Result<()> {
        let netns = pod.netns();
        let flag = |family| if family == Family::Ipv4 { "-4" } else { "-6" };
        let cookie = netns.cookie()?;
        let links = ["noted_listener", "listener_guard"].map(|program| format!("{program}-{cookie}"));
        match self {
            Self::Rule(family) => {
                let own = match family {
                    Family::Ipv4 => RULE_PRIORITY_SOURCE,
                    Family::Ipv6 => RULE_PRIORITY_REFUSE,
                };
                for priority in [RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY, own] {
                    netns.ip(&format!("{} rule del pref {priority}", flag(family)))?;
                }
            }
            Self::Route(family) => {
                netns.ip(&format!("{} route flush table {ROUTE_TABLE}", flag(family)))?;
                if family == Family::Ipv6 {
                    netns.ip(&format!("-6 route flush table {REPLY_TABLE}"))?;
                }
            }
            Self::Filter(family) => {
                for (device, side) in [("lo", "ingress"), ("eth0", "ingress"), ("eth0", "egress")] {
                    netns.delete_filters(device, side, family).ok();
                }
            }
            Self::Qdisc => {
                netns.json("tc qdisc del dev eth0 clsact").ok();
            }
            Self::Sysctls => {
                for name in
                    ["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"]
                {
                    netns.set_sysctl(name, "0")?;
                }
            }
            Self::LoopbackDown => {
                netns.ip("link set lo down")?;
            }
            Self::Pin => {
                for link in links {
                    fs::remove_file(node.pin_dir().join("links").join(link))?;
                }
            }
            Self::Detach => links.iter().try_for_each(|link| detach(node, link))?,
            Self::NodePin => fs::remove_file(node.pin_dir().join("links/outbound_ipv4"))?,
            Self::NodeDetach => detach(node, "outbound_ipv6")?,
            Self::MapEntry | Self::Counters => {
                let map = if matches!(self, Self::Counters) { "POD_COUNTERS" } else { "PODS" };
                let mut command = Command::new("bpftool");
                command.args(["map", "delete", "pinned"]).arg(pinned(node, map)?).args(["key", "hex"]);
                command.args(cookie.to_ne_bytes().map(|byte| format!("{byte:02x}")));
                ensure!(command.status()?.success(), "{command:?}");
            }
        }
        Ok(())
    }
}

fn detach(node: &Node, link: &str) -> Result<()> {
    let mut command = Command::new("bpftool");
    command.args(["link", "detach", "pinned"]).arg(node.pin_dir().join("links").join(link));
    ensure!(command.status()?.success(), "{command:?}");
    Ok(())
}

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for damage in Damage::ALL {
        trials.push(trial(context, format!("repairs::while_running::{}", damage.name()), move |context| {
            while_running(context, damage)
        }));
    }
    trials.push(trial(context, "repairs::while_adds_wait", while_adds_wait));
    trials.push(trial(context, "repairs::not_by_adds", not_by_adds));
    trials.push(trial(context, "repairs::after_the_watch_has_failed", after_the_watch_has_failed));
    trials.push(trial(context, "repairs::at_start", at_start));
    trials.push(trial(context, "repairs::are_told_in_kubernetes", event));
    trials.push(trial(context, "repairs::namespace_made_anew::while_running", |context| anew(context, true)));
    trials.push(trial(context, "repairs::namespace_made_anew::at_start", |context| anew(context, false)));
    trials
}

/// The deadline for a repair: the interval of the checks, on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

fn node(context: &Context) -> Result<Arc<Node>> {
    let agent_arguments = ["--on-exit", "keep"].map(str::to_owned).to_vec();
    Node::with(&context.session()?, NodeOptions { agent_arguments, ..NodeOptions::default() })
}

fn repairs(node: &Node, kind: &str) -> Result<u64> {
    let repairs = node.status()?.repairs;
    Ok(repairs.into_iter().find(|report| report.kind == kind).map_or(0, |report| report.repairs))
}

fn works(pod: &Pod, other: &Pod) -> Result<()> {
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(pod, other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

fn while_running(context: &Context, damage: Damage) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (before, links) = (Footprint::of(pod.netns())?, links(&node)?);
    ensure!(repairs(&node, damage.kind())? == 0);
    damage.inflict(&node, &pod)?;
    wait::until_true("repair", LIMIT, || {
        Ok(repairs(&node, damage.kind())? > 0 && Footprint::of(pod.netns())? == before)
    })
    .with_context(|| format!("{:?}, {:#?}", node.status(), Footprint::of(pod.netns())))?;
    ensure!(self::links(&node)? == links, "the pins are not what they were");
    pod.check()?;
    works(&pod, &other)
}

/// Pods whose ADD waits for an absent proxy delay nothing else: neither repairs of another pod and of the node, nor `status`, nor
/// DEL.
fn while_adds_wait(context: &Context) -> Result<()> {
    const PODS: usize = 50;
    // Nearly as long as the plugin's deadline.
    let deadline = wait::patient(2 * wait::SOON).as_secs() - 1;
    let arguments = ["--on-exit", "keep", "--proxy-deadline", &deadline.to_string()].map(str::to_owned);
    let options = NodeOptions { agent_arguments: arguments.to_vec(), ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let (pod, gone) = (node.enrolled("pod", Families::Dual)?, node.enrolled("gone", Families::Dual)?);
    let before = Footprint::of(pod.netns())?;
    let waiting = (0..PODS).map(|number| node.plain(&format!("waiting-{number}"), Families::Dual));
    let waiting: Vec<Pod> = waiting.collect::<Result<_>>()?;
    node.kill_proxy()?;
    node.with_agent(|agent| agent.wait_for_no_proxy())?;

    let mut figures = Vec::new();
    std::thread::scope(|scope| {
        let adds: Vec<_> = waiting.iter().map(|pod| scope.spawn(|| pod.enroll())).collect();
        wait::until_true("pods that wait", LIMIT, || Ok(node.reports()?.len() == PODS + 2))?;
        let mut measure = |what: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let began = std::time::Instant::now();
            work().with_context(|| format!("{what}, with {PODS} pods that wait"))?;
            figures.push(format!("{what} {} ms", began.elapsed().as_millis()));
            Ok(())
        };
        measure("status", &mut || node.status().map(drop))?;
        measure("pods", &mut || node.reports().map(drop))?;
        for damage in [Damage::Rule(Family::Ipv4), Damage::Rule(Family::Ipv6), Damage::NodeDetach] {
            let earlier = repairs(&node, damage.kind())?;
            damage.inflict(&node, &pod)?;
            measure(&format!("repair of {}", damage.name()), &mut || {
                wait::until_true("repair", LIMIT, || Ok(repairs(&node, damage.kind())? > earlier))
            })?;
        }
        ensure!(Footprint::of(pod.netns())? == before);
        measure("DEL", &mut || gone.unenroll())?;
        let (first, rest) = waiting.split_first().context("one that waits")?;
        measure("DEL of one that waits", &mut || first.unenroll())?;
        let ended = adds.iter().skip(1).filter(|add| add.is_finished()).count();
        ensure!(ended == 0, "{ended} ADDs have ended: nothing is known of how they delay others");

        node.start_proxy()?;
        for (number, add) in adds.into_iter().enumerate() {
            let outcome = add.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            ensure!(outcome.is_err() == (number == 0), "ADD {number}: {outcome:?}");
        }
        for pod in rest {
            pod.check()?;
        }
        ensure!(node.report(first)?.is_none() && node.report(&gone)?.is_none());
        anyhow::Ok(())
    })?;
    println!("with {PODS} ADDs that wait: {}", figures.join(", "));
    works(&pod, &gone)
}

/// An ADD observes a pod once: changes by earlier CNI plugins, and its own, do not cause another observation.
fn not_by_adds(context: &Context) -> Result<()> {
    const PODS: usize = 10;
    let log = "info,redirect_datapath=debug";
    let arguments = ["--on-exit", "keep", "--check-interval", "3600", "--log-format", "json", "--log", log]
        .map(str::to_owned);
    let options = NodeOptions { agent_arguments: arguments.to_vec(), ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let last = node.enrolled("last", Families::Dual)?;
    let looks = |pod: &Pod| -> Result<usize> {
        let lines = lines(&node)?;
        let is_one = |line: &&Value| {
            line["message"] == "reconciling datapath" && line["uid"] == pod.identity().uid.as_str()
        };
        Ok(lines.iter().filter(is_one).count())
    };
    let pods = (0..PODS).map(|number| node.enrolled(&format!("pod-{number}"), Families::Dual));
    let pods: Vec<Pod> = pods.collect::<Result<_>>()?;
    // All notifications about the others are ahead of this.
    let before = looks(&last)?;
    last.netns().ip("link set eth0 alias another")?;
    wait::until_true("look at the pod that changed", LIMIT, || Ok(looks(&last)? > before))?;
    let all: Vec<usize> = pods.iter().map(&looks).collect::<Result<_>>()?;
    println!("{PODS} ADDs looked at {} pods", all.iter().sum::<usize>());
    ensure!(all.iter().all(|looks| *looks == 1), "{all:?}");
    Ok(())
}

/// The watch's socket fails twice. The log, readiness and the metrics show it, but the agent is not restarted: the watch restarts
/// after a pause, and repairs are immediate again.
fn after_the_watch_has_failed(context: &Context) -> Result<()> {
    const SERVICE: &str = "watch of pods' interfaces";
    let ends = format!("redirect_service_ends_total{{service=\"{SERVICE}\"}}");
    // Only the watch can detect changes.
    let arguments = ["--on-exit", "keep", "--check-interval", "3600"].map(str::to_owned);
    let options = NodeOptions { agent_arguments: arguments.to_vec(), ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(pod.netns())?;
    let ended = |times: f64| Ok(metrics::value(&metrics::scrape(&node)?, &ends)? == times);
    let is_ready = || Ok(metrics::get(&node, "/readyz").is_ok_and(|(status, _)| status == "200"));
    wait::until_true("ready agent", LIMIT, is_ready)?;
    ensure!(metrics::scrape(&node)?.contains(&ends) && ended(0.0)?, "it is not counted from zero");
    for times in [1.0, 2.0] {
        fail_the_watch(&node)?;
        // The watch reads its socket again after an event.
        pod.netns().ip("link set eth0 alias another")?;
        wait::until_true("end of the watch", LIMIT, || ended(times))?;
        let (status, body) = metrics::get(&node, "/readyz")?;
        ensure!(status == "503" && body.contains(&format!("[-] services: {SERVICE}: ")), "{status}: {body}");
        let (status, body) = metrics::get(&node, "/healthz")?;
        ensure!(status == "200", "{status}: {body}");
        // It restarts by itself: one of its sockets works.
        wait::until_true("another watch", LIMIT, || {
            Ok(watching(&node)?.iter().any(|socket| !is_failed(socket)))
        })?;
    }
    for damage in Family::ALL.map(Damage::Rule) {
        let earlier = repairs(&node, damage.kind())?;
        damage.inflict(&node, &pod)?;
        wait::until_true("repair", LIMIT, || {
            Ok(repairs(&node, damage.kind())? > earlier && Footprint::of(pod.netns())? == before)
        })?;
    }
    works(&pod, &other)?;
    wait::until_true("ready agent", 2 * LIMIT, is_ready)?;
    ensure!(ended(2.0)?);
    let lines = node.with_agent(|agent| Ok(agent.process().log()))?;
    ensure!(lines.contains("a service of the agent ended") && lines.contains(SERVICE), "{lines}");
    Ok(())
}

/// The agent's sockets for notifications.
fn watching(node: &Node) -> Result<Vec<OwnedFd>> {
    let agent: i32 = node.with_agent(|agent| Ok(agent.process().pid()))?.try_into()?;
    let mut watching = Vec::new();
    for entry in fs::read_dir(format!("/proc/{agent}/fd"))?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be closed by now, or not be a socket.
        let Ok(socket) = descriptor_of(agent, number) else { continue };
        let address = getsockname::<NetlinkAddr>(socket.as_raw_fd());
        if address.is_ok_and(|address| address.groups() != 0) {
            watching.push(socket);
        }
    }
    Ok(watching)
}

/// Makes the next receive of the watch fail.
fn fail_the_watch(node: &Node) -> Result<()> {
    let watching = watching(node)?;
    ensure!(!watching.is_empty(), "nobody watches");
    Ok(watching.iter().try_for_each(|socket| setsockopt(socket, ReceiveTimeout, &FAILED))?)
}

const FAILED: TimeVal = TimeVal::new(0, 1000);

fn is_failed(socket: &OwnedFd) -> bool {
    getsockopt(socket, ReceiveTimeout).is_ok_and(|timeout| timeout.num_microseconds() > 0)
}

fn links(node: &Node) -> Result<Vec<String>> {
    let entries = fs::read_dir(node.pin_dir().join("links"))?.flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

fn event(context: &Context) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let pod = cluster.node().plain("pod", Families::Dual)?;
    cluster.announce(&pod, &[]);
    pod.enroll()?;
    for (family, damage) in Family::ALL.map(|family| (family, Damage::Rule(family))) {
        damage.inflict(cluster.node(), &pod)?;
        let rule = format!("{family} rule for captured connections");
        wait::until_true("event", LIMIT, || Ok(cluster.events(&pod).iter().any(|note| note.contains(&rule))))
            .with_context(|| format!("{:?}", cluster.events(&pod)))?;
    }
    Ok(())
}

/// Everything at once, while no agent runs.
fn at_start(context: &Context) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (before, links) = (Footprint::of(pod.netns())?, links(&node)?);
    node.kill_agent()?;
    for damage in Damage::ALL {
        // A link has to be pinned to be detached.
        if !matches!(damage, Damage::Detach) {
            damage.inflict(&node, &pod).with_context(|| format!("{damage:?}"))?;
        }
    }
    node.start_agent(&["--on-exit", "keep"].map(str::to_owned))?;
    node.wait_for_proxy()?;
    let after = Footprint::of(pod.netns())?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    ensure!(self::links(&node)? == links, "the pins are not what they were");
    for kind in ["rule", "route", "program", "sysctl", "interface", "link"] {
        ensure!(repairs(&node, kind)? > 0, "no repair of kind {kind} is counted");
    }
    pod.check()?;
    works(&pod, &other)
}

/// The pod's namespace is replaced by another one with the same addresses.
fn anew(context: &Context, running: bool) -> Result<()> {
    let node = node(context)?;
    let (addresses, other) = (node.to_choose(5), node.plain("other", Families::Dual)?);
    let spec = node.numbered("pod", Families::Dual).with_addresses(&addresses).not_enrolled();
    let old = Pod::start(&node, spec.clone())?;
    let path = node.dir().join("netns");
    symlink(old.netns().path(), &path)?;
    old.enroll_at(path.clone())?;
    let agent = Pid::from_raw(i32::try_from(node.with_agent(|agent| Ok(agent.process().pid()))?)?);
    if running {
        // To the agent there is no moment without a namespace.
        kill(agent, Signal::SIGSTOP)?;
    } else {
        node.kill_agent()?;
    }
    let identity = old.identity().clone();
    drop(old.end_without_del()?);
    let new = Pod::start(&node, spec)?;
    fs::remove_file(&path)?;
    symlink(new.netns().path(), &path)?;
    if running {
        kill(agent, Signal::SIGCONT)?;
    } else {
        node.start_agent(&["--on-exit", "keep"].map(str::to_owned))?;
    }
    let cookie = new.netns().cookie()?;
    wait::until_true("pod in its new namespace", LIMIT, || {
        let pods = node.with_agent(|agent| agent.pods())?;
        Ok(pods.iter().any(|report| report.pod.uid == identity.uid && report.netns_cookie == cookie))
    })?;
    ensure!(repairs(&node, "namespace")? == 1);
    node.wait_for_proxy()?;
    node.netns().ip("neighbour flush all")?;
    other.netns().ip("neighbour flush all")?;
    wait::until_true("proxy in the new namespace", LIMIT, || {
        let pods = node.with_agent(|agent| agent.pods())?;
        Ok(pods.iter().any(|report| report.proxy.is_ok()))
    })?;
    for stack in Stack::ALL {
        let listening = other.listen(stack)?;
        let to = other.endpoint(stack.family(), listening.port())?;
        ensure!(!new.connect(stack, to)?.is_direct(), "past the proxy");
        let listening = new.listen(stack)?;
        let to = new.endpoint(stack.family(), listening.port())?;
        ensure!(!other.connect(stack, to)?.is_direct(), "past the proxy");
    }
    Ok(())
}
