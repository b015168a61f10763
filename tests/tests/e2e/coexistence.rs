//! Programs and filters of other software next to ours.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::count::{Direction as Way, Reason};
use redirect_protocol::placement::Placement;
use redirect_tests::connection::dial;
use redirect_tests::dns::{self, DnsServer};
use redirect_tests::foreign::{Hook, Kind, Program};
use redirect_tests::wait::SOON;
use redirect_tests::{Direction, Families, Netns, Node, NodeOptions, Pod, Stack, foreign};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_stack, for_every_stack_in_pods, needs_tcx};
use crate::odd_sockets::dropped;
use crate::on_node::host_device;
use crate::{inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, turn) in [("before", Turn::Before), ("after", Turn::After)] {
        let test = move |context: &Context, stack: Stack| socket_load_balancer(context, stack, turn);
        trials.extend(for_every_stack(context, &format!("coexistence::socket_load_balancer_{name}"), test));
        let test = move |context: &Context, stack: Stack| tcx_programs(context, stack, turn);
        trials.extend(for_every_stack(context, &format!("coexistence::tcx_programs_{name}"), test));
        let test = move |context: &Context, stack: Stack| filters(context, stack, turn);
        trials.extend(for_every_stack(context, &format!("coexistence::filters_{name}"), test));
        let test = move |context: &Context, stack: Stack| filters_on_loopback(context, stack, turn);
        trials.extend(for_every_stack_in_pods(
            context,
            &format!("coexistence::filters_on_loopback_{name}"),
            "nothing is on the pod's lo",
            test,
        ));
    }
    trials.extend(for_every_stack_in_pods(
        context,
        "coexistence::load_balancer_of_dns_servers",
        "a program that rewrites questions has to rewrite the answers itself: none of ours is on sockets there",
        dns_load_balancer,
    ));
    trials.extend(for_every_stack(context, "coexistence::filter_in_our_place_is_told", filter_in_our_place));
    trials.extend(for_every_stack(context, "coexistence::shortcut_to_a_pod", shortcut));
    trials
}

/// When the other is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Before,
    After,
}

/// An address that no other test uses: all their programs are on one cgroup.
fn service(stack: Stack, port: u16) -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let address: IpAddr = match stack {
        Stack::V4 | Stack::Mapped => [198, 18, 0, number].into(),
        Stack::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x96, 0, 0, 0, 0, number.into()).into(),
    };
    SocketAddr::new(address, port)
}

/// A program that sends connections to a Service's address to one of its pods, as Cilium's does. The proxy gets the
/// connection for the pod, whichever program was attached first.
fn socket_load_balancer(context: &Context, stack: Stack, turn: Turn) -> Result<()> {
    let session = context.session()?;
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let server = node.plain("server", Families::Dual)?;
    let listening = server.listen(stack)?;
    let service = service(stack, 80);
    let backend = server.endpoint(stack.family(), listening.port())?;
    let attach = || {
        let (from, to) = (stack.spell(service), stack.spell(backend));
        Program::rewriting(session.cgroup().path(), Kind::Connections, from, to)
    };
    let before = (turn == Turn::Before).then(attach).transpose()?;
    node.start_agent(&[])?;
    node.start_proxy()?;
    let after = (turn == Turn::After).then(attach).transpose()?;
    let client = node.enrolled("client", Families::Dual)?;
    let mut connection = client.connect(stack, service)?;
    connection.exchange("hello")?;
    ensure!(!connection.is_direct(), "past the proxy: {:?}", connection.heard);
    client.proxied_times(Direction::Outbound, backend, 1)?;
    drop((before, after));
    Ok(())
}

