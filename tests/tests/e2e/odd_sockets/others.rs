//! Sockets that are used elsewhere or at other times than they were created, and addresses that are not the
//! pod's.

use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::process::Process;
use redirect_tests::stack::canonical;
use redirect_tests::wait::SOON;
use redirect_tests::{Connection, Families, Netns, Node, NodeOptions, Stack, wait};
use socket2::Socket;

use super::{Scene, connect, fails, greet, segments_received, socket_in};
use crate::context::{Context, for_every_stack};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 8] = [
        ("made_before_enrollment", made_before_enrollment),
        ("used_by_a_process_of_the_node", used_by_a_process_of_the_node),
        ("of_a_pod_that_is_not_enrolled", of_a_pod_that_is_not_enrolled),
        ("nested_cgroups", nested_cgroups),
        ("free_binding", free_binding),
        ("transparent", transparent),
        ("excluded_port", excluded_port),
        ("reserved_address", reserved_address),
    ];
    let mut trials: Vec<_> = tests
        .into_iter()
        .flat_map(|(name, test)| for_every_stack(context, &format!("odd_sockets::{name}"), test))
        .collect();
    trials.push(crate::context::trial(context, "odd_sockets::link_local", link_local));
    trials
}

/// The time of `connect()` counts. Istio: the same, by the time of the SYN.
fn made_before_enrollment(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let client = node.plain("client", Families::Dual)?;
    let scene = Scene::with(client, &node, stack)?;
    let socket = scene.socket()?;
    scene.client.enroll()?;
    scene.is_captured(connect(socket, scene.destination())?)
}

/// The socket's namespace counts, not that of the process that uses it. Istio: the same.
fn used_by_a_process_of_the_node(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let (theirs, ours) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
    let to = scene.destination();
    let node = scene.client.node().netns();
    let connected = std::thread::scope(|scope| -> Result<Socket> {
        let user = scope.spawn(|| {
            node.run(|| -> Result<Socket> {
                let socket = receive(&theirs)?;
                socket.connect_timeout(&to.into(), wait::patient(SOON))?;
                Ok(socket)
            })
        });
        send(&ours, scene.socket()?)?;
        drop(ours);
        user.join().map_err(|_| anyhow::anyhow!("the user of the socket panicked"))??
    })?;
    scene.is_captured(greet(connected)?)
}

/// The reverse: a process of an enrolled pod that was given another pod's socket acts as that pod. It cannot obtain one
/// by itself. Istio: the same.
fn of_a_pod_that_is_not_enrolled(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let other = scene.client.node().plain("other", Families::Dual)?;
    let socket = socket_in(other.netns(), stack)?;
    let to = scene.destination();
    let socket = scene
        .client
        .netns()
        .run(|| socket.connect_timeout(&to.into(), wait::patient(SOON)).map(|()| socket))??;
    let connection = greet(socket)?;
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    ensure!(connection.heard.peer.ip() == other.address(stack.family())?);
    ensure!(scene.client.proxied_at_all()?.is_empty());
    Ok(())
}

fn send(channel: &OwnedFd, socket: Socket) -> Result<()> {
    let descriptors = [socket.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(channel.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive(channel: &OwnedFd) -> Result<Socket> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([libc::c_int; 1]);
    let message =
        recvmsg::<()>(channel.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            let descriptor = *descriptors.first().context("a descriptor")?;
            // SAFETY: the kernel has just created the descriptor, and we alone own it.
            return Ok(unsafe { Socket::from_raw_fd(descriptor) });
        }
    }
    bail!("no descriptor came")
}

/// The programs are attached at the root of the hierarchy and cover everything below. Istio: does not consider cgroups.
fn nested_cgroups(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let session = context.session()?;
    let name = format!("pod-{}", scene.client.identity().uid);
    let pod = session.applications().child(&name)?;
    let container = pod.child("container")?;
    let inner = container.child("inner")?;
    for cgroup in [&pod, &container, &inner] {
        let mut command = Command::new(&session.binaries().testbed);
        let family = match stack {
            Stack::V4 => "v4",
            Stack::V6 => "v6",
            Stack::Mapped => "mapped",
        };
        command.args(["client", "--family", family, "--to", &scene.to.to_string()]);
        let log = session.directory().join(format!("{name}-{}.log", stack.label()));
        let process = Process::spawn("client", command, scene.client.netns(), cgroup, &log)?;
        let line =
            wait::until("line of the client", SOON, || Ok(process.log().lines().next().map(str::to_owned)))?;
        let answer: serde_json::Value = serde_json::from_str(&line)?;
        ensure!(answer["error"].is_null(), "{answer:#}");
        ensure!(answer["heard"]["peer"] != answer["getsockname"], "the client came itself: {answer:#}");
        // Its cgroup is removed after it has ended.
        wait::until_true("end of the client", SOON, || Ok(cgroup.processes()?.is_empty()))?;
    }
    ensure!(scene.listening.accepted().len() == 3, "the server accepted {:?}", scene.listening.accepted());
    scene.were_proxied(3)
}

/// An address that no host has.
fn foreign(stack: Stack) -> SocketAddr {
    let address = match stack.family() {
        Family::Ipv4 => "192.0.2.77:0",
        Family::Ipv6 => "[2001:db8::77]:0",
    };
    stack.spell(address.parse().unwrap_or_else(|_| unreachable!("an address")))
}

/// `IP_FREEBIND` lets an application bind an address that its pod does not have, without privilege. The connection is
/// captured like any other, and never established: the proxy's answers to that address leave the pod and are lost. Istio:
/// the same, without an answer.
fn free_binding(context: &Context, stack: Stack) -> Result<()> {
    with_foreign_source(context, stack, |socket| match stack {
        Stack::V4 => socket.set_freebind_v4(true),
        Stack::V6 | Stack::Mapped => socket.set_freebind_v6(true).and_then(|()| socket.set_freebind_v4(true)),
    })
}

/// With `IP_TRANSPARENT` (CAP_NET_ADMIN), like `IP_FREEBIND`.
fn transparent(context: &Context, stack: Stack) -> Result<()> {
    with_foreign_source(context, stack, |socket| match stack {
        Stack::V4 => socket.set_ip_transparent_v4(true),
        Stack::V6 | Stack::Mapped => socket.set_ip_transparent_v6(true),
    })
}

fn with_foreign_source(
    context: &Context,
    stack: Stack,
    prepare: impl Fn(&Socket) -> std::io::Result<()>,
) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let socket = scene.socket()?;
    prepare(&socket)?;
    socket.bind(&foreign(stack).into())?;
    fails(&socket, scene.destination())?;
    ensure!(scene.listening.accepted().is_empty(), "the server accepted {:?}", scene.listening.accepted());
    let segments = segments_received(scene.server.netns())? - scene.segments;
    ensure!(segments == 0, "{segments} segments came to the server");
    // The pod's own address works as well.
    let socket = scene.socket()?;
    prepare(&socket)?;
    socket.bind(&stack.spell(SocketAddr::new(scene.client.address(stack.family())?, 0)).into())?;
    scene.is_captured(connect(socket, scene.destination())?)
}

