//! However an application sends its query, it sees the server that it queried.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV6, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, recvmsg, sendmmsg, sendmsg};
use redirect_protocol::placement::Placement;
use redirect_tests::connection::dial;
use redirect_tests::dns::{LONG, PORT, check_answer, question, read_framed, write_framed};
use redirect_tests::wait::SOON;
use redirect_tests::{Families, ProxyKind, Stack};
use socket2::SockRef;

use super::{Scene, answer_to, fresh_question};
use crate::context::{Context, for_every_kind, for_every_stack, trial};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "dns::connected_udp", connected);
    trials.extend(for_every_kind(context, "dns::unconnected_udp", unconnected));
    trials.extend(for_every_kind(context, "dns::tcp", tcp));
    trials.extend(for_every_kind(context, "dns::bound_to_the_pods_address", bound));
    trials.extend(for_every_stack(context, "dns::sendmsg_and_recvmsg", messages));
    trials.extend(for_every_stack(context, "dns::sendmmsg_and_recvmmsg", batches));
    trials.extend(for_every_stack(context, "dns::several_servers_on_one_socket", several_servers));
    trials.extend(for_every_stack(context, "dns::connected_and_then_elsewhere", elsewhere));
    trials.extend(for_every_stack(context, "dns::connected_anew", connected_anew));
    trials.extend(for_every_stack(context, "dns::lost_answers", lost_answers));
    trials.extend(for_every_stack(context, "dns::many_questions_on_one_socket", many_questions));
    trials.extend(for_every_stack(context, "dns::long_answers", long_answers));
    trials.extend(for_every_stack(context, "dns::bound_to_a_device", bound_to_a_device));
    trials.push(trial(context, "dns::link_local_server", link_local));
    trials
}

fn connected(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.spell(scene.server()?);
    let socket = scene.socket()?;
    socket.connect(server)?;
    ensure!(socket.peer_addr()? == server, "getpeername says {}", socket.peer_addr()?);
    // The second time, only the kernel knows the destination.
    for _ in 0..2 {
        let (name, question) = fresh_question("connected")?;
        socket.send(&question)?;
        let from = answer_to(&question, &socket)?;
        ensure!(from == server, "recvfrom says {from}");
        scene.was_resolved(&name, "udp")?;
    }
    ensure!(socket.peer_addr()? == server, "getpeername says {}", socket.peer_addr()?);
    has_own_address(&scene, socket.local_addr()?)
}

/// getsockname returns the pod's address, not the resolver's.
fn has_own_address(scene: &Scene, name: SocketAddr) -> Result<()> {
    let own = scene.spell(SocketAddr::new(scene.pod.address(scene.stack.family())?, name.port()));
    ensure!(name == own, "getsockname says {name}");
    Ok(())
}

fn unconnected(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.spell(scene.server()?);
    let socket = scene.socket()?;
    for _ in 0..2 {
        let (name, question) = fresh_question("unconnected")?;
        socket.send_to(&question, server)?;
        let from = answer_to(&question, &socket)?;
        ensure!(from == server, "recvfrom says {from}");
        scene.was_resolved(&name, "udp")?;
    }
    Ok(())
}

fn tcp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.server()?;
    let mut stream = scene.pod.netns().run(|| dial(stack, server, SOON))??;
    ensure!(stream.peer_addr()? == scene.spell(server), "getpeername says {}", stream.peer_addr()?);
    has_own_address(&scene, stream.local_addr()?)?;
    for _ in 0..2 {
        let (name, question) = fresh_question("tcp")?;
        ask_by_tcp(&mut stream, &question)?;
        scene.was_resolved(&name, "tcp")?;
    }
    ensure!(scene.pod.proxied_at_all()?.is_empty(), "taken for an ordinary connection");
    Ok(())
}

fn ask_by_tcp(stream: &mut TcpStream, question: &[u8]) -> Result<()> {
    write_framed(stream, question)?;
    check_answer(question, &read_framed(stream)?)
}

fn bound(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.spell(scene.server()?);
    let own = scene.spell(SocketAddr::new(scene.pod.address(stack.family())?, 0));
    for connect in [true, false] {
        let socket = scene.socket()?;
        SockRef::from(&socket).bind(&own.into())?;
        let (name, question) = fresh_question("bound")?;
        if connect {
            socket.connect(server)?;
            socket.send(&question)?;
        } else {
            socket.send_to(&question, server)?;
        }
        ensure!(answer_to(&question, &socket)? == server);
        ensure!(socket.local_addr()?.ip() == own.ip(), "getsockname says {}", socket.local_addr()?);
        let entry = scene.was_resolved(&name, "udp")?;
        ensure!(entry.source.is_none_or(|source| source.ip() == own.ip().to_canonical()), "{entry:?}");
    }
    Ok(())
}

