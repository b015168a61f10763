//! Pods without a bridge: the node has a device and a route for each, as with Calico. The reverse path filter is strict on
//! every device, and the nodes have a routed link.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_tests::{Connection, Direction, Families, Node, NodeOptions, Pod, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::probes::{routed, start_routed};
use crate::{inbound, outbound};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "routed::one_node", one_node);
    trials.extend(for_every_stack(context, "routed::two_nodes", two_nodes));
    trials.extend(for_every_stack(context, "routed::bulk", bulk));
    trials
}

fn strict_node(context: &Context) -> Result<Arc<Node>> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    for scope in ["all", "default"] {
        node.netns().set_sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "1")?;
    }
    node.start_agent(&[])?;
    node.start_proxy()?;
    Ok(node)
}

fn plain(node: &Arc<Node>, families: Families) -> Result<Pod> {
    start_routed(node, node.numbered("plain", families).not_enrolled())
}

fn one_node(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = strict_node(context)?;
    let (client, server) = (routed(&node, families)?, routed(&node, families)?);
    inbound::passes_both_proxies_once(&client, &server, stack)?;
    let (client, plain) = (routed(&node, families)?, plain(&node, families)?);
    outbound::passes_the_proxy_once(&client, &plain, stack)?;
    inbound::passes_the_proxy_once(plain.netns(), &client, stack)?;
    inbound::passes_the_proxy_once(node.netns(), &client, stack)
}

fn two_nodes(context: &Context, stack: Stack) -> Result<()> {
    let families = Families::Dual;
    let (near, far) = (strict_node(context)?, strict_node(context)?);
    near.attach_node(&far)?;
    inbound::passes_both_proxies_once(&routed(&near, families)?, &routed(&far, families)?, stack)?;
    inbound::passes_both_proxies_once(&routed(&far, families)?, &near.enrolled("bridged", families)?, stack)?;
    let (pod, plain) = (routed(&near, families)?, plain(&far, families)?);
    outbound::passes_the_proxy_once(&pod, &plain, stack)?;
    inbound::passes_the_proxy_once(plain.netns(), &pod, stack)
}

/// The amount of data in each direction, in MiB.
const BULK: &str = "REDIRECT_TEST_BULK";

/// This many bytes in each direction at the same time, through both nodes' proxies, arrive unchanged.
fn bulk(context: &Context, stack: Stack) -> Result<()> {
    let mebibytes = std::env::var(BULK).map_or(Ok(32), |value| value.parse()).context(BULK)?;
    let (near, far) = (strict_node(context)?, strict_node(context)?);
    near.attach_node(&far)?;
    let (client, server) = (routed(&near, Families::Dual)?, routed(&far, Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let start = Instant::now();
    let connection = client.connect(stack, to)?;
    echoed(&connection, mebibytes)?;
    ensure!(connection.finish()? == mebibytes << 20);
    println!("{stack}: {mebibytes} MiB each way in {:?}", start.elapsed());
    ensure!(client.proxied(Direction::Outbound, to)?.len() == 1);
    ensure!(server.proxied(Direction::Inbound, to)?.len() == 1);
    Ok(())
}

fn echoed(connection: &Connection, mebibytes: u64) -> Result<()> {
    let mut receiver = connection.stream();
    let mut sender = receiver.try_clone()?;
    thread::scope(|scope| {
        let sent = scope.spawn(move || -> std::io::Result<()> {
            let mut noise = Noise::default();
            (0..mebibytes).try_for_each(|_| sender.write_all(&noise.mebibyte()))
        });
        let mut noise = Noise::default();
        let mut buffer = vec![0; 1 << 20];
        for number in 0..mebibytes {
            receiver.read_exact(&mut buffer).with_context(|| format!("after {number} MiB"))?;
            ensure!(buffer == noise.mebibyte(), "MiB number {number} came back changed");
        }
        sent.join().map_err(|_| anyhow!("the sender panicked"))?.context("send")
    })
}

/// Bytes without a period, so that lost, swapped or repeated blocks show (xorshift).
struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }
}

impl Noise {
    fn mebibyte(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(1 << 20);
        while bytes.len() < 1 << 20 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend(self.0.to_ne_bytes());
        }
        bytes
    }
}
