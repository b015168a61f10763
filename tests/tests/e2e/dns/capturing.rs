//! Which queries go to the proxy's resolver, and what happens to them without one.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::count::{self, Reason};
use redirect_ebpf::{Family, Verdict};
use redirect_protocol::placement::Placement;
use redirect_tests::connection::dial;
use redirect_tests::dns::{DnsServer, PORT, check_answer, read_framed, write_framed};
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Direction, Families, Node, NodeOptions, ProxyKind, Stack};
use socket2::{Socket, Type};

use super::{A_WHILE, Scene, answer_to, fresh_question, no_answer};
use crate::context::{Context, for_every_kind, for_every_stack};
use crate::reports::counted;
use crate::{inbound, outbound};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "dns::loopback_is_left_alone", loopback);
    trials.extend(for_every_kind(context, "dns::own_address_is_left_alone", own_address));
    trials.extend(for_every_stack(context, "dns::switched_off", |context, stack| {
        goes_past_the_resolver(context, stack, |_| vec!["--dns=false".to_owned()], Some(Direction::Outbound))
    }));
    trials.extend(for_every_stack(context, "dns::excluded_port", |context, stack| {
        goes_past_the_resolver(context, stack, |_| vec!["--exclude-outbound-ports=53".to_owned()], None)
    }));
    trials.extend(for_every_stack(context, "dns::excluded_network", |context, stack| {
        let networks = |node: &Node| {
            let networks = [Family::Ipv4, Family::Ipv6].map(|family| node.subnet(family));
            vec![format!("--exclude-outbound-networks={}", networks.join(","))]
        };
        goes_past_the_resolver(context, stack, networks, None)
    }));
    trials.extend(for_every_stack(context, "dns::outage_is_held", outage_is_held));
    trials.extend(for_every_stack(context, "dns::outage_is_refused", outage_is_refused));
    trials.extend(for_every_stack(context, "dns::not_enrolled", not_enrolled));
    trials.extend(for_every_stack(
        context,
        "dns::without_the_resolvers_address",
        without_the_resolvers_address,
    ));
    trials
}

fn loopback(context: &Context, families: Families, stack: Stack) -> Result<()> {
    stays_inside(context, families, stack, |_| Ok(stack.loopback()))?;
    if stack.family() == Family::Ipv4 {
        // The address of systemd-resolved.
        stays_inside(context, families, stack, |_| Ok(IpAddr::from([127, 0, 0, 53])))?;
    }
    Ok(())
}

fn own_address(context: &Context, families: Families, stack: Stack) -> Result<()> {
    stays_inside(context, families, stack, |scene| scene.pod.address(stack.family()))
}

fn stays_inside(
    context: &Context,
    families: Families,
    stack: Stack,
    address: impl FnOnce(&Scene) -> Result<IpAddr>,
) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = SocketAddr::new(address(&scene)?, PORT);
    let inside = DnsServer::start(scene.pod.netns(), server)?;
    hears_by_udp(&scene, server, &inside)?;
    let mut stream = scene.pod.netns().run(|| dial(stack, server, SOON))??;
    let (name, question) = fresh_question("inside")?;
    write_framed(&mut stream, &question)?;
    check_answer(&question, &read_framed(&mut stream)?)?;
    let [heard] = &inside.heard_of(&name)[..] else { bail!("{:?}", inside.heard()) };
    ensure!(heard.from.port() == stream.local_addr()?.port(), "somebody was in between: {heard:?}");
    Ok(())
}

/// Queries over UDP, connected and unconnected, reach this server directly.
fn hears_by_udp(scene: &Scene, server: SocketAddr, double: &DnsServer) -> Result<()> {
    for connect in [true, false] {
        let socket = scene.socket()?;
        let (name, question) = fresh_question("udp")?;
        if connect {
            socket.connect(scene.spell(server))?;
            socket.send(&question)?;
        } else {
            socket.send_to(&question, scene.spell(server))?;
        }
        ensure!(answer_to(&question, &socket)? == scene.spell(server));
        let [heard] = &double.heard_of(&name)[..] else { bail!("{:?}", double.heard()) };
        ensure!(heard.from.port() == socket.local_addr()?.port(), "somebody was in between: {heard:?}");
    }
    Ok(())
}

