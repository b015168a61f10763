//! Connections through the mesh's tunnel (HBONE: mutual TLS between two proxies): both families, both directions, and the
//! application sees the true client.

use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::proxy::Tunnelled;
use redirect_tests::stack::canonical;
use redirect_tests::{Direction, Families, Node, NodeOptions, Pod, PodSpec, ProxyKind, ProxyOptions, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::outbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "tunnel::on_one_node", |context, families, stack| {
        Scene::new(context, families, false)?.passes(stack)
    });
    trials.extend(for_every_kind(context, "tunnel::between_nodes", |context, families, stack| {
        Scene::new(context, families, true)?.passes(stack)
    }));
    trials.extend(for_every_stack(context, "tunnel::closed_port", |context, stack| {
        let scene = Scene::new(context, Families::Dual, true)?;
        // So that the nodes have resolved each other.
        scene.passes(stack)?;
        outbound::is_refused_soon(&scene.client, &scene.server, stack)
    }));
    trials.extend(for_every_stack(context, "tunnel::beside_plain_connections", beside_plain));
    trials
}

/// Two enrolled pods whose proxies know each other's pods.
struct Scene {
    client: Pod,
    server: Pod,
}

impl Scene {
    fn new(context: &Context, families: Families, two_nodes: bool) -> Result<Self> {
        context.needs(ProxyKind::Ztunnel, "the embedded one passes connections through as they are")?;
        let session = context.session()?;
        let options = NodeOptions { proxy: false, ..NodeOptions::default() };
        let near = Node::with(&session, options.clone())?;
        let far = if two_nodes { Node::with(&session, options)? } else { near.clone() };
        if two_nodes {
            near.attach_node(&far)?;
        }
        let spec = |node: &Node, name: &str, number: u16| {
            let addresses: Vec<_> =
                node.to_choose(number).into_iter().filter(|ip| has(families, ip)).collect();
            PodSpec::new(name, families).with_addresses(&addresses)
        };
        let specs = [spec(&near, "client", 1), spec(&far, "server", 2)];
        let tunnelled = specs
            .iter()
            .map(|spec| Tunnelled { name: spec.name.clone(), addresses: spec.addresses.clone() })
            .collect();
        let proxy = ProxyOptions { tunnelled, ..ProxyOptions::default() };
        near.start_proxy_with(&proxy)?;
        if two_nodes {
            far.start_proxy_with(&proxy)?;
        }
        let [client, server] = specs;
        Ok(Self { client: Pod::start(&near, client)?, server: Pod::start(&far, server)? })
    }

    /// A connection, and a megabyte each way.
    fn passes(&self, stack: Stack) -> Result<()> {
        let listening = self.server.listen(stack)?;
        let to = self.server.endpoint(stack.family(), listening.port())?;
        let mut connection = self.client.connect(stack, to)?;
        ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
        let source = canonical(connection.local_name);
        ensure!(source.ip() == self.client.address(stack.family())?, "the client's own address is {source}");

        for (pod, direction) in [(&self.client, Direction::Outbound), (&self.server, Direction::Inbound)] {
            let entries = pod.proxied(direction, to)?;
            let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
            ensure!(entry.tunnelled, "in plaintext: {entry:#?}");
            ensure!(entry.is_of(stack.family()) && entry.source.ip() == source.ip(), "{source}: {entry:#?}");
        }
        ensure!(self.client.proxied_at_all()?.len() == 1 && self.server.proxied_at_all()?.len() == 1);
        let heard = connection.heard.clone();
        ensure!(heard.peer.ip() == source.ip(), "the application saw {}", heard.peer);
        ensure!(heard.local == to, "the application is at {}", heard.local);
        ensure!(listening.accepted() == [heard]);

        let data = vec![7; 1 << 20];
        ensure!(connection.transfer(&data)? == data, "the data came back changed");
        ensure!(connection.finish()? == data.len() as u64);
        Ok(())
    }
}

fn has(families: Families, ip: &IpAddr) -> bool {
    families.has(if ip.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 })
}

/// A pod that uses the tunnel with one of the mesh connects in plaintext to others.
fn beside_plain(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(context, Families::Dual, false)?;
    let plain = scene.client.node().plain("plain", Families::Dual)?;
    outbound::passes_the_proxy_once(&scene.client, &plain, stack)?;
    crate::inbound::passes_the_proxy_once(plain.netns(), &scene.server, stack)?;
    let entries = scene.client.node().access_log().entries()?;
    ensure!(entries.iter().all(|entry| !entry.tunnelled), "{entries:#?}");
    let listening = scene.server.listen(stack)?;
    let to = scene.server.endpoint(stack.family(), listening.port())?;
    scene.client.connect(stack, to)?.exchange("hello").context("through the tunnel")?;
    ensure!(scene.client.proxied(Direction::Outbound, to)?.iter().all(|entry| entry.tunnelled));
    Ok(())
}