/// The same for DNS. Ours runs first if the kernel supports that (6.17), whichever was attached first: the application
/// sees the answer from the server that it queried; on older kernels from the one that the other program chose.
fn dns_load_balancer(context: &Context, stack: Stack) -> Result<()> {
    let session = context.session()?;
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let server = node.plain("server", Families::Dual)?;
    let asked = DnsServer::everywhere(server.netns())?;
    let service = service(stack, dns::PORT);
    let backend = server.endpoint(stack.family(), dns::PORT)?;
    // An unconnected datagram to a v4-mapped address runs the program of IPv4.
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let _program =
        Program::rewriting(session.cgroup().path(), Kind::Datagrams, plain(service), plain(backend))?;
    node.start_agent(&[])?;
    node.start_proxy()?;
    node.dns()?;
    let client = node.enrolled("client", Families::Dual)?;
    let socket = client.netns().run(|| Socket::new(stack.domain(), Type::DGRAM, None))??;
    socket.set_read_timeout(Some(SOON))?;
    let socket = std::net::UdpSocket::from(socket);
    let question = dns::question("balanced.test.", hickory_proto::rr::RecordType::A)?;
    socket.send_to(&question, stack.spell(service))?;
    let mut buffer = [0; 512];
    let (length, from) = socket.recv_from(&mut buffer).context("no answer")?;
    dns::check_answer(&question, &buffer[..length])?;
    // Probed where no other test checks for foreign programs.
    let expected = if foreign::has_order(session.applications().path())? { service } else { backend };
    ensure!(from == stack.spell(expected), "{service} was asked, {from} answered, not {expected}");
    ensure!(asked.heard().is_empty(), "the question went past the proxy: {:?}", asked.heard());
    Ok(())
}

/// A program on the node's uplink hands packets to the pod's end of its veth pair, as some CNI plugins do. The programs in the
/// pod still capture them. In placement `node` ours are on the other end and never see them, so the doctor reports it.
fn shortcut(context: &Context, stack: Stack) -> Result<()> {
    needs_tcx()?;
    let node = Node::start(&context.session()?)?;
    let outside = Netns::new("outside")?;
    node.attach(&outside, "uplink")?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let index = |device: &str| -> Result<u32> {
        let index = node.netns().json(&format!("ip -j link show dev {device}"))?[0]["ifindex"].as_u64();
        Ok(u32::try_from(index.context("no index")?)?)
    };
    let (uplink, device) = (index("uplink")?, index(&host_device(&pod)?)?);
    let told = || -> Result<Vec<serde_json::Value>> {
        let mut command = Command::new(&node.session().binaries().redirect);
        command.args(["doctor", "-o", "json"]);
        let output = node.netns().run(move || command.output())??;
        let checks: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
        Ok(checks.into_iter().filter(|check| check["check"] == "shortcuts to pods").collect())
    };
    let before = told()?;
    let _program = node.netns().run(|| Program::redirecting_to_peer(uplink, stack.family(), device))??;
    let after = told()?;
    if context.placement() == Placement::Pod {
        ensure!(before.is_empty() && after.is_empty(), "{after:#?}");
        return inbound::passes_the_proxy_once(&outside, &pod, stack);
    }
    ensure!(before.len() == 1 && before[0]["state"] == "ok", "{before:#?}");
    ensure!(after.len() == 1 && after[0]["state"] == "fail", "{after:#?}");
    let detail = after[0]["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("foreign on uplink, ingress"), "{detail}");
    let remedy = after[0]["remedy"].as_str().unwrap_or_default();
    ensure!(remedy.contains("--placement pod"), "{remedy}");
    // The doctor is right, and no connection reaches the application.
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    let error = outside.run(|| dial(stack, to, Duration::from_millis(500)))?.err().context("it was made")?;
    ensure!(error.kind() == ErrorKind::TimedOut, "{error}");
    ensure!(listening.accepted().is_empty(), "past the proxy: {:?}", listening.accepted());
    ensure!(dropped(&node, stack, Way::Outbound, Reason::PastPod)? > 0, "not counted");
    Ok(())
}

fn is_captured_both_ways(pod: &Pod, other: &Pod, stack: Stack) -> Result<()> {
    outbound::passes_the_proxy_once(pod, other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), pod, stack)
}

/// The device that carries our programs, and its namespace.
struct Place<'a> {
    netns: &'a Netns,
    device: String,
}

impl<'a> Place<'a> {
    fn of(pod: &'a Pod) -> Result<Self> {
        Ok(match pod.node().session().placement() {
            Placement::Pod => Self { netns: pod.netns(), device: "eth0".into() },
            Placement::Node => Self { netns: pod.node().netns(), device: host_device(pod)? },
        })
    }

    fn tc(&self, arguments: &str, more: &[&str]) -> Result<()> {
        let mut tc = Command::new("tc");
        tc.args(arguments.replace("DEVICE", &self.device).split(' ')).args(more);
        self.netns.output(tc, b"").map(drop)
    }

    /// Adds a qdisc, like software that does not know about ours.
    fn add_qdisc(&self) -> Result<()> {
        self.tc("qdisc replace dev DEVICE clsact", &[])
    }