/// Connections that the connect hook lets pass also pass the egress guard. Istio: the same, by RETURN rules.
fn excluded_port(context: &Context, stack: Stack) -> Result<()> {
    const PORT: u16 = 4242;
    let agent_arguments = vec![format!("--exclude-outbound-ports={PORT}")];
    let node = Node::with(&context.session()?, NodeOptions { agent_arguments, ..NodeOptions::default() })?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    let _listening = redirect_tests::Server::start(server.netns(), stack, PORT, "excluded")?;
    let mut connection = client.connect(stack, server.endpoint(stack.family(), PORT)?)?;
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    connection.transfer(&[1; 100_000])?;
    ensure!(client.proxied_at_all()?.is_empty());
    Ok(())
}

/// Linux and some clouds treat addresses that are reserved for future use as unicast. Istio: the same.
fn reserved_address(context: &Context, stack: Stack) -> Result<()> {
    let (address, length, more) = match stack.family() {
        Family::Ipv4 => ("240.0.0.1", 32, ""),
        Family::Ipv6 => ("4000::1", 128, " nodad"),
    };
    let scene = Scene::alone(context, stack)?;
    scene.server.netns().ip(&format!("address add {address}/{length} dev lo{more}"))?;
    let via = scene.server.address(stack.family())?;
    scene.client.node().netns().ip(&format!("route add {address}/{length} via {via}"))?;
    let to = SocketAddr::new(address.parse()?, scene.to.port());
    let mut connection = scene.client.connect(stack, to)?;
    connection.exchange("hello")?;
    ensure!(!connection.is_direct(), "past the proxy: {:?}", connection.heard);
    scene.client.proxied_times(redirect_tests::Direction::Outbound, to, 1).map(drop)
}

/// The node proxy can't connect to link-local addresses. Connections to them are refused, or leave the pod past the proxy where
/// the agent lets them. Istio: REDIRECT to ::1 keeps the link-local source, and ztunnel refuses it.
fn link_local(context: &Context) -> Result<()> {
    let strict = context.node()?;
    let lenient = Node::with_arguments(&context.session()?, &["--link-local", "pass"])?;
    for (node, passes) in [(&strict, false), (&lenient, true)] {
        let client = node.enrolled("client", Families::Dual)?;
        let server = node.plain("server", Families::Dual)?;
        let listening = server.listen(Stack::V6)?;
        let to = SocketAddr::new(link_local_address(server.netns())?, listening.port());
        let dial = |netns: &Netns| {
            netns.run(|| -> Result<Connection> {
                let SocketAddr::V6(mut to) = to else { bail!("not an IPv6 address") };
                to.set_scope_id(nix::net::if_::if_nametoindex("eth0")?);
                let socket = Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
                socket.connect_timeout(&to.into(), wait::patient(SOON))?;
                greet(socket)
            })
        };
        if passes {
            let connection = dial(client.netns())??;
            ensure!(connection.heard.peer.port() == connection.local_name.port(), "{:?}", connection.heard);
        } else {
            ensure!(dial(client.netns())?.is_err(), "a neighbour was reached past the proxy");
            ensure!(listening.accepted().is_empty(), "{:?}", listening.accepted());
            ensure!(super::dropped(node, Stack::V6, Way::Outbound, Reason::LinkScoped)? > 0);
        }
        ensure!(client.proxied_at_all()?.is_empty());
    }
    Ok(())
}

fn link_local_address(netns: &Netns) -> Result<std::net::IpAddr> {
    let links = netns.json("ip -j -6 address show dev eth0 scope link")?;
    // Filtered objects remain as empty ones.
    let infos = links.as_array().into_iter().flatten().filter_map(|link| link["addr_info"].as_array());
    let address = infos.flatten().find_map(|info| info["local"].as_str());
    Ok(address.with_context(|| format!("a link-local address in {links:#}"))?.parse()?)
}
