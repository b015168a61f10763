//! Which sockets count as the proxy's own, and which only look like it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_DELIVERY, MARK_MASK, MARK_PROXY};
use redirect_protocol::placement::Placement;
use redirect_tests::{Caller, Direction, Families, Node, Stack};
use serde_json::Value;

use crate::context::{Context, for_every_kind, for_every_stack, for_every_stack_in_pods, trial};
use crate::flows::pinned;
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    let marks =
        [("proxys", MARK_PROXY), ("delivery", MARK_DELIVERY), ("capture", MARK_CAPTURE), ("own", 0x7)];
    for (word, mark) in marks {
        let test = move |context: &Context, stack: Stack| marked(context, stack, mark);
        trials.extend(for_every_stack(context, &format!("identity::{word}_mark_is_captured"), test));
    }
    trials.extend(for_every_stack(context, "identity::mark_at_own_address_stays_inside", own_address));
    trials.extend(for_every_kind(context, "identity::proxy_in_a_new_cgroup", new_cgroup));
    trials.push(trial(context, "identity::proxies_that_connect_at_once", at_once));
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 3] = [
        ("cgroup_of_a_proxy_that_is_gone", gone),
        ("peers_that_name_no_proxy", no_proxy_named),
        ("mark_alone_suffices_if_wanted", mark_suffices),
    ];
    for (name, test) in tests {
        trials.extend(for_every_stack_in_pods(context, &format!("identity::{name}"), NO_CONNECTION, test));
    }
    trials
}

/// The difference in placement `node`.
const NO_CONNECTION: &str =
    "no mark of a pod reaches the host, and the proxy is named, not known by its connection to the agent";

/// Bits outside our mask survive; in placement `node` all of them.
fn marked(context: &Context, stack: Stack, mark: u32) -> Result<()> {
    const OTHERS: u32 = 0xabcd_e000;
    let ours = if context.placement() == Placement::Pod { MARK_CAPTURE } else { mark };
    let kept = outbound::marked(context, stack, mark | OTHERS)?;
    ensure!(kept & !MARK_MASK == OTHERS, "the application's mark became {kept:#x}");
    ensure!(kept & MARK_MASK == ours, "the mark is {kept:#x}");
    Ok(())
}

/// One of our marks must not send a pod's connection to itself through the proxy.
fn own_address(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let caller = Caller::new(node.session(), &format!("marked-{}", pod.identity().name))?;
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    for mark in [MARK_PROXY, MARK_DELIVERY, MARK_CAPTURE] {
        let answer = caller.call_with_mark(pod.netns(), stack, to, mark)?;
        ensure!(answer.is_direct(), "mark {mark:#x}: {answer:?}");
    }
    ensure!(pod.proxied_at_all()?.is_empty(), "{:#?}", pod.proxied_at_all()?);
    Ok(())
}