fn messages(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let server = scene.spell(scene.server()?);
    for connect in [false, true] {
        let socket = scene.socket()?;
        let (name, question) = fresh_question("message")?;
        let parts = [IoSlice::new(&question[..4]), IoSlice::new(&question[4..])];
        let to = SockaddrStorage::from(server);
        if connect {
            socket.connect(server)?;
        }
        let to = (!connect).then_some(&to);
        sendmsg(socket.as_raw_fd(), &parts, &[], MsgFlags::empty(), to)?;
        let mut buffer = [0; 4096];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty())?;
        let (length, from) = (received.bytes, received.address.context("no address")?);
        ensure!(socket_address(&from) == Some(server), "recvmsg says {from}");
        check_answer(&question, &buffer[..length])?;
        scene.was_resolved(&name, "udp")?;
    }
    Ok(())
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|address| SocketAddr::from(std::net::SocketAddrV4::from(*address)));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| SocketAddrV6::from(*address).into()))
}

/// As in musl and others: one system call for all servers, one for all answers.
fn batches(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let servers = scene.servers()?.map(|server| scene.spell(server));
    let socket = scene.socket()?;
    let questions = servers.iter().map(|_| fresh_question("batch")).collect::<Result<Vec<_>>>()?;
    let to: Vec<_> = servers.iter().map(|&server| Some(SockaddrStorage::from(server))).collect();
    let slices: Vec<_> = questions.iter().map(|(_, question)| [IoSlice::new(question)]).collect();
    let mut headers = MultiHeaders::preallocate(servers.len(), None);
    let sent = sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &to, [], MsgFlags::empty())?.count();
    ensure!(sent == servers.len(), "{sent} sent");
    // Answers may arrive in any order; this gives all of them enough time.
    thread::sleep(Duration::from_millis(200));

    let mut buffers = vec![vec![0; 512]; servers.len()];
    let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(servers.len(), None);
    let received: Vec<_> =
        recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None)?
            .map(|message| message.address.as_ref().and_then(socket_address))
            .collect();
    ensure!(received == servers.map(Some), "recvmmsg says {received:?}");
    for (name, _) in questions {
        scene.was_resolved(&name, "udp")?;
    }
    Ok(())
}

fn several_servers(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let servers = scene.servers()?.map(|server| scene.spell(server));
    let socket = scene.socket()?;
    // One after the other.
    for &server in &servers {
        let (name, question) = fresh_question("several")?;
        socket.send_to(&question, server)?;
        let from = answer_to(&question, &socket)?;
        ensure!(from == server, "{server} was asked, {from} answered");
        scene.was_resolved(&name, "udp")?;
    }
    // The same query to all of them, twice, as in musl.
    let (name, question) = fresh_question("several")?;
    for _ in 0..2 {
        let mut from = Vec::new();
        for server in &servers {
            socket.send_to(&question, server)?;
        }
        for _ in &servers {
            from.push(answer_to(&question, &socket)?);
        }
        let mut servers = servers;
        if context.placement() == Placement::Node {
            // Each answer comes from the server that it names, in any order.
            servers.sort();
            from.sort();
        }
        ensure!(from == servers, "{servers:?} were asked, {from:?} answered");
    }
    scene.was_resolved(&name, "udp").map(drop)
}

/// A query to another server than the connected one.
fn elsewhere(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let [server, other, _] = scene.servers()?.map(|server| scene.spell(server));
    let socket = scene.socket()?;
    socket.connect(server)?;
    let (name, question) = fresh_question("elsewhere")?;
    for to in [other, server, other] {
        SockRef::from(&socket).send_to(&question, &to.into())?;
        let from = answer_to(&question, &socket)?;
        ensure!(from == to, "{to} was asked, {from} answered");
        ensure!(socket.peer_addr()? == server, "getpeername says {}", socket.peer_addr()?);
    }
    socket.send(&question)?;
    let from = answer_to(&question, &socket)?;
    ensure!(from == server, "{server} was asked, {from} answered");
    scene.was_resolved(&name, "udp").map(drop)
}

/// One socket, connected to one server after another.
fn connected_anew(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let socket = scene.socket()?;
    for server in scene.servers()?.map(|server| scene.spell(server)) {
        socket.connect(server)?;
        ensure!(socket.peer_addr()? == server, "getpeername says {}", socket.peer_addr()?);
        let (name, question) = fresh_question("anew")?;
        socket.send(&question)?;
        let from = answer_to(&question, &socket)?;
        ensure!(from == server, "{server} was asked, {from} answered");
        scene.was_resolved(&name, "udp")?;
    }
    // A query does not prevent other connections without a connect(AF_UNSPEC) in between either.
    let elsewhere = SocketAddr::new(scene.server()?.ip(), 7);
    socket.connect(scene.spell(elsewhere))?;
    ensure!(socket.peer_addr()? == scene.spell(elsewhere), "getpeername says {}", socket.peer_addr()?);
    has_own_address(&scene, socket.local_addr()?)?;
    scene.server_heard_nothing()
}

