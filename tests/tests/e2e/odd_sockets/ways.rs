//! Other ways to connect than `socket()` and `connect()`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::Stack;
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use socket2::{Protocol, SockAddr, Socket, Type};

use super::{Scene, begin, connect, end, greet};
use crate::context::{Context, for_every_stack};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 9] = [
        ("fast_open", fast_open),
        ("deferred_fast_open", deferred_fast_open),
        ("non_blocking", non_blocking),
        ("bound_to_own_address", bound_to_own_address),
        ("bound_to_device", bound_to_device),
        ("bound_to_device_without_privilege", bound_to_device_without_privilege),
        ("multipath", multipath),
        ("io_uring", io_uring),
        ("connected_anew", connected_anew),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| for_every_stack(context, &format!("odd_sockets::{name}"), test))
        .collect()
}

/// `sendto(MSG_FASTOPEN)` runs the connect hook. The proxy's listener issues no cookies, so the data follows the
/// handshake; to the proxy it is an ordinary connection. Istio: the same, by its rules on the SYN.
fn fast_open(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let socket = scene.socket()?;
    let sent = socket.send_to_with_flags(b"early\n", &scene.destination().into(), libc::MSG_FASTOPEN)?;
    ensure!(sent == 6, "{sent} bytes were sent");
    let mut connection = greet(socket)?;
    connection.hears("early")?;
    scene.is_captured(connection)
}

/// With `TCP_FASTOPEN_CONNECT` the SYN is sent with the first `write()`; `connect()` has set the mark.
fn deferred_fast_open(context: &Context, stack: Stack) -> Result<()> {
    const TCP_FASTOPEN_CONNECT: libc::c_int = 30;
    let scene = Scene::on_shared(context, stack)?;
    let socket = scene.socket()?;
    let on: libc::c_int = 1;
    // SAFETY: the option's value lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    ensure!(result == 0, "TCP_FASTOPEN_CONNECT: {}", io::Error::last_os_error());
    socket.connect(&scene.destination().into())?;
    ensure!(socket.send(b"early\n")? == 6);
    let mut connection = greet(socket)?;
    connection.hears("early")?;
    scene.is_captured(connection)
}

/// The hook runs before `EINPROGRESS`. Istio: the same.
fn non_blocking(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let socket = scene.socket()?;
    begin(&socket, scene.destination())?;
    scene.is_captured(end(socket, SOON)?)
}

/// The address that the application chose stays the connection's source. Istio: the same.
fn bound_to_own_address(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let socket = scene.socket()?;
    let own = SocketAddr::new(scene.client.address(stack.family())?, 0);
    socket.bind(&stack.spell(own).into())?;
    let port = socket.local_addr()?.as_socket().context("an IP address")?.port();
    let connection = connect(socket, scene.destination())?;
    ensure!(canonical(connection.local_name) == SocketAddr::new(own.ip(), port));
    scene.is_captured(connection)
}

/// A socket that is bound to a device only uses routes of this device, whatever the rule: the device has its own copy of
/// our route, which also leads through `lo`. Istio: REDIRECT changes the destination to 127.0.0.1 or ::1, to which the
/// device has no route: the connection fails.
fn bound_to_device(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let socket = scene.socket()?;
    socket.bind_device(Some(b"eth0"))?;
    let mut connection = connect(socket, scene.destination())?;
    let data = vec![7; 300_000];
    ensure!(connection.transfer(&data)? == data, "the data came back changed");
    scene.is_captured(connection)
}

/// Like [`bound_to_device`]: a process needs no capability for it.
fn bound_to_device_without_privilege(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let (client, to) = (scene.client.netns(), scene.destination());
    let socket = client.run(|| -> Result<Socket> {
        drop_capabilities()?;
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        socket.bind_device(Some(b"eth0"))?;
        ensure!(socket.bind_device(Some(b"lo")).is_err(), "the thread still has CAP_NET_RAW");
        socket.connect_timeout(&to.into(), wait::patient(SOON))?;
        Ok(socket)
    })??;
    scene.is_captured(greet(socket)?)
}

/// The subflow is a TCP socket, for which the hook runs. The proxy does not support MPTCP, so the connection falls back to
/// TCP and has no more subflows. Istio: the same, by its rules on the SYN.
fn multipath(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let netns = scene.client.netns();
    if !netns.has_sysctl("net.mptcp.enabled")? || netns.sysctl("net.mptcp.enabled")? == "0" {
        println!("skipped: multipath::{}: this kernel has no MPTCP", stack.label());
        return Ok(());
    }
    let socket = netns.run(|| Socket::new(stack.domain(), Type::STREAM, Some(Protocol::MPTCP)))??;
    scene.is_captured(connect(socket, scene.destination())?)
}

/// The same kernel code as `connect()`, including the hook. Istio: the same.
fn io_uring(context: &Context, stack: Stack) -> Result<()> {
    use io_uring::{IoUring, opcode, types};
    let scene = Scene::on_shared(context, stack)?;
    let mut ring = match IoUring::new(4) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            println!("skipped: io_uring::{}: this kernel has no io_uring: {error}", stack.label());
            return Ok(());
        }
        ring => ring?,
    };
    let socket = scene.socket()?;
    let to = SockAddr::from(scene.destination());
    let entry = opcode::Connect::new(types::Fd(socket.as_raw_fd()), to.as_ptr().cast(), to.len()).build();
    // SAFETY: socket and address live until the entry is completed.
    unsafe { ring.submission().push(&entry)? };
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().context("a completion")?.result();
    ensure!(result == 0, "connect: {}", io::Error::from_raw_os_error(-result));
    scene.is_captured(greet(socket)?)
}

/// `connect(AF_UNSPEC)` dissolves a connection and the socket reconnects: each `connect()` gets its own decision. A
/// mark left from a captured connection would send the one to loopback to the proxy; without a mark the third would
/// bypass it. Istio: the same, because it sees packets.
fn connected_anew(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let local = scene.client.listen(stack)?;
    let to_loopback = stack.spell(SocketAddr::new(stack.loopback(), local.port()));
    let socket = scene.socket()?;

    let first = connect(socket.try_clone()?, scene.destination())?;
    dissolve(&socket)?;
    let inside = connect(socket.try_clone()?, to_loopback)?;
    ensure!(inside.heard.peer == canonical(inside.local_name), "proxied: {:?}", inside.heard);
    ensure!(local.accepted() == std::slice::from_ref(&inside.heard));
    dissolve(&socket)?;
    let again = connect(socket.try_clone()?, scene.destination())?;
    scene.came_by_the_proxy(&[first, again])?;
    ensure!(scene.client.proxied_at_all()?.len() == 2);
    Ok(())
}

/// `connect(AF_UNSPEC)`.
fn dissolve(socket: &Socket) -> Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::connect(socket.as_raw_fd(), &raw const nowhere, size_of_val(&nowhere) as libc::socklen_t)
    };
    ensure!(result == 0, "connect(AF_UNSPEC): {}", io::Error::last_os_error());
    Ok(())
}

/// Permanently drops all capabilities of the calling thread.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: header and sets live for the length of the call, in the layout of version 3.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
