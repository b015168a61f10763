//! The drop log of the kernel side in the agent's log: empty unless it is enabled.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::MARK_CAPTURE;
use redirect_ebpf::diagnostics::{Fault, Hook, TARGET};
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_protocol::placement::Placement;
use redirect_tests::dns::PORT;
use redirect_tests::kernel::bpftool;
use redirect_tests::{Families, Node, Pod, Stack, wait};
use serde_json::Value;
use socket2::{Socket, Type};

use crate::context::{Context, for_every_stack_in_pods, trial};
use crate::odd_sockets::{drop_capabilities, dropped};
use crate::{inbound, logs, raw};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    // A packet has no socket.
    for stack in [Stack::V4, Stack::V6] {
        for (name, test) in [
            ("malformed_packets", malformed as fn(&Context, Stack) -> Result<()>),
            ("no_more_than_the_limit", limited),
            ("off_unless_wanted", off_unless_wanted),
        ] {
            let name = format!("diagnostics::{name}::{}", stack.label());
            trials.push(trial(context, name, move |context| test(context, stack)));
        }
    }
    let elsewhere = "no socket of a pod is asked to leave its interface";
    trials.extend(for_every_stack_in_pods(
        context,
        "diagnostics::bound_to_a_device",
        elsewhere,
        bound_to_a_device,
    ));
    trials
}

const JSON: [&str; 2] = ["--log-format", "json"];
const WANTED: [&str; 2] = ["--log", "info,redirect_ebpf=debug"];

fn arguments(parts: &[[&str; 2]]) -> Vec<String> {
    parts.iter().flatten().map(ToString::to_string).collect()
}

fn wanting(context: &Context) -> Result<Arc<Node>> {
    Node::with_arguments(&context.session()?, &[JSON, WANTED].concat())
}

/// A pod, another one outside the mesh, and the routes on which a packet meets our programs.
struct Scene {
    pod: Pod,
    other: Pod,
    stack: Stack,
}

/// The sender of a packet, and the program that sees it.
#[derive(Clone, Copy)]
struct Route {
    hook: Hook,
    direction: Way,
    from_pod: bool,
    mark: u32,
}

impl Scene {
    fn new(node: &Arc<Node>, stack: Stack) -> Result<Self> {
        let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
        // Resolves the neighbors first, so that no packet is lost for another reason.
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
        Ok(Self { pod, other, stack })
    }

    fn routes(&self) -> Vec<Route> {
        let route = |hook, direction, from_pod, mark| Route { hook, direction, from_pod, mark };
        match self.pod.node().session().placement() {
            Placement::Pod => vec![
                route(Hook::Inbound, Way::Inbound, false, 0),
                route(Hook::Egress, Way::Outbound, true, 0),
                route(Hook::Loopback, Way::Outbound, true, MARK_CAPTURE),
            ],
            Placement::Node => {
                vec![route(Hook::ToPod, Way::Inbound, false, 0), route(Hook::FromPod, Way::Outbound, true, 0)]
            }
        }
    }

    /// Sends SYNs that end before their flags.
    fn send(&self, route: Route, times: usize) -> Result<()> {
        let (from, to) = if route.from_pod { (&self.pod, &self.other) } else { (&self.other, &self.pod) };
        let to = to.endpoint(self.stack.family(), 80)?;
        let source = from.address(self.stack.family())?;
        let packet = raw::cut_syn(source, 40_000, to);
        let send = || raw::send_bound(&packet, source, to.ip(), route.mark);
        from.netns().run(|| (0..times).try_for_each(|_| send()))?
    }

    /// The name of the program that sees a packet.
    fn program(&self, route: Route) -> String {
        format!("{}_{}", route.hook.label(), self.stack.family().name().to_lowercase())
    }

    /// Whether one of the programs refers to the log's ring buffer.
    fn uses_the_log(&self) -> Result<bool> {
        let name = self.program(self.routes()[0]);
        let programs = self.pod.node().status()?.programs;
        let id = programs.iter().find(|program| program.name == name).context("no program")?.id.to_string();
        let dump = Command::new("bpftool").args(["prog", "dump", "xlated", "id", &id]).output()?;
        let text = String::from_utf8_lossy(&dump.stdout);
        let named = |id: &Value| text.contains(&format!("map[id:{id}]"));
        let maps = bpftool("map")?;
        ensure!(maps.iter().any(|map| map["name"] == "CONFIG" && named(&map["id"])), "{name}: {dump:?}");
        Ok(maps.iter().any(|map| map["name"] == "AYA_LOGS" && named(&map["id"])))
    }

    fn log(&self) -> Result<Vec<Value>> {
        told(self.pod.node())
    }
}

/// The kernel side's log so far.
fn told(node: &Node) -> Result<Vec<Value>> {
    Ok(logs::lines(node)?.into_iter().filter(|line| line["target"] == TARGET).collect())
}

fn is_about(line: &Value, fault: Fault, hook: Hook, family: Family) -> bool {
    line["message"] == fault.label() && line["hook"] == hook.label() && line["family"] == family.name()
}

fn is_error(line: &Value, error: i32) -> bool {
    let shown = std::io::Error::from_raw_os_error(error).to_string();
    line["level"] == "DEBUG" && line["error"] == shown
}