/// With these arguments of the agent, queries go to the server itself; over TCP as the ordinary connections that they
/// are then.
fn goes_past_the_resolver(
    context: &Context,
    stack: Stack,
    arguments: impl FnOnce(&Node) -> Vec<String>,
    tcp: Option<Direction>,
) -> Result<()> {
    let nothing = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, nothing)?;
    node.start_agent(&arguments(&node))?;
    node.start_proxy()?;
    let scene = Scene::new(&node, Families::Dual, stack)?;
    let server = scene.server()?;
    hears_by_udp(&scene, server, &scene.asked)?;
    let mut stream = scene.pod.netns().run(|| dial(stack, server, SOON))??;
    let (name, question) = fresh_question("past")?;
    write_framed(&mut stream, &question)?;
    check_answer(&question, &read_framed(&mut stream)?)?;
    ensure!(scene.asked.heard_of(&name).len() == 1);
    ensure!(scene.upstream.heard().is_empty(), "{:?}", scene.upstream.heard());
    match tcp {
        Some(direction) => ensure!(scene.pod.proxied(direction, server)?.len() == 1),
        None => ensure!(scene.pod.proxied_at_all()?.is_empty()),
    }
    ensure!(node.access_log().questions()?.is_empty());
    Ok(())
}

/// A pod that sends queries while no proxy runs.
fn during_an_outage(context: &Context, stack: Stack, setting: &str) -> Result<Scene> {
    let node = Node::with_arguments(&context.session()?, &["--without-proxy", setting])?;
    let scene = Scene::new(&node, Families::Dual, stack)?;
    node.kill_proxy()?;
    Ok(scene)
}

/// The query gets no answer, bypasses nothing, and waits for the proxy.
fn outage_is_held(context: &Context, stack: Stack) -> Result<()> {
    let scene = during_an_outage(context, stack, "hold")?;
    let node = scene.pod.node();
    let server = scene.server()?;
    let (_, question) = fresh_question("nobody")?;
    let (connected, unconnected) = (scene.socket()?, scene.socket()?);
    connected.connect(scene.spell(server))?;
    for socket in [&connected, &unconnected] {
        socket.set_read_timeout(Some(A_WHILE))?;
        if socket.peer_addr().is_ok() {
            socket.send(&question)?;
        } else {
            socket.send_to(&question, scene.spell(server))?;
        }
        let error = no_answer(socket)?;
        ensure!(error == ErrorKind::WouldBlock, "{error}");
    }
    let (name, framed) = fresh_question("by-tcp")?;
    let mut stream = thread::scope(|scope| {
        let dialled = scope.spawn(|| scene.pod.netns().run(|| dial(stack, server, 3 * SOON)));
        thread::sleep(A_WHILE);
        ensure!(!dialled.is_finished(), "an answer without a proxy: {:?}", dialled.join());
        ensure!(dropped(node, stack)? >= 3, "not counted: {:#?}", node.status()?.counters);
        node.start_proxy()?;
        Ok(dialled.join().map_err(|_| anyhow!("the client panicked"))???)
    })?;
    scene.server_heard_nothing()?;
    write_framed(&mut stream, &framed)?;
    check_answer(&framed, &read_framed(&mut stream)?)?;
    scene.was_resolved(&name, "tcp")?;
    works_again(&scene, &[connected, unconnected])
}

