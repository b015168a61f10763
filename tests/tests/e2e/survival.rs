//! The agent ends, in every way and at every moment, and another one takes over: no connection breaks, none fails, none
//! bypasses the proxy.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_protocol::placement::Placement;
use redirect_testing::Fault;
use redirect_tests::cluster::Cluster;
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Node, NodeOptions, Pod, Stack, traffic, wait};

use crate::context::{Context, for_every_stack, needs_tcx, trial};
use crate::{inbound, outbound};

/// How the agent is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Not at all: the load on its own.
    Nothing,
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Stop,
    /// SIGKILL, and again SIGKILL for each successor while it starts, until one is left alone.
    KillWhileStarting,
    /// An upgrade to a build with other programs, and back.
    Programs,
    /// An upgrade to a build with another layout of a map, and to other capacities, and back.
    Layout,
    /// To tcx links and back to filters.
    Method,
}

impl Change {
    const ALL: [Self; 7] = [
        Self::Nothing,
        Self::Kill,
        Self::Stop,
        Self::KillWhileStarting,
        Self::Programs,
        Self::Layout,
        Self::Method,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::KillWhileStarting => "kill_while_starting",
            Self::Programs => "other_programs",
            Self::Layout => "other_map_layout",
            Self::Method => "other_tc_method",
        }
    }
}

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for change in Change::ALL {
        let name = format!("survival::{}", change.label());
        trials
            .extend(for_every_stack(context, &name, move |context, stack| survives(context, stack, change)));
    }
    trials.push(trial(context, "survival::kill_in_the_middle_of_adds", kill_in_the_middle_of_adds));
    trials.push(trial(context, "survival::pods_that_end_meanwhile", pods_that_end_meanwhile));
    trials.push(trial(context, "survival::pods_that_leave_and_come_meanwhile", pods_that_come_meanwhile));
    trials.push(trial(context, "survival::pods_that_are_deleted_meanwhile", pods_that_are_deleted_meanwhile));
    for (what, deleted, forbidden) in
        [("stays", false, false), ("is_deleted", true, false), ("may_not_be_read", false, true)]
    {
        let name = format!("survival::daemonset_{what}");
        trials.push(trial(context, name, move |context| daemonset(context, deleted, forbidden)));
    }
    trials.push(trial(context, "survival::pin_of_another_map", pin_of_another_map));
    trials.push(trial(context, "survival::second_agent_is_refused", second_agent));
    trials.push(trial(context, "survival::bad_pin_directory", bad_pin_directory));
    trials
}

const KEEP: [&str; 2] = ["--on-exit", "keep"];

fn arguments(more: &[&str]) -> Vec<String> {
    KEEP.iter().chain(more).map(ToString::to_string).collect()
}

fn node(context: &Context) -> Result<Arc<Node>> {
    let options = NodeOptions { agent_arguments: arguments(&[]), ..NodeOptions::default() };
    Node::with(&context.session()?, options)
}

