//! Traffic that is neither TCP nor DNS is left alone.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Families, Netns, Node, Pod};
use socket2::{Domain, Protocol, Socket, Type};

use crate::context::{Context, trial};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    Family::ALL
        .into_iter()
        .map(|family| {
            let name = format!("others::are_untouched::{}", family.name().to_lowercase());
            trial(context, name, move |context| untouched(context, family))
        })
        .collect()
}

fn untouched(context: &Context, family: Family) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (one, two) = (node.enrolled("one", Families::Dual)?, node.enrolled("two", Families::Dual)?);
    for round in 0..2 {
        ping(one.netns(), two.address(family)?).with_context(|| format!("pod to pod, round {round}"))?;
        ping(one.netns(), node.gateway(family)).with_context(|| format!("pod to node, round {round}"))?;
        ping(node.netns(), one.address(family)?).with_context(|| format!("node to pod, round {round}"))?;
        // One datagram fits a packet, the other comes in fragments.
        for length in [100, 8000] {
            datagram(&one, &two, family, length).with_context(|| format!("{length} bytes, round {round}"))?;
        }
        // The second time, the neighbors have to be resolved again.
        for netns in [node.netns(), one.netns(), two.netns()] {
            netns.ip("neighbour flush all")?;
        }
    }
    let counters = node.status()?.counters;
    ensure!(counters.is_empty(), "{counters:#?}");
    ensure!(node.access_log().entries()?.is_empty() && node.access_log().questions()?.is_empty());
    Ok(())
}

/// An echo request, and its answer with the same content.
fn ping(from: &Netns, to: IpAddr) -> Result<()> {
    const CONTENT: &[u8] = b"is anybody there";
    let (domain, protocol, request, reply) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let socket = from.run(|| Socket::new(domain, Type::RAW, Some(protocol)))??;
    socket.set_read_timeout(Some(wait::patient(SOON)))?;
    let mut message = vec![request, 0, 0, 0, 0x12, 0x34, 0, 1];
    message.extend(CONTENT);
    if to.is_ipv4() {
        let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum: u32 = words.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send_to(&message, &SocketAddr::new(to, 0).into())?;
    let socket = UdpSocket::from(socket);
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).context("no answer")?;
        // IPv4 comes with its header.
        let answer = &buffer[if to.is_ipv4() { 20 } else { 0 }..length];
        if answer[0] == reply && answer.ends_with(CONTENT) {
            ensure!(from.ip() == to, "{to} was asked, {from} answered");
            return Ok(());
        }
    }
}

fn datagram(from: &Pod, to: &Pod, family: Family, length: usize) -> Result<()> {
    let socket = |pod: &Pod| -> Result<UdpSocket> {
        let address = SocketAddr::new(pod.address(family)?, 0);
        let socket = pod.netns().run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(wait::patient(SOON)))?;
        Ok(socket)
    };
    let (near, far) = (socket(from)?, socket(to)?);
    let content: Vec<u8> = (0..length).map(|number| number as u8).collect();
    let mut buffer = vec![0; 10_000];
    for (sender, receiver) in [(&near, &far), (&far, &near)] {
        sender.send_to(&content, receiver.local_addr()?)?;
        let (received, source) = receiver.recv_from(&mut buffer).context("nothing came")?;
        ensure!(source == sender.local_addr()?, "it came from {source}");
        ensure!(buffer[..received] == content, "it came changed");
    }
    Ok(())
}
