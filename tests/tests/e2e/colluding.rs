//! Connections that open in an unusual way: a process of the pod and a peer outside cooperate, agree on both ports, and need no
//! listener. No gate ever sees the pod's SYN.
//!
//! With `CAP_NET_RAW`, a runtime's default, the process removes the mark from the socket, so that its answers leave the pod; with
//! `CAP_NET_ADMIN` at both ends it establishes a connection out of nothing (`TCP_REPAIR`).

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Reason};
use redirect_protocol::placement::Placement;
use redirect_tests::{Families, Node, Pod, Stack};
use socket2::{Protocol, Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::{LONG_ENOUGH, dropped};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 3] = [
        ("syn_that_is_deferred", |context, stack| simultaneous(context, stack, Silence::Deferred)),
        ("syn_that_is_held", |context, stack| simultaneous(context, stack, Silence::Held)),
        ("connection_of_nothing", repaired),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| for_every_stack(context, &format!("colluding::{name}"), test))
        .collect()
}

/// A socket of a process in the pod and one of its peer, on ports that both know.
struct Pair {
    inside: (Socket, SocketAddr),
    outside: (Socket, SocketAddr),
}

impl Pair {
    fn between(pod: &Pod, peer: &Pod, stack: Stack) -> Result<Self> {
        let bound = |of: &Pod| -> Result<(Socket, SocketAddr)> {
            let address = stack.spell(SocketAddr::new(of.address(stack.family())?, 0));
            let socket = of.netns().run(|| -> io::Result<Socket> {
                let socket = Socket::new(stack.domain(), Type::STREAM, Some(Protocol::TCP))?;
                socket.bind(&address.into())?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })??;
            let address = socket.local_addr()?.as_socket().expect("an IP socket");
            Ok((socket, address))
        };
        Ok(Self { inside: bound(pod)?, outside: bound(peer)? })
    }

    /// Which of the two could send data to the other.
    fn talk(&self) -> Result<Talk> {
        let (inside, outside) = (&self.inside.0, &self.outside.0);
        let talk = Talk { out: hears(outside, inside)?, into: hears(inside, outside)? };
        Ok(talk)
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Talk {
    /// The peer received data from the process in the pod.
    out: bool,
    /// The process in the pod received data from its peer.
    into: bool,
}

/// Whether data arrives, within the time of a SYN's retransmission.
fn hears(listener: &Socket, speaker: &Socket) -> Result<bool> {
    let deadline = std::time::Instant::now() + LONG_ENOUGH;
    let mut said = false;
    while std::time::Instant::now() < deadline {
        // As soon as possible.
        said = said || speaker.send_with_flags(b"psst", libc::MSG_NOSIGNAL).is_ok();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 8];
        if matches!(listener.recv(&mut buffer), Ok(4)) {
            return Ok(true);
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(false)
}

fn set(socket: &Socket, option: libc::c_int, value: u32) -> Result<()> {
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), size)
    };
    ensure!(result == 0, "TCP option {option}: {}", io::Error::last_os_error());
    Ok(())
}

fn connect(socket: &Socket, to: SocketAddr) -> Result<()> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Why the SYN of the process in the pod does not reach a listener of the proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Silence {
    /// It is sent with the first data: TCP Fast Open, without a cookie request.
    Deferred,
    /// No proxy listens.
    Held,
    /// It is lost on its way, as it could be in a pod that is not enrolled.
    Lost,
}

/// Makes the pod's packets to its peer get lost, or stops that.
fn lose(pod: &Pod, peer: &Pod, stack: Stack, lost: bool) -> Result<()> {
    let peer = peer.address(stack.family())?;
    let nobody = if lost { "replace ADDRESS lladdr 02:00:00:00:00:99 nud permanent" } else { "del ADDRESS" };
    pod.netns().ip(&format!("neigh {} dev eth0", nobody.replace("ADDRESS", &peer.to_string())))?;
    Ok(())
}

