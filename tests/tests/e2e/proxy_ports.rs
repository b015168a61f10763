//! Calls to the proxy's own ports: nothing runs in circles, nobody waits for ever.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_tests::connection::dial;
use redirect_tests::{Families, Netns, Pod, Server, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "proxy_ports::from_inside", from_inside);
    trials.extend(for_every_kind(context, "proxy_ports::from_outside", from_outside));
    trials.extend(for_every_kind(context, "proxy_ports::from_another_enrolled_pod", from_enrolled));
    trials.extend(for_every_stack(context, "proxy_ports::of_a_server_elsewhere", elsewhere));
    trials
}

const PORTS: [u16; 3] = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL];

/// The call ends soon, without a word from anybody.
fn ends_soon(client: &Netns, stack: Stack, ip: IpAddr, port: u16) -> Result<()> {
    const SOON: Duration = Duration::from_secs(2);
    let start = Instant::now();
    let outcome = client.run(|| -> std::io::Result<usize> {
        dial(stack, (ip, port).into(), Duration::from_secs(5))?.read(&mut [0; 16])
    })?;
    let elapsed = start.elapsed();
    ensure!(elapsed < SOON, "{stack} to {ip} port {port}: {outcome:?} only after {elapsed:?}");
    ensure!(!matches!(outcome, Ok(1..)), "{stack} to {ip} port {port}: someone spoke: {outcome:?}");
    Ok(())
}

/// One call makes a few entries at most: one here, and one at the other end.
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
    let mut calls = 0;
    for ip in [stack.loopback(), pod.address(stack.family())?] {
        for port in PORTS {
            ends_soon(pod.netns(), stack, ip, port)?;
            calls += 1;
        }
    }
    no_circles(&[&pod], calls)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

fn from_outside(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    for client in [other.netns(), node.netns()] {
        for port in PORTS.into_iter().chain([PORT_DNS]) {
            ends_soon(client, stack, pod.address(stack.family())?, port)?;
        }
    }
    no_circles(&[&pod], 8)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

fn from_enrolled(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, client) = (node.enrolled("pod", families)?, node.enrolled("client", families)?);
    for port in PORTS.into_iter().chain([PORT_DNS]) {
        ends_soon(client.netns(), stack, pod.address(stack.family())?, port)?;
    }
    no_circles(&[&pod, &client], 4)?;
    outbound::passes_the_proxy_once(&client, &node.plain("other", Families::Dual)?, stack)
}

/// The numbers alone mean nothing: a server that is not in the mesh may have them.
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
