//! Processes that interfere with the capture of their connections. For some of it, the default capabilities of Docker and
//! Kubernetes suffice: CAP_NET_RAW allows SO_MARK and raw sockets.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_DELIVERY, MARK_PROXY, PORT_OUTBOUND};
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Direction, Families, Server, Stack};
use socket2::Socket;

use super::{LONG_ENOUGH, Scene, begin, connect, end, fails, let_it_retry, segments_received, socket_in};
use crate::context::{Context, for_every_stack_in_pods};
use crate::raw;

/// The difference in placement `node`.
const ELSEWHERE: &str = "no mark leaves the pod: packets are known by the device that they come from";

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 10] = [
        ("mark_cleared_while_connecting", |context, stack| mark_changed_while_connecting(context, stack, 0)),
        ("mark_forged_while_connecting", |context, stack| {
            mark_changed_while_connecting(context, stack, MARK_PROXY)
        }),
        ("mark_of_a_delivery_while_connecting", |context, stack| {
            mark_changed_while_connecting(context, stack, MARK_DELIVERY)
        }),
        ("mark_restored_while_connecting", mark_restored_while_connecting),
        ("mark_cleared_when_connected", |context, stack| mark_changed_when_connected(context, stack, 0)),
        ("mark_of_somebody_else_when_connected", |context, stack| {
            mark_changed_when_connected(context, stack, 0x42)
        }),
        ("rule_of_the_pod", rule_of_the_pod),
        ("raw_packet", raw_packet),
        ("mark_of_a_listener", mark_of_a_listener),
        ("listener_in_the_proxys_place", listener_in_the_proxys_place),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| {
            for_every_stack_in_pods(context, &format!("odd_sockets::{name}"), ELSEWHERE, test)
        })
        .collect()
}

/// While the proxy is down a SYN waits; a process with CAP_NET_RAW removes the mark from its socket, or sets the proxy's,
/// so that the retransmission leaves the pod. The egress guard drops it: it recognizes the proxy's sockets by the cgroup
/// of their creator. Istio: without a mark the retransmission matches the rule again; with 0x539 it bypasses the rule and
/// reaches the destination past the proxy.
fn mark_changed_while_connecting(context: &Context, stack: Stack, mark: u32) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    scene.client.node().kill_proxy()?;
    let socket = scene.socket()?;
    begin(&socket, scene.destination())?;
    socket.set_mark(mark)?;
    let_it_retry();
    if mark == MARK_DELIVERY {
        // There is also a route that leads nowhere: the destination belongs to another host.
        ensure!(scene.listening.accepted().is_empty());
        ensure!(segments_received(scene.server.netns())? == scene.segments);
        return Ok(());
    }
    scene.was_held(Way::Outbound, Reason::Unmarked)
}

/// With its mark restored the connection continues: to the proxy, once there is one.
fn mark_restored_while_connecting(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    // Enough for a slow machine.
    scene.client.netns().set_sysctl("net.ipv4.tcp_syn_retries", "12")?;
    scene.client.node().kill_proxy()?;
    let socket = scene.socket()?;
    begin(&socket, scene.destination())?;
    socket.set_mark(0)?;
    let_it_retry();
    scene.was_held(Way::Outbound, Reason::Unmarked)?;
    scene.client.node().start_proxy()?;
    socket.set_mark(MARK_CAPTURE)?;
    scene.is_captured(end(socket, Duration::from_secs(10))?)
}

/// A proxied connection whose socket gets another mark has no way to the proxy any more. Its segments would go in
/// plaintext to a destination that does not know the connection. They are dropped, so the connection stalls until it
/// times out. Istio: the connection continues, because the rules use conntrack entries, not marks.
fn mark_changed_when_connected(context: &Context, stack: Stack, mark: u32) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let connection = connect(scene.socket()?, scene.destination())?;
    // A server answers segments of an unknown connection with a reset.
    let resets = || scene.server.netns().statistic("snmp", "Tcp", "OutRsts");
    let before = resets()?;
    socket2::SockRef::from(connection.stream()).set_mark(mark)?;
    connection.stream().write_all(b"in the open\n")?;
    let_it_retry();
    let strayed = resets()? - before;
    ensure!(strayed == 0, "{strayed} segments came to the server");
    ensure!(scene.dropped(Way::Outbound, Reason::Unmarked)? > 0, "nothing was counted");
    // With its old mark, the connection works again.
    socket2::SockRef::from(connection.stream()).set_mark(MARK_CAPTURE)?;
    connection.stream().set_read_timeout(Some(wait::patient(SOON)))?;
    let mut connection = connection;
    connection.hears("in the open")?;
    scene.came_by_the_proxy(&[connection])
}