/// Both ends are connecting when the peer's SYN arrives, so the kernel looks up no listener.
fn simultaneous(context: &Context, stack: Stack, silence: Silence) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let peer = node.plain("peer", Families::Dual)?;
    let open = |pod: &Pod, silence: Silence| -> Result<Pair> {
        let pair = Pair::between(pod, &peer, stack)?;
        let ((inside, here), (outside, there)) = (&pair.inside, &pair.outside);
        if silence == Silence::Lost {
            lose(pod, &peer, stack, true)?;
        }
        if silence == Silence::Deferred {
            const TCP_FASTOPEN_CONNECT: libc::c_int = 30;
            const TCP_FASTOPEN_NO_COOKIE: libc::c_int = 34;
            set(inside, TCP_FASTOPEN_CONNECT, 1)?;
            set(inside, TCP_FASTOPEN_NO_COOKIE, 1)?;
        }
        connect(inside, *there)?;
        inside.set_mark(0)?;
        if silence == Silence::Deferred {
            // Its SYN; dropped data stays in the queue.
            ensure!(inside.send(b"psst")? == 4);
        }
        if silence == Silence::Lost {
            lose(pod, &peer, stack, false)?;
        }
        connect(outside, *here)?;
        Ok(pair)
    };
    // Control: in a plain pod both can talk.
    let plain = node.plain("plain", Families::Dual)?;
    let talk = open(&plain, Silence::Lost)?.talk()?;
    ensure!(talk == Talk { out: true, into: true }, "a pod that is not enrolled: {talk:?}");
    let pod = node.enrolled("pod", Families::Dual)?;
    if silence == Silence::Held {
        node.kill_proxy()?;
    }
    let talk = open(&pod, silence)?.talk()?;
    ensure!(talk == Talk { out: false, into: false }, "past the proxy: {talk:?}");
    let counted = dropped(&node, stack, Way::Inbound, Reason::SimultaneousOpen)?;
    // In placement `node` the peer's SYN goes to the proxy like any other.
    ensure!((counted > 0) == (context.placement() == Placement::Pod), "{counted} SYNs were counted");
    Ok(())
}

/// Both ends declare a connection established. What the pod sends is dropped at the host end of its device. In placement `pod`
/// what the peer sends arrives: the pod's kernel has the connection.
fn repaired(context: &Context, stack: Stack) -> Result<()> {
    const TCP_REPAIR: libc::c_int = 19;
    let node = Node::start(&context.session()?)?;
    let peer = node.plain("peer", Families::Dual)?;
    let open = |pod: &Pod| -> Result<Pair> {
        let pair = Pair::between(pod, &peer, stack)?;
        let ((inside, here), (outside, there)) = (&pair.inside, &pair.outside);
        for (socket, to, sent, received) in [(inside, there, 1000, 2000), (outside, here, 2000, 1000)] {
            const TCP_REPAIR_QUEUE: libc::c_int = 20;
            const TCP_QUEUE_SEQ: libc::c_int = 21;
            const QUEUES: [u32; 2] = [2, 1];
            set(socket, TCP_REPAIR, 1)?;
            for (queue, sequence) in QUEUES.into_iter().zip([sent, received]) {
                set(socket, TCP_REPAIR_QUEUE, queue)?;
                set(socket, TCP_QUEUE_SEQ, sequence)?;
            }
            connect(socket, *to)?;
            socket.set_mark(0)?;
        }
        // From here on each answers the other.
        [inside, outside].into_iter().try_for_each(|socket| set(socket, TCP_REPAIR, 0))?;
        Ok(pair)
    };
    let plain = node.plain("plain", Families::Dual)?;
    let talk = open(&plain)?.talk()?;
    ensure!(talk == Talk { out: true, into: true }, "a pod that is not enrolled: {talk:?}");
    let pod = node.enrolled("pod", Families::Dual)?;
    let talk = open(&pod)?.talk()?;
    ensure!(!talk.out, "past the proxy: {talk:?}");
    ensure!(dropped(&node, stack, Way::Outbound, Reason::PastPod)? > 0, "nothing was counted");
    Ok(())
}