/// The query is refused at once if possible, and bypasses nothing.
fn outage_is_refused(context: &Context, stack: Stack) -> Result<()> {
    let scene = during_an_outage(context, stack, "refuse")?;
    let node = scene.pod.node();
    let server = scene.server()?;
    let (_, question) = fresh_question("nobody")?;
    let (connected, unconnected) = (scene.socket()?, scene.socket()?);
    connected.set_read_timeout(Some(if in_pod(&scene) { wait::patient(SOON) } else { A_WHILE }))?;
    connected.connect(scene.spell(server))?;
    connected.send(&question)?;
    let error = no_answer(&connected)?;
    let wanted = if in_pod(&scene) { ErrorKind::ConnectionRefused } else { ErrorKind::WouldBlock };
    ensure!(error == wanted, "{error}");

    unconnected.set_read_timeout(Some(A_WHILE))?;
    unconnected.send_to(&question, scene.spell(server))?;
    let error = no_answer(&unconnected)?;
    ensure!(error == ErrorKind::WouldBlock, "{error}");

    let start = Instant::now();
    let error =
        scene.pod.netns().run(|| dial(stack, server, SOON))?.err().context("a connection without a proxy")?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
    ensure!(start.elapsed() < wait::patient(Duration::from_secs(1)), "only after {:?}", start.elapsed());
    ensure!(dropped(node, stack)? == 3, "{:#?}", node.status()?.counters);
    scene.server_heard_nothing()?;

    node.start_proxy()?;
    works_again(&scene, &[connected, unconnected])
}

/// Whether the resolver would be in the pod.
fn in_pod(scene: &Scene) -> bool {
    scene.pod.node().session().placement() == Placement::Pod
}

/// The number of queries that found no resolver.
fn dropped(node: &Node, stack: Stack) -> Result<u64> {
    let (family, direction) = (stack.family(), count::Direction::Outbound);
    Ok(counted(&node.status()?, family, direction, Verdict::Dropped, Reason::NoListener))
}

fn works_again(scene: &Scene, sockets: &[UdpSocket]) -> Result<()> {
    let server = scene.spell(scene.server()?);
    for socket in sockets {
        socket.set_read_timeout(Some(wait::patient(SOON)))?;
        let (name, question) = fresh_question("again")?;
        if socket.peer_addr().is_ok() {
            socket.send(&question)?;
        } else {
            socket.send_to(&question, server)?;
        }
        ensure!(answer_to(&question, socket)? == server);
        scene.was_resolved(&name, "udp")?;
    }
    Ok(())
}

fn not_enrolled(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let scene = Scene::new(&node, Families::Dual, stack)?;
    scene.pod.unenroll()?;
    let socket = scene.socket()?;
    let (name, question) = fresh_question("plain")?;
    socket.send_to(&question, scene.spell(scene.server()?))?;
    ensure!(answer_to(&question, &socket)? == scene.spell(scene.server()?));
    let [heard] = &scene.asked.heard_of(&name)[..] else { bail!("{:?}", scene.asked.heard()) };
    ensure!(heard.from.port() == socket.local_addr()?.port());
    Ok(())
}

/// A pod whose `lo` lacks the resolver's address is captured all the same, and can query in the other family.
fn without_the_resolvers_address(context: &Context, stack: Stack) -> Result<()> {
    context.needs(ProxyKind::Embedded, "a ztunnel refuses a pod in which its resolver cannot listen")?;
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let prefix = if stack.loopback().is_ipv4() { 8 } else { 128 };
    pod.netns().ip(&format!("address delete {}/{prefix} dev lo", stack.loopback()))?;
    pod.enroll()?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    let upstream = node.dns()?;
    let asks = |stack: Stack| -> Result<bool> {
        let server = stack.spell(other.endpoint(stack.family(), PORT)?);
        let socket = pod.netns().run(|| Socket::new(stack.domain(), Type::DGRAM, None))??;
        socket.set_read_timeout(Some(wait::patient(SOON)))?;
        let (name, question) = fresh_question("lo")?;
        socket.connect(&server.into())?;
        socket.send(&question)?;
        let answered = answer_to(&question, &socket.into()).is_ok();
        ensure!(answered != upstream.heard_of(&name).is_empty());
        Ok(answered)
    };
    ensure!(!asks(stack)?, "who answered?");
    let other_family = if stack.family() == Family::Ipv4 { Stack::V6 } else { Stack::V4 };
    ensure!(asks(other_family)?, "no answer in the other family");
    Ok(())
}