    /// A filter that takes every packet of a protocol, so that later filters don't run.
    fn add_filter(&self, protocol: &str, priority: &str, side: &str) -> Result<()> {
        let filter = format!(
            "filter add dev DEVICE {side} protocol {protocol} pref {priority} bpf classid 1:1 bytecode"
        );
        // One instruction of classic BPF: return -1, which is the class above.
        self.tc(&filter, &["1,6 0 0 4294967295"])
    }

    fn index(&self) -> Result<u64> {
        let link = self.netns.json(&format!("ip -j link show dev {}", self.device))?;
        link[0]["ifindex"].as_u64().context("no index")
    }
}

/// tcx programs on the device with a final verdict on every packet: filters would never run.
fn tcx_programs(context: &Context, stack: Stack, turn: Turn) -> Result<()> {
    needs_tcx()?;
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let place = Place::of(&pod)?;
    let index = place.index()?;
    let attach = || {
        /// `TCX_PASS`: the packet passes, and no later program runs.
        const PASS: i32 = 0;
        let hooks = [Hook::TcxIngress, Hook::TcxEgress];
        let attach = || hooks.map(|hook| Program::with_verdict(index as u32, hook, PASS));
        place.netns.run(attach)?.into_iter().collect::<Result<Vec<_>>>()
    };
    let before = (turn == Turn::Before).then(attach).transpose()?;
    pod.enroll()?;
    if turn == Turn::After {
        let _after = attach()?;
        // The agent observes pods periodically, and at once when it enrolls one again.
        pod.enroll()?;
        return is_captured_both_ways(&pod, &other, stack);
    }
    is_captured_both_ways(&pod, &other, stack)?;
    drop(before);
    pod.unenroll()?;
    ensure!(place.index()? == index);
    Ok(())
}

/// As [`Place::add_filter`], in the pod.
pub(crate) fn add_filter(pod: &Pod, protocol: &str, priority: &str, side: &str) -> Result<()> {
    let place = Place { netns: pod.netns(), device: "eth0".into() };
    place.add_qdisc()?;
    place.add_filter(protocol, priority, side)
}

/// Filters with a final verdict on every packet run after ours.
fn filters(context: &Context, stack: Stack, turn: Turn) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let place = Place::of(&pod)?;
    let add = || {
        place.add_qdisc()?;
        ["ingress", "egress"].into_iter().try_for_each(|side| place.add_filter("all", "10", side))
    };
    if turn == Turn::Before {
        add()?;
    }
    pod.enroll()?;
    if turn == Turn::After {
        add()?;
    }
    is_captured_both_ways(&pod, &other, stack)
}

/// The same on `lo`, where ours create an ingress-only qdisc unless there is one. Filters of others stay there.
fn filters_on_loopback(context: &Context, stack: Stack, turn: Turn) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let place = Place { netns: pod.netns(), device: "lo".into() };
    let sides: &[&str] = match turn {
        Turn::Before => &["ingress", "egress"],
        Turn::After => &["ingress"],
    };
    let add = || sides.iter().try_for_each(|side| place.add_filter("all", "10", side));
    if turn == Turn::Before {
        place.add_qdisc()?;
        add()?;
    }
    pod.enroll()?;
    if turn == Turn::After {
        add()?;
    }
    is_captured_both_ways(&pod, &other, stack)?;
    pod.unenroll()?;
    for side in sides {
        let left = pod.netns().json(&format!("tc -j filter show dev lo {side}"))?;
        let left: Vec<_> =
            left.as_array().into_iter().flatten().filter(|filter| filter["options"].is_object()).collect();
        ensure!(left.len() == 1 && left[0]["pref"] == 10, "{side}: {left:?}");
    }
    Ok(())
}

/// A foreign filter at our priority blocks enrollment: a pod is not enrolled without its programs.
fn filter_in_our_place(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let place = Place::of(&pod)?;
    let program = if context.placement() == Placement::Pod { "inbound_ipv4" } else { "from_pod_ipv4" };
    place.add_qdisc()?;
    place.add_filter("arp", "1", "ingress")?;
    let text = restarts::message(pod.enroll())?;
    for wanted in [pod.identity().to_string().as_str(), program, &place.device] {
        ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
    }
    place.tc("filter del dev DEVICE ingress pref 1", &[])?;
    pod.enroll()?;
    is_captured_both_ways(&pod, &other, stack)
}