fn malformed(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&wanting(context)?, stack)?;
    ensure!(scene.log()?.is_empty(), "{:#?}", scene.log()?);
    for route in scene.routes() {
        scene.send(route, 1)?;
        let line = wait::until("line about a malformed packet", wait::SOON, || {
            Ok(scene
                .log()?
                .into_iter()
                .find(|line| is_about(line, Fault::Malformed, route.hook, stack.family())))
        })
        .with_context(|| format!("{}: {:#?}", route.hook.label(), scene.log()))?;
        ensure!(is_error(&line, libc::EFAULT), "{line:#}");
        let interface = line["interface"].as_u64().context("no interface")?;
        ensure!((interface == 1) == (route.hook == Hook::Loopback), "{line:#}");
        // An Ethernet header, an IP header, and the truncated TCP header.
        let length = if stack.family() == Family::Ipv4 { 14 + 20 + 12 } else { 14 + 40 + 12 };
        ensure!(line["length"] == length, "{line:#}");
    }
    ensure!(scene.log()?.len() == scene.routes().len(), "{:#?}", scene.log()?);
    Ok(())
}

/// Many drops give a few entries, and then sums.
fn limited(context: &Context, stack: Stack) -> Result<()> {
    const MANY: usize = 1000;
    let scene = Scene::new(&wanting(context)?, stack)?;
    let route = scene.routes()[0];
    scene.send(route, MANY)?;
    let single = |line: &Value| is_about(line, Fault::Malformed, route.hook, stack.family());
    let lost = |line: &Value| {
        if line["message"] == "drop log entries lost" {
            line["limit"].as_u64().unwrap_or(0) + line["full"].as_u64().unwrap_or(0)
        } else {
            0
        }
    };
    wait::until_true("sum of what was lost", wait::SOON, || {
        let lines = scene.log()?;
        let told = lines.iter().filter(|line| single(line)).count();
        Ok(told + lines.iter().map(lost).sum::<u64>() as usize == MANY)
    })
    .with_context(|| format!("{:#?}", scene.log()))?;
    let lines = scene.log()?;
    ensure!((1..MANY / 2).contains(&lines.len()), "{} lines", lines.len());
    ensure!(lines.iter().any(single), "{lines:#?}");
    Ok(())
}

/// An agent with the log off loads programs without its code; the next one with the log on replaces them in place.
fn off_unless_wanted(context: &Context, stack: Stack) -> Result<()> {
    let keep = ["--on-exit", "keep"];
    let node = Node::with_arguments(&context.session()?, &[JSON, keep].concat())?;
    let scene = Scene::new(&node, stack)?;
    let off = sizes(&node)?;
    ensure!(!scene.uses_the_log()?);
    nothing_is_told(&scene)?;

    node.end_agent()?;
    node.start_agent(&arguments(&[JSON, WANTED, keep]))?;
    let on = sizes(&node)?;
    ensure!(on.iter().all(|(name, size)| off.get(name).is_some_and(|off| off <= size)), "{off:?} {on:?}");
    for route in scene.routes() {
        let program = scene.program(route);
        ensure!(off[&program] < on[&program], "{program}: {off:?} {on:?}");
    }
    ensure!(scene.uses_the_log()?);
    scene.send(scene.routes()[0], 1)?;
    wait::until_true("line about a malformed packet", wait::SOON, || Ok(!scene.log()?.is_empty()))?;
    for pin in fs::read_dir(node.pin_dir())?.flatten().flat_map(|entry| fs::read_dir(entry.path())).flatten()
    {
        let name = pin?.file_name().to_string_lossy().into_owned();
        let is_ours = |own: &&str| name.starts_with(*own);
        ensure!(!["AYA_LOGS", "DIAGNOSTICS", ".rodata"].iter().any(is_ours), "{name} is pinned");
    }

    node.end_agent()?;
    node.start_agent(&arguments(&[JSON]))?;
    ensure!(sizes(&node)? == off, "{:?} is not {off:?}", sizes(&node)?);
    nothing_is_told(&scene)
}

fn nothing_is_told(scene: &Scene) -> Result<()> {
    let node = scene.pod.node();
    for route in scene.routes() {
        let seen = || dropped(node, scene.stack, route.direction, Reason::Malformed);
        let before = seen()?;
        scene.send(route, 1)?;
        wait::until_true("dropped packet", wait::SOON, || Ok(seen()? > before))?;
    }
    ensure!(scene.log()?.is_empty(), "{:#?}", scene.log()?);
    Ok(())
}

/// The sizes of the loaded programs.
fn sizes(node: &Node) -> Result<BTreeMap<String, u64>> {
    let programs = node.status()?.programs;
    let all = bpftool("prog")?;
    let size = |id: u32| all.iter().find(|known| known["id"] == id)?["bytes_xlated"].as_u64();
    let sizes = programs.into_iter().map(|program| Some((program.name, size(program.id)?)));
    sizes.collect::<Option<_>>().context("a program that is not loaded")
}

/// A socket that is bound to the pod's interface, in a process that may not unbind it.
fn bound_to_a_device(context: &Context, stack: Stack) -> Result<()> {
    let node = wanting(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let server = stack.spell((node.gateway(stack.family()), PORT).into());
    let denied = pod.netns().run(|| -> Result<_> {
        drop_capabilities()?;
        let socket = Socket::new(stack.domain(), Type::DGRAM, None)?;
        socket.bind_device(Some(b"eth0"))?;
        Ok(socket.send_to(b"a question", &server.into()).err())
    })??;
    let denied = denied.context("the datagram was sent")?;
    ensure!(denied.raw_os_error() == Some(libc::ENETUNREACH), "{denied}");
    let line = wait::until("line about the socket", wait::SOON, || {
        let is_ours = |line: &Value| is_about(line, Fault::Interface, Hook::Dns, stack.family());
        Ok(told(&node)?.into_iter().find(is_ours))
    })?;
    ensure!(is_error(&line, libc::EPERM) && line["netns_cookie"] == pod.netns().cookie()?, "{line:#}");
    Ok(())
}
