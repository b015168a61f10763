//! Connections to the proxy's own ports: there are no loops, and no client waits forever.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_tests::connection::dial;
use redirect_tests::wait;
use redirect_tests::{Families, Netns, Node, NodeOptions, Pod, ProxyKind, Server, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "proxy_ports::from_inside", from_inside);
    trials.extend(for_every_kind(context, "proxy_ports::from_outside", from_outside));
    trials.extend(for_every_kind(context, "proxy_ports::from_another_enrolled_pod", from_enrolled));
    trials.extend(for_every_stack(context, "proxy_ports::of_a_server_elsewhere", elsewhere));
    trials.extend(for_every_stack(context, "proxy_ports::at_an_unknown_address", unknown_address));
    trials.extend(for_every_stack(
        context,
        "proxy_ports::from_an_excluded_network",
        from_an_excluded_network,
    ));
    trials
}

const PORTS: [u16; 3] = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL];

/// The listeners for captured connections.
const CAPTURED: [u16; 2] = [PORT_OUTBOUND, PORT_INBOUND];

/// The ports that an outside client dials. A tunnel connection would wait for a listener that the embedded proxy
/// does not have.
fn from_afar(context: &Context) -> Result<impl Iterator<Item = u16>> {
    let tunnel = (context.proxy()? == ProxyKind::Ztunnel).then_some(PORT_TUNNEL);
    Ok(CAPTURED.into_iter().chain(tunnel).chain([PORT_DNS]).chain(ELSEWHERE))
}

/// Ports that a proxy uses in its own namespace: administration, metrics, readiness, SOCKS.
const ELSEWHERE: [u16; 4] = [15000, 15020, 15021, 15080];

/// The connection ends soon, without an answer except for a TLS alert.
fn ends_soon(client: &Netns, stack: Stack, ip: IpAddr, port: u16) -> Result<()> {
    const SOON: Duration = Duration::from_secs(2);
    const TLS_ALERT: u8 = 21;
    let start = Instant::now();
    let mut answer = [0; 16];
    let outcome = client.run(|| -> std::io::Result<usize> {
        let mut stream = dial(stack, (ip, port).into(), Duration::from_secs(5))?;
        // The other end may have closed already.
        let _ = stream.write_all(b"hello\r\n\r\n");
        stream.read(&mut answer)
    })?;
    let elapsed = start.elapsed();
    ensure!(elapsed < wait::patient(SOON), "{stack} to {ip} port {port}: {outcome:?} only after {elapsed:?}");
    let complaint = port == PORT_TUNNEL && answer[0] == TLS_ALERT;
    ensure!(
        complaint || !matches!(outcome, Ok(1..)),
        "{stack} to {ip} port {port}: someone spoke: {outcome:?} {answer:?}"
    );
    Ok(())
}

/// No process listens.
fn is_refused(client: &Netns, stack: Stack, ip: IpAddr, port: u16) -> Result<()> {
    let outcome = client.run(|| dial(stack, (ip, port).into(), Duration::from_secs(5)))?;
    let error = outcome.err().with_context(|| format!("{stack} to {ip} port {port}: someone answered"))?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{stack} to {ip} port {port}: {error}");
    Ok(())
}

/// One connection causes few entries: at most one at each end.
fn no_circles(pods: &[&Pod], calls: usize) -> Result<()> {
    for pod in pods {
        let entries = pod.proxied_at_all()?;
        ensure!(entries.len() <= calls, "{calls} calls, {} entries: {entries:#?}", entries.len());
    }
    Ok(())
}

fn from_inside(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    let own = pod.address(stack.family())?;
    for ip in [stack.loopback(), own] {
        for port in CAPTURED.into_iter().chain(ELSEWHERE) {
            is_refused(pod.netns(), stack, ip, port)?;
        }
        ends_soon(pod.netns(), stack, ip, PORT_TUNNEL)?;
    }
    is_refused(pod.netns(), stack, own, PORT_DNS)?;
    no_circles(&[&pod], 2)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

/// An address that the pod added itself: to the agent it is unknown. A proxy that dials it must not reach its own listener.
fn unknown_address(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let address = node.address(stack.family(), 0x3f01);
    let length = if address.is_ipv4() { 32 } else { 128 };
    pod.netns().ip(&format!("address add {address}/{length} dev lo"))?;
    for port in CAPTURED {
        ends_soon(pod.netns(), stack, address, port)?;
    }
    no_circles(&[&pod], 2)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

/// A connection that is not captured does not reach the proxy by dialing its ports.
fn from_an_excluded_network(context: &Context, stack: Stack) -> Result<()> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let networks = Family::ALL.map(|family| node.subnet(family)).join(",");
    node.start_agent(&[format!("--exclude-inbound-networks={networks}")])?;
    node.start_proxy()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    for port in CAPTURED {
        is_refused(other.netns(), stack, pod.address(stack.family())?, port)?;
    }
    no_circles(&[&pod], 0)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

fn from_outside(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    for client in [other.netns(), node.netns()] {
        for port in from_afar(context)? {
            ends_soon(client, stack, pod.address(stack.family())?, port)?;
        }
    }
    no_circles(&[&pod], 16)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

fn from_enrolled(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, client) = (node.enrolled("pod", families)?, node.enrolled("client", families)?);
    for port in from_afar(context)? {
        ends_soon(client.netns(), stack, pod.address(stack.family())?, port)?;
    }
    no_circles(&[&pod, &client], 8)?;
    outbound::passes_the_proxy_once(&client, &node.plain("other", Families::Dual)?, stack)
}

/// The port numbers alone mean nothing: a server outside the mesh may use them.
fn elsewhere(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    for port in PORTS.into_iter().chain([PORT_DNS]) {
        let _listening = Server::start(server.netns(), stack, port, "elsewhere")?;
        let to: SocketAddr = server.endpoint(stack.family(), port)?;
        let mut connection = client.connect(stack, to).with_context(|| format!("port {port}"))?;
        connection.exchange("hello")?;
        ensure!(!connection.is_direct(), "{:?}", connection.heard);
        client.proxied_times(redirect_tests::Direction::Outbound, to, 1)?;
    }
    Ok(())
}