/// A query that the resolver does not answer shifts no other answer to the wrong server.
fn lost_answers(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let servers = scene.servers()?.map(|server| scene.spell(server));
    let socket = scene.socket()?;
    for lost in 1..=6 {
        for _ in 0..lost {
            // Too short for an answer.
            socket.send_to(b"?", servers[0])?;
        }
        // The timeout of the most impatient resolvers.
        thread::sleep(Duration::from_millis(750));
        for server in [servers[1], servers[2], servers[0]] {
            let (_, question) = fresh_question("lost")?;
            socket.send_to(&question, server)?;
            let from = answer_to(&question, &socket)?;
            ensure!(from == server, "{server} was asked, {from} answered, after {lost} lost");
        }
    }
    scene.server_heard_nothing()
}

fn many_questions(context: &Context, stack: Stack) -> Result<()> {
    const MANY: usize = 100;
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let server = scene.spell(scene.server()?);
    for connect in [false, true] {
        let socket = scene.socket()?;
        if connect {
            socket.connect(server)?;
        }
        let send = |bytes: &[u8]| if connect { socket.send(bytes) } else { socket.send_to(bytes, server) };
        let mut names = Vec::new();
        for number in 0..MANY {
            let (name, question) = fresh_question("many")?;
            send(&question)?;
            names.push(name);
            if number % 5 == 0 {
                send(b"?")?;
            }
        }
        for _ in 0..MANY {
            let mut buffer = [0; 512];
            let (_, from) = socket.recv_from(&mut buffer).context("not every question was answered")?;
            ensure!(from == server, "{server} was asked, {from} answered");
        }
        for name in names {
            scene.was_resolved(&name, "udp")?;
        }
    }
    Ok(())
}

/// An answer that is too long for a datagram is requested over TCP.
fn long_answers(context: &Context, stack: Stack) -> Result<()> {
    context.needs(ProxyKind::Embedded, "a ztunnel's answers by UDP are of any length")?;
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let server = scene.server()?;
    let name = super::fresh_name(LONG.0);
    let question = question(&name, hickory_proto::rr::RecordType::TXT)?;
    let socket = scene.socket()?;
    socket.send_to(&question, scene.spell(server))?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer)?;
    const TRUNCATED: u8 = 0b10;
    ensure!(buffer[2] & TRUNCATED != 0 && length <= 512, "{length} bytes by UDP");
    let mut stream = scene.pod.netns().run(|| dial(stack, server, SOON))??;
    write_framed(&mut stream, &question)?;
    let answer = read_framed(&mut stream)?;
    ensure!(answer.len() > LONG.1, "{} bytes by TCP", answer.len());
    check_answer(&question, &answer)?;
    let heard = scene.upstream.heard_of(&name);
    ensure!(heard.iter().any(|heard| heard.tcp), "never by TCP: {heard:?}");
    scene.was_resolved(&name, "udp").map(drop)
}

fn bound_to_a_device(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, stack)?;
    let server = scene.spell(scene.server()?);
    let socket = scene.socket()?;
    SockRef::from(&socket).bind_device(Some(b"eth0"))?;
    socket.connect(server)?;
    let (name, question) = fresh_question("device")?;
    socket.send(&question)?;
    ensure!(answer_to(&question, &socket)? == server);
    scene.was_resolved(&name, "udp")?;

    let socket = scene.socket()?;
    SockRef::from(&socket).bind_device(Some(b"eth0"))?;
    let (name, question) = fresh_question("device")?;
    // The first datagram already has its interface, and must not leave through it.
    let error = socket.send_to(&question, server).err().context("a datagram got through")?;
    ensure!(error.raw_os_error() == Some(libc::ENOBUFS), "{error}");
    socket.send_to(&question, server)?;
    ensure!(answer_to(&question, &socket)? == server);
    scene.was_resolved(&name, "udp").map(drop)
}

fn link_local(context: &Context) -> Result<()> {
    let scene = Scene::new(&context.node()?, Families::Dual, Stack::V6)?;
    let addresses = scene.other.netns().ip("-o -6 address show dev eth0 scope link")?;
    let address = addresses.split_whitespace().find_map(|word| word.strip_suffix("/64"));
    let address = address.with_context(|| format!("no link-local address: {addresses}"))?;
    let index =
        scene.pod.netns().json("ip -j link show dev eth0")?[0]["ifindex"].as_u64().context("no index")?;
    let server = SocketAddrV6::new(address.parse()?, PORT, 0, index as u32).into();
    let socket = scene.socket()?;
    socket.connect(server)?;
    let (name, question) = fresh_question("link")?;
    socket.send(&question)?;
    let from = answer_to(&question, &socket)?;
    ensure!(from.ip() == SocketAddr::ip(&server) && socket.peer_addr()?.ip() == from.ip());
    scene.was_resolved(&name, "udp")?;

    // The kernel has chosen the interface before any program can redirect the datagram.
    let (_, question) = fresh_question("link")?;
    let error = scene.socket()?.send_to(&question, server).err().context("a datagram was sent")?;
    ensure!(error.kind() == ErrorKind::NetworkUnreachable, "{error}");
    scene.server_heard_nothing()
}