fn survives(context: &Context, stack: Stack, change: Change) -> Result<()> {
    /// How long there is no agent.
    const AWAY: Duration = Duration::from_millis(200);
    if change == Change::Method {
        needs_tcx()?;
    }
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (tally, ()) = traffic::during(&pod, &other, stack, || {
        let comes = |more: &[&str]| -> Result<()> {
            thread::sleep(AWAY);
            node.start_agent(&arguments(more))?;
            node.wait_for_proxy()?;
            ensure!(node.report(&pod)?.is_some(), "the agent does not know the pod");
            ensure!(node.report(&pod)?.is_some_and(|report| report.proxy.is_ok()), "the proxy does not");
            thread::sleep(AWAY);
            Ok(())
        };
        match change {
            Change::Nothing => thread::sleep(Duration::from_secs(3)),
            Change::Kill => {
                for _ in 0..3 {
                    node.kill_agent()?;
                    comes(&[])?;
                }
            }
            Change::Stop => {
                for _ in 0..3 {
                    node.end_agent()?;
                    comes(&[])?;
                }
            }
            Change::KillWhileStarting => {
                node.kill_agent()?;
                for _ in 0..8 {
                    node.begin_agent(&arguments(&[]))?;
                    thread::sleep(random(Duration::from_millis(400)));
                    node.kill_agent()?;
                }
                comes(&[])?;
            }
            Change::Programs => {
                let object = object(&node, Patch::Program)?;
                let before = program_ids(&node)?;
                for more in [&["--object", &object][..], &[]] {
                    node.end_agent()?;
                    comes(more)?;
                }
                ensure!(before.is_disjoint(&program_ids(&node)?), "the programs are the same");
            }
            Change::Layout => {
                let object = object(&node, Patch::Map)?;
                for more in [&["--object", &object][..], &["--max-pods", "77"], &[]] {
                    node.end_agent()?;
                    comes(more)?;
                    let pins = fs::read_dir(node.pin_dir().join("maps-v1"))?;
                    let pins = pins.map(|pin| Ok(pin?.file_name().to_string_lossy().into_owned()));
                    let pins = pins.collect::<Result<BTreeSet<String>>>()?;
                    let maps: BTreeSet<&str> = pins.iter().filter_map(|pin| pin.split('-').next()).collect();
                    ensure!(
                        maps.contains("FLOWS") && maps.len() == pins.len(),
                        "a map of another layout is left: {pins:?}"
                    );
                }
            }
            Change::Method => {
                for more in [&["--tc", "tcx"][..], &[]] {
                    node.end_agent()?;
                    comes(more)?;
                }
            }
        }
        Ok(())
    })?;
    println!("survival::{}::{}: {tally}", change.label(), stack.label());
    tally.check()?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

fn program_ids(node: &Node) -> Result<BTreeSet<u32>> {
    Ok(node.status()?.programs.into_iter().map(|program| program.id).collect())
}

/// A random duration up to this one.
fn random(most: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    most * (now.subsec_micros() % 1000) / 1000
}

/// How another build's object differs.
#[derive(Clone, Copy, Debug)]
enum Patch {
    /// How long a note is valid.
    Program,
    /// The capacity of `FLOWS`.
    Map,
}

/// The object of another build.
fn object(node: &Node, patch: Patch) -> Result<String> {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("bpf/redirect.o");
    let mut bytes = fs::read(&built).with_context(|| built.display().to_string())?;
    let (old, new): (Vec<u8>, Vec<u8>) = match patch {
        // A 64-bit addition of an immediate: the last four bytes of the instruction.
        Patch::Program => (1_000_000_000_u32.to_le_bytes().into(), 1_000_000_001_u32.to_le_bytes().into()),
        // A legacy map definition: type, key size, value size, entries.
        Patch::Map => {
            let definition =
                |entries: u32| [27, 0, 0, entries].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
            (definition(256 << 10), definition(128 << 10))
        }
    };
    let mut places = Vec::new();
    for place in (0..bytes.len() - old.len()).step_by(4) {
        if bytes[place..].starts_with(&old) {
            places.push(place);
        }
    }
    ensure!(!places.is_empty(), "{} has changed: {patch:?} finds nothing", built.display());
    for place in places {
        bytes[place..place + new.len()].copy_from_slice(&new);
    }
    let path = node.dir().join(format!("{patch:?}.o"));
    fs::write(&path, bytes)?;
    Ok(path.display().to_string())
}

/// At whatever moment, the pod is captured or untouched once the next agent runs; and captured if ADD succeeded.
fn kill_in_the_middle_of_adds(context: &Context) -> Result<()> {
    const ROUNDS: u32 = 12;
    let node = node(context)?;
    let other = node.plain("other", Families::Dual)?;
    let (mut done, mut undone) = (0, 0);
    for round in 0..ROUNDS {
        let pod = node.plain("pod", Families::Dual)?;
        let before = Footprint::of(pod.netns())?;
        let added = thread::scope(|scope| {
            let adding = scope.spawn(|| pod.enroll());
            thread::sleep(random(Duration::from_millis(40)));
            node.kill_agent()?;
            anyhow::Ok(adding.join())
        })?;
        let added = match added {
            Ok(added) => added,
            Err(_) => bail!("the client panicked"),
        };
        node.start_agent(&arguments(&[]))?;
        node.wait_for_proxy()?;
        let report = node.report(&pod)?;
        ensure!(added.is_err() || report.is_some(), "round {round}: ADD succeeded, and the pod is not known");
        if report.is_some() {
            done += 1;
            for stack in Stack::ALL {
                outbound::passes_the_proxy_once(&pod, &other, stack)?;
                inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
            }
        } else {
            undone += 1;
            let after = Footprint::of(pod.netns())?;
            ensure!(after == before, "round {round}: before: {before:#?}\nafter: {after:#?}");
            pod.enroll().with_context(|| format!("round {round}: again"))?;
        }
        // The runtime's DEL after a failed ADD.
        pod.unenroll()?;
        let after = Footprint::of(pod.netns())?;
        ensure!(after == before, "round {round}: before: {before:#?}\nafter: {after:#?}");
    }
    println!("survival::kill_in_the_middle_of_adds: {ROUNDS} rounds, {done} enrolled, {undone} undone");
    Ok(())
}

fn entries(node: &Node) -> Result<Vec<(String, usize)>> {
    let maps = node.status()?.maps.into_iter();
    Ok(maps.filter(|map| map.name.starts_with("POD")).map(|map| (map.name, map.entries)).collect())
}

fn pods_that_end_meanwhile(context: &Context) -> Result<()> {
    let node = node(context)?;
    let stays = node.enrolled("stays", Families::Dual)?;
    let (entries_before, links_before) = (entries(&node)?, links(&node)?);
    let ends = node.enrolled("ends", Families::Dual)?;
    let linked = context.placement() == Placement::Pod;
    ensure!(entries(&node)? != entries_before && (links(&node)? != links_before) == linked);
    node.kill_agent()?;
    let remains = ends.end_without_del()?;
    node.start_agent(&arguments(&[]))?;
    node.wait_for_proxy()?;
    ensure!(node.with_agent(|agent| agent.pods())?.len() == 1, "the pod is still known");
    // The proxy holds the namespace until the removal.
    let gone = || Ok(entries(&node)? == entries_before && links(&node)? == links_before);
    wait::until_true("end of what is left of the pod", wait::SOON, gone)
        .with_context(|| format!("left: {:?}, {:?}", entries(&node), links(&node)))?;
    ensure!(fs::read_dir(node.state_dir().join("pods"))?.count() == 1, "its checkpoint is left");
    // The runtime's DEL comes late, or never.
    remains.delete()?;
    outbound::passes_the_proxy_once(&stays, &node.plain("other", Families::Dual)?, Stack::V6)
}

fn links(node: &Node) -> Result<BTreeSet<PathBuf>> {
    Ok(fs::read_dir(node.pin_dir().join("links"))?.flatten().map(|entry| entry.path()).collect())
}

fn pods_that_come_meanwhile(context: &Context) -> Result<()> {
    let node = node(context)?;
    let addresses = node.to_choose(3);
    let spec = node.numbered("old", Families::Dual).with_addresses(&addresses);
    let old = Pod::start(&node, spec)?;
    node.kill_agent()?;
    drop(old.end_without_del()?);
    // The plugin fails without an agent, and the runtime retries.
    let new = node.numbered("new", Families::Dual).with_addresses(&addresses);
    ensure!(Pod::start(&node, new.clone()).is_err(), "a pod came up without an agent");
    node.start_agent(&arguments(&[]))?;
    node.wait_for_proxy()?;
    let new = Pod::start(&node, new)?;
    let other = node.plain("other", Families::Dual)?;
    node.netns().ip("neighbour flush all")?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&new, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &new, stack)?;
    }
    Ok(())
}