/// A restarted container has another cgroup.
fn new_cgroup(context: &Context, families: Families, stack: Stack) -> Result<()> {
    context.needs_placement_pod(NO_CONNECTION)?;
    let session = context.session()?;
    // They outlive the node, and with it the last proxy.
    let cgroup =
        |number| session.cgroup().child(&format!("proxy-{number}-{}-{}", families.label(), stack.label()));
    let cgroups = [cgroup(1)?, cgroup(2)?];
    let node = Node::start(&session)?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    for cgroup in &cgroups {
        node.kill_proxy()?;
        node.start_proxy_in(cgroup)?;
        let proxies = node.status()?.proxies;
        let path = cgroup.path().display().to_string();
        let known =
            proxies.iter().filter_map(|proxy| proxy.cgroup.as_ref()).any(|known| path.ends_with(known));
        ensure!(known, "{proxies:#?}");
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    Ok(())
}

/// Another cgroup with the same name is not the same cgroup.
fn gone(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let name = format!("second-proxy-of-{}", node.netns().name());
    node.kill_proxy()?;
    let cgroup = node.session().cgroup().child(&name)?;
    node.start_proxy_in(&cgroup)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    node.kill_proxy()?;
    drop(cgroup);

    let impostor = Caller::new(node.session(), &name)?;
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let answer = impostor.call_with_mark(pod.netns(), stack, to, MARK_PROXY)?;
    ensure!(answer.error.is_some(), "past the proxy that is away: {answer:?}");
    ensure!(listening.accepted().is_empty(), "{:?}", listening.accepted());

    node.start_proxy()?;
    let answer = impostor.call_with_mark(pod.netns(), stack, to, MARK_PROXY)?;
    ensure!(answer.error.is_none() && !answer.is_direct(), "{answer:?}");
    pod.proxied_times(Direction::Outbound, to, 1).map(drop)
}

/// A peer that ends right after its hello, so that its process ID proves nothing, and one in the root cgroup: the agent refuses
/// both, and keeps the known proxy. No mark makes a pod's process the proxy.
fn no_proxy_named(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let impostor = Caller::new(node.session(), &format!("impostor-of-{}", node.netns().name()))?;
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let is_captured = || -> Result<()> {
        let answer = impostor.call_with_mark(pod.netns(), stack, to, MARK_PROXY)?;
        ensure!(answer.error.is_none() && !answer.is_direct(), "past the proxy: {answer:?}");
        Ok(())
    };
    let root = redirect_linux::cgroup::mount()?.join("cgroup.procs");
    let hello = |after: &str| -> Result<String> {
        let socket = redirect_tests::agent::zds_socket(node.dir());
        // The protobuf message is `version: 1`.
        let program = format!(
            "import os, socket\nopen({:?}, 'w').write(str(os.getpid()))\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
             s.connect({:?})\ns.send(bytes([8, 1]))\n{after}",
            root.display().to_string(),
            socket.display().to_string()
        );
        let mut python = Command::new("python3");
        python.args(["-c", &program]);
        Ok(String::from_utf8(node.netns().output(python, b"")?)?)
    };
    for _ in 0..5 {
        hello("os._exit(0)")?;
        is_captured()?;
    }
    match hello("s.settimeout(5); print(len(s.recv(1024)))") {
        Ok(heard) => ensure!(heard.trim() == "0", "a proxy without a cgroup was told of pods: {heard}"),
        // A reset is fine as well.
        Err(error) => ensure!(format!("{error:#}").contains("ConnectionReset"), "{error:#}"),
    }
    is_captured()?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

/// Checkpoint and map end up with all of them, in whatever order their connections are processed.
fn at_once(context: &Context) -> Result<()> {
    const PROXIES: usize = 6;
    const ROUNDS: usize = 5;
    context.needs_placement_pod(NO_CONNECTION)?;
    let node = Node::start(&context.session()?)?;
    let socket = redirect_tests::agent::zds_socket(node.dir()).display().to_string();
    for round in 0..ROUNDS {
        let name = |number| format!("{}-proxy-{round}-{number}", node.netns().name());
        let cgroups = (0..PROXIES).map(|number| node.session().cgroup().child(&name(number)));
        let cgroups = cgroups.collect::<Result<Vec<_>>>()?;
        let doors: Vec<_> =
            cgroups.iter().map(|cgroup| cgroup.path().join("cgroup.procs").display().to_string()).collect();
        // Each process waits in its cgroup until all have started. The protobuf message is `version: 1`.
        let program = format!(
            "import os, socket\nready, go = os.pipe(), os.pipe()\nfor door in {doors:?}:\n if os.fork() == 0:\n  \
             open(door, 'w').write(str(os.getpid()))\n  s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n  \
             os.close(go[1]); os.write(ready[1], b'1'); os.read(go[0], 1)\n  s.connect({socket:?})\n  \
             s.send(bytes([8, 1]))\n  s.settimeout(20); print(len(s.recv(1024)) > 0); os._exit(0)\n\
             for _ in {doors:?}: os.read(ready[0], 1)\nos.close(go[1])\nfor _ in {doors:?}: os.wait()"
        );
        let mut python = Command::new("python3");
        python.args(["-u", "-c", &program]);
        let heard = String::from_utf8(node.netns().output(python, b"")?)?;
        ensure!(heard.matches("True").count() == PROXIES, "not all were told of pods: {heard}");
        let ids: BTreeSet<u64> =
            cgroups.iter().map(|cgroup| Ok(fs::metadata(cgroup.path())?.ino())).collect::<Result<_>>()?;
        let noted: Vec<u64> = serde_json::from_slice(&fs::read(node.state_dir().join("proxies.json"))?)?;
        ensure!(ids.iter().all(|id| noted.contains(id)), "round {round}: {ids:?} are not all in {noted:?}");
        let map = pinned(&node, "PROXY_CGROUPS")?;
        let dump = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(map).output()?;
        let entries: Vec<Value> = serde_json::from_slice(&dump.stdout)?;
        let key = |entry: &Value| -> Option<u64> {
            let byte = |value: &Value| u8::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok();
            let bytes: Vec<u8> = entry["key"].as_array()?.iter().map(byte).collect::<Option<_>>()?;
            Some(u64::from_ne_bytes(bytes.try_into().ok()?))
        };
        let known: BTreeSet<u64> = entries.iter().filter_map(key).collect();
        ensure!(
            known == noted.iter().copied().collect(),
            "round {round}: {known:?} in the map, {noted:?} noted"
        );
    }
    Ok(())
}

/// For proxies that have no cgroup of their own.
fn mark_suffices(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--proxy-identity", "mark"])?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    // Away from the cgroup in which it connected to the agent.
    let processes = node.session().applications().path().join("cgroup.procs");
    std::fs::write(processes, node.proxy_pid()?.to_string()).context("move the proxy")?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    // This is the drawback of the setting.
    let impostor = Caller::new(node.session(), &format!("impostor-of-{}", node.netns().name()))?;
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let answer = impostor.call_with_mark(pod.netns(), stack, to, MARK_PROXY)?;
    ensure!(answer.is_direct(), "{answer:?}");
    Ok(())
}
