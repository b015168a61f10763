//! Connections to enrolled pods go through the proxy; the application sees the true client.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_tests::stack::canonical;
use redirect_tests::{Connection, Direction, Families, Netns, Pod, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "inbound::from_pod", from_pod);
    trials.extend(for_every_stack(context, "inbound::from_node", from_node));
    trials.extend(for_every_stack(context, "inbound::from_outside", from_outside));
    trials.extend(for_every_stack(context, "inbound::closed_port", closed_port));
    trials.extend(for_every_stack(context, "inbound::not_enrolled", not_enrolled));
    trials.extend(for_every_kind(context, "pod_to_pod", pod_to_pod));
    trials.extend(for_every_stack(context, "pod_to_pod::closed_port", pod_to_pod_closed_port));
    trials
}

/// A connection from outside the mesh: once in the access log, and the application sees the client's address.
pub(crate) fn passes_the_proxy_once(client: &Netns, server: &Pod, stack: Stack) -> Result<()> {
    let address = server.address(stack.family())?;
    passes_at(client, server, stack, address)
}

/// As [`passes_the_proxy_once`], at an address of the pod.
pub(crate) fn passes_at(client: &Netns, server: &Pod, stack: Stack, address: std::net::IpAddr) -> Result<()> {
    let listening = server.listen(stack)?;
    let to = std::net::SocketAddr::new(address, listening.port());
    let mut connection = Connection::open(client, stack, to)?;
    connection.exchange("hello")?;
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let source = canonical(connection.local_name);

    let entries = server.proxied(Direction::Inbound, to);
    let entries = entries.with_context(|| format!("{source} connected, and heard {:?}", connection.heard))?;
    let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(entry.is_of(stack.family()), "the wrong family: {entry:#?}");
    ensure!(entry.source == source, "{source} is not the source of {entry:#?}");
    ensure!(entry.uid == server.identity().uid, "another pod's UID: {entry:#?}");

    let accepted = listening.accepted();
    ensure!(accepted == [connection.heard.clone()], "the server accepted {accepted:?}");
    ensure!(connection.heard.peer.ip() == source.ip(), "the application saw {}", connection.heard.peer);
    ensure!(connection.heard.local == to, "the application is at {}", connection.heard.local);
    Ok(())
}

fn from_pod(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.plain("client", Families::Dual)?, node.enrolled("server", families)?);
    passes_the_proxy_once(client.netns(), &server, stack)
}

fn from_node(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let server = node.enrolled("server", Families::Dual)?;
    passes_the_proxy_once(node.netns(), &server, stack)
}

fn from_outside(context: &Context, stack: Stack) -> Result<()> {
    let node = redirect_tests::Node::start(&context.session()?)?;
    let outside = Netns::new("outside")?;
    node.attach(&outside, "outside")?;
    let server = node.enrolled("server", Families::Dual)?;
    passes_the_proxy_once(&outside, &server, stack)
}

fn closed_port(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.plain("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    outbound::is_refused_soon(&client, &server, stack)
}

fn not_enrolled(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let server = node.plain("server", Families::Dual)?;
    let _other = node.enrolled("other", Families::Dual)?;
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let connection = Connection::open(node.netns(), stack, to)?;
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    ensure!(server.proxied_at_all()?.is_empty());
    Ok(())
}

/// Both ends enrolled on one node: outbound once, inbound once.
fn pod_to_pod(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", families)?, node.enrolled("server", families)?);
    passes_both_proxies_once(&client, &server, stack)
}

/// A connection between enrolled pods, on any node.
pub(crate) fn passes_both_proxies_once(client: &Pod, server: &Pod, stack: Stack) -> Result<()> {
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connection = client.connect(stack, to)?;
    connection.exchange("hello")?;
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let source = canonical(connection.local_name);

    let entries = client.proxied(Direction::Outbound, to)?;
    let [outbound] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(outbound.is_of(stack.family()) && outbound.source == source, "from {source}: {outbound:#?}");

    let entries = server.proxied(Direction::Inbound, to)?;
    let [inbound] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(
        inbound.is_of(stack.family()) && inbound.source.ip() == source.ip(),
        "from {source}: {inbound:#?}"
    );
    if let Some(upstream) = outbound.upstream_local {
        ensure!(inbound.source == upstream, "from the proxy at {upstream}: {inbound:#?}");
    }

    ensure!(client.proxied_at_all()?.len() == 1 && server.proxied_at_all()?.len() == 1);
    ensure!(listening.accepted() == [connection.heard.clone()]);
    ensure!(connection.heard.peer.ip() == source.ip(), "the application saw {}", connection.heard.peer);
    Ok(())
}

fn pod_to_pod_closed_port(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    outbound::is_refused_soon(&client, &server, stack)
}