/// The runtime deletes a pod while no agent runs, and its namespace still exists when the next agent starts.
fn pods_that_are_deleted_meanwhile(context: &Context) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let restart = || -> Result<()> {
        node.start_agent(&arguments(&[]))?;
        node.wait_for_proxy()
    };
    let before = Footprint::of(pod.netns())?;
    pod.enroll()?;
    node.kill_agent()?;
    pod.unenroll()?;
    restart()?;
    ensure!(node.reports()?.is_empty(), "the agent has taken the pod over: {:?}", node.reports()?);
    let after = Footprint::of(pod.netns())?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    for stack in Stack::ALL {
        let listening = other.listen(stack)?;
        ensure!(pod.connect(stack, other.endpoint(stack.family(), listening.port())?)?.is_direct());
    }
    // A pod with the same name is added again: the earlier deletion does not count any more.
    node.kill_agent()?;
    pod.unenroll()?;
    ensure!(pod.enroll().is_err(), "a pod came up without an agent");
    restart()?;
    pod.enroll()?;
    node.kill_agent()?;
    restart()?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    Ok(())
}

/// An upgrade keeps the pods captured, and so do missing permissions; the deletion of the DaemonSet removes
/// everything.
fn daemonset(context: &Context, deleted: bool, forbidden: bool) -> Result<()> {
    let arguments =
        ["--on-exit", "auto", "--daemonset", "redirect", "--pod-namespace", "mesh"].map(str::to_owned);
    let own: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let cluster = Cluster::start(&context.session()?, &own)?;
    cluster.api().put_daemonset("mesh", "redirect", deleted);
    if forbidden {
        cluster.api().fail_next("/daemonsets/redirect", Fault::Status(403));
    }
    let node = cluster.node();
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(pod.netns())?;
    cluster.announce(&pod, &[]);
    pod.enroll()?;
    let captured = Footprint::of(pod.netns())?;
    node.end_agent()?;
    ensure!(cluster.api().faults_left() == 0, "the agent did not ask");
    ensure!(node.pin_dir().exists() != deleted, "pins");
    ensure!(Footprint::of(pod.netns())? == if deleted { before } else { captured });
    for stack in Stack::ALL {
        if deleted {
            let listening = other.listen(stack)?;
            let connection = pod.connect(stack, other.endpoint(stack.family(), listening.port())?)?;
            ensure!(connection.is_direct(), "{:?}", connection.heard);
        } else {
            outbound::passes_the_proxy_once(&pod, &other, stack)?;
            inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
        }
    }
    Ok(())
}