/// A process with CAP_NET_ADMIN in the pod adds a routing rule before ours. Istio: no effect, because it has no routing
/// rule for outbound connections; but the same process can remove its iptables rules.
fn rule_of_the_pod(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let netns = scene.client.netns();
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule add pref 10 lookup main"))?;
    }
    fails(&scene.socket()?, scene.destination())?;
    scene.was_held(Way::Outbound, Reason::Unmarked)?;
    ensure!(scene.client.proxied_so_far(Direction::Outbound, scene.to)?.is_empty());
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule del pref 10 lookup main"))?;
    }
    scene.is_captured(connect(scene.socket()?, scene.destination())?)
}

/// A SYN from a raw socket (CAP_NET_RAW) does not involve `connect()`. Istio: redirected like any other packet; the
/// process never sees the answer that it expects.
fn raw_packet(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let source: IpAddr = scene.client.address(stack.family())?;
    let syn = raw::syn(source.to_canonical(), 40_000, scene.to, 1);
    for mark in [0, MARK_PROXY] {
        scene.client.netns().run(|| raw::send_marked(&syn, scene.to.ip(), mark))??;
    }
    std::thread::sleep(LONG_ENOUGH / 5);
    scene.was_held(Way::Outbound, Reason::Unmarked)?;
    ensure!(scene.dropped(Way::Outbound, Reason::Unmarked)? >= 2);
    Ok(())
}

/// An application that routes its answers by a mark of its own. The kernel gives that mark to every connection that its listener
/// accepts, instead of the one that leads the answers back to the proxy. Istio: the answers find the proxy by conntrack.
fn mark_of_a_listener(context: &Context, stack: Stack) -> Result<()> {
    const OWN: u32 = 0x1000;
    let node = context.node()?;
    let (pod, peer) = (node.enrolled("pod", Families::Dual)?, node.plain("peer", Families::Dual)?);
    let listening = Server::prepared(pod.netns(), stack, 0, "marked", |socket| socket.set_mark(OWN))?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    let client = if stack.family() == Family::Ipv4 { Stack::V4 } else { Stack::V6 };
    let mut connection = peer.connect(client, to)?;
    connection.exchange("hello")?;
    // More than one packet, in both directions.
    let sent: Vec<u8> = (0..1_000_000u32).map(|number| number as u8).collect();
    ensure!(connection.transfer(&sent)? == sent, "other data came back");
    ensure!(pod.proxied(Direction::Inbound, to)?.len() == 1);
    Ok(())
}

/// While no proxy runs, an application takes its port without binding it: it lets the kernel choose, and leaves it no choice. The
/// agent reserves the port, but a process with CAP_NET_ADMIN can undo that. Even with the proxy's mark, its listener does not
/// count as the proxy's.
fn listener_in_the_proxys_place(context: &Context, stack: Stack) -> Result<()> {
    const RANGE: &str = "net.ipv4.ip_local_port_range";
    let scene = Scene::alone(context, stack)?;
    let netns = scene.client.netns();
    scene.client.node().kill_proxy()?;
    netns.set_sysctl("net.ipv4.ip_local_reserved_ports", "\n")?;
    let usual = netns.sysctl(RANGE)?;
    netns.set_sysctl(RANGE, &format!("{PORT_OUTBOUND} {PORT_OUTBOUND}"))?;
    let listener = socket_in(netns, stack)?;
    listener.set_mark(MARK_PROXY)?;
    transparent(&listener, stack)?;
    listener.listen(16)?;
    let port = listener.local_addr()?.as_socket().context("a port")?.port();
    ensure!(port == PORT_OUTBOUND, "the kernel chose {port}");
    netns.set_sysctl(RANGE, &usual)?;
    fails(&scene.socket()?, scene.destination())?;
    scene.was_held(Way::Outbound, Reason::NoListener)?;
    drop(listener);
    scene.client.node().start_proxy()?;
    scene.is_captured(connect(scene.socket()?, scene.destination())?)
}

fn transparent(socket: &Socket, stack: Stack) -> io::Result<()> {
    match stack {
        Stack::V4 => socket.set_ip_transparent_v4(true),
        Stack::V6 | Stack::Mapped => socket.set_ip_transparent_v6(true),
    }
}
