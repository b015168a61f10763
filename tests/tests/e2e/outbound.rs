//! Connections that enrolled pods open go through the proxy; the application does not notice.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_MASK, MARK_PROXY};
use redirect_tests::connection::{dial, io_kind};
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Connection, Direction, Families, Pod, ProxyKind, Stack};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_kind, for_every_stack, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "outbound::captured", captured);
    trials.extend(for_every_stack(context, "outbound::many_at_once", many_at_once));
    trials.extend(for_every_stack(context, "outbound::not_enrolled", not_enrolled));
    trials.extend(for_every_stack(context, "outbound::closed_port", closed_port));
    trials.extend(for_every_stack(context, "outbound::forged_mark", |context, stack| {
        marked(context, stack, MARK_PROXY).map(drop)
    }));
    trials.extend(for_every_stack(context, "outbound::own_mark_is_kept", |context, stack| {
        let kept = marked(context, stack, 0x0005_0000)? & !MARK_MASK;
        ensure!(kept == 0x0005_0000, "the application's mark became {kept:#x}");
        Ok(())
    }));
    trials.push(trial(context, "outbound::v4_only::v6_is_unreachable", |context| {
        unreachable(context, Families::V4Only, Stack::V6)
    }));
    for stack in [Stack::V4, Stack::Mapped] {
        let name = format!("outbound::v6_only::{}_is_unreachable", stack.label());
        trials.push(trial(context, name, move |context| unreachable(context, Families::V6Only, stack)));
    }
    trials.push(trial(context, "outbound::ipv6_switched_off", ipv6_switched_off));
    trials
}

fn captured(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", families)?, node.plain("server", Families::Dual)?);
    passes_the_proxy_once(&client, &server, stack)
}

/// One connection: once in the access log, with the client's true address and the dialed destination.
pub(crate) fn passes_the_proxy_once(client: &Pod, server: &Pod, stack: Stack) -> Result<()> {
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connection = client.connect(stack, to)?;
    connection.exchange("hello")?;

    // The client.
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let source = canonical(connection.local_name);
    ensure!(source.ip() == client.address(stack.family())?, "the client's own address is {source}");

    // The proxy.
    let entries = client.proxied(Direction::Outbound, to);
    let entries = entries.with_context(|| format!("{source} connected, and heard {:?}", connection.heard))?;
    let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(entry.is_of(stack.family()), "the wrong family: {entry:#?}");
    ensure!(entry.source == source, "{source} is not the source of {entry:#?}");
    ensure!(entry.uid == client.identity().uid, "another pod's UID: {entry:#?}");

    // The server sees the proxy's connection, from the pod's address.
    let accepted = listening.accepted();
    ensure!(accepted == [connection.heard.clone()], "the server accepted {accepted:?}");
    ensure!(connection.heard.peer.ip() == source.ip(), "the server saw {}", connection.heard.peer);
    ensure!(connection.heard.peer != source, "the client came itself: {source}");
    if let Some(upstream) = entry.upstream_local {
        ensure!(
            connection.heard.peer == upstream,
            "the server saw {}, not {upstream}",
            connection.heard.peer
        );
    }
    Ok(())
}

/// A connection of an application that sets a mark before it connects is captured like any other, even with the proxy's
/// mark: a pod with NET_ADMIN can set that mark, but it cannot enter the proxy's cgroup. Returns the socket's final
/// mark.
pub(crate) fn marked(context: &Context, stack: Stack, mark: u32) -> Result<u32> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let socket = client.netns().run(|| -> std::io::Result<Socket> {
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        socket.set_mark(mark)?;
        socket.connect_timeout(&stack.spell(to).into(), wait::patient(SOON))?;
        Ok(socket)
    })??;
    let after = socket.mark()?;
    let connection = Connection::greeted(socket.into())?;
    ensure!(connection.heard.peer != canonical(connection.local_name), "the client came itself");
    ensure!(client.proxied(Direction::Outbound, to)?.len() == 1);
    Ok(after)
}

fn many_at_once(context: &Context, stack: Stack) -> Result<()> {
    const MANY: usize = 50;
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connections = (0..MANY).map(|_| client.connect(stack, to)).collect::<Result<Vec<_>>>()?;
    for (number, connection) in connections.iter_mut().enumerate() {
        connection.exchange(&format!("line of {number}"))?;
    }
    let entries = client.proxied(Direction::Outbound, to)?;
    ensure!(entries.len() == MANY, "{} entries", entries.len());
    for connection in &connections {
        let source = canonical(connection.local_name);
        let mine = entries.iter().filter(|entry| entry.source == source).count();
        ensure!(mine == 1, "{mine} entries from {source}");
    }
    Ok(())
}

fn not_enrolled(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.plain("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    // Another enrolled pod on the node, to catch mix-ups.
    let _other = node.enrolled("other", Families::Dual)?;
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let connection = client.connect(stack, to)?;
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    ensure!(client.proxied_at_all()?.is_empty());
    Ok(())
}

fn closed_port(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    is_refused_soon(&client, &server, stack)
}

/// A connection to a port without a listener fails at once, however many proxies are in between.
pub(crate) fn is_refused_soon(client: &Pod, server: &Pod, stack: Stack) -> Result<()> {
    let to = server.endpoint(stack.family(), 9)?;
    let start = Instant::now();
    let error = client.connect(stack, to).err().context("a closed port answered")?;
    let elapsed = start.elapsed();
    ensure!(is_refusal(client, &error), "neither refused nor reset: {error:#}");
    ensure!(elapsed < wait::patient(Duration::from_millis(900)), "only after {elapsed:?}");
    Ok(())
}

/// Whether a client gets this error if its server refused the proxy.
pub(crate) fn is_refusal(client: &Pod, error: &anyhow::Error) -> bool {
    match io_kind(error) {
        Some(ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset) => true,
        // A ztunnel ends the client's connection without a reset.
        Some(ErrorKind::UnexpectedEof) => client.node().session().binaries().kind == ProxyKind::Ztunnel,
        _ => false,
    }
}

fn unreachable(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", families)?, node.plain("server", Families::Dual)?);
    let to = server.endpoint(stack.family(), 9)?;
    let start = Instant::now();
    let outcome = client.netns().run(|| dial(stack, to, Duration::from_secs(5)))?;
    let kind = outcome.err().context("a family that the pod does not have answered")?.kind();
    ensure!(matches!(kind, ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable), "{kind:?}");
    ensure!(start.elapsed() < wait::patient(Duration::from_secs(1)), "only after {:?}", start.elapsed());
    ensure!(client.proxied_at_all()?.is_empty());
    Ok(())
}

fn ipv6_switched_off(context: &Context) -> Result<()> {
    let node = context.node()?;
    let server = node.plain("server", Families::Dual)?;
    let mut spec = node.numbered("client", Families::V4Only);
    spec.ipv6_disabled = true;
    let client = Pod::start(&node, spec)?;
    for stack in [Stack::V4, Stack::Mapped] {
        passes_the_proxy_once(&client, &server, stack)?;
    }
    Ok(())
}