/// A pin that does not match its name is replaced, and filled.
fn pin_of_another_map(context: &Context) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    node.end_agent()?;
    let maps: Vec<PathBuf> =
        fs::read_dir(node.pin_dir().join("maps-v1"))?.flatten().map(|entry| entry.path()).collect();
    let find = |name: &str| {
        let found = maps
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)));
        found.with_context(|| format!("the pin of {name}"))
    };
    let (pods, counters) = (find("PODS-")?, find("COUNTERS-")?);
    fs::remove_file(pods)?;
    fs::rename(counters, pods)?;
    node.start_agent(&arguments(&[]))?;
    node.wait_for_proxy()?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    Ok(())
}

fn second_agent(context: &Context) -> Result<()> {
    let node = node(context)?;
    let output = std::process::Command::new(&node.session().binaries().redirect)
        .args(["agent", "--socket"])
        .arg(node.dir().join("second.sock"))
        .arg("--zds-socket")
        .arg(node.dir().join("second-zds.sock"))
        .arg("--pin-dir")
        .arg(node.pin_dir())
        .arg("--state-dir")
        .arg(node.state_dir())
        .arg("--cgroup")
        .arg(node.session().cgroup().path())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("another agent uses"), "{text}");
    Ok(())
}

fn bad_pin_directory(context: &Context) -> Result<()> {
    let nothing = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, nothing)?;
    let plain = node.dir().join("plain");
    let output = std::process::Command::new(&node.session().binaries().redirect)
        .arg("agent")
        .arg("--pin-dir")
        .arg(&plain)
        .arg("--state-dir")
        .arg(node.state_dir())
        .arg("--cgroup")
        .arg(node.session().cgroup().path())
        .arg("--socket")
        .arg(node.agent_socket())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let named = text.contains(&plain.display().to_string()) && text.contains("--pin-dir");
    ensure!(!output.status.success() && named && text.contains("bpffs"), "{text}");
    Ok(())
}
