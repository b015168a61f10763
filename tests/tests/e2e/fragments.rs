//! A TCP header that is split over IP fragments may hide whether it opens a connection.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::{Direction, Families, Netns, Node, Stack};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::{dropped, segments_received};
use crate::{inbound, raw};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "fragments::syn_is_held", syn_is_held);
    trials.extend(for_every_stack(context, "fragments::syn_reaches_a_plain_pod", syn_reaches_a_plain_pod));
    trials
}

/// Behind the ports and the sequence number, behind the flags, and behind everything but some options.
const CUTS: [usize; 3] = [8, 16, 24];

/// How long to wait for a segment that must not arrive.
const A_MOMENT: Duration = Duration::from_millis(300);

fn syn_is_held(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let outside = Netns::new("outside")?;
    node.attach(&outside, "outside")?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    // Resolves the neighbors first, so that no fragment is lost for another reason.
    inbound::passes_the_proxy_once(&outside, &pod, stack)?;

    let before = segments_at_rest(pod.netns())?;
    for (identification, cut) in (1..).zip(CUTS) {
        for fragment in raw::fragmented_syn(node.attached(stack.family()), 40_000, to, identification, cut) {
            outside.run(|| raw::send_marked(&fragment, to.ip(), 0))??;
        }
    }
    thread::sleep(A_MOMENT);
    ensure!(listening.accepted().is_empty(), "the application accepted {:?}", listening.accepted());
    ensure!(pod.proxied_so_far(Direction::Inbound, to)?.is_empty(), "{:?}", pod.proxied_at_all()?);
    let segments = segments_received(pod.netns())? - before;
    ensure!(segments == 0, "{segments} segments came to the pod");
    let dropped = dropped(&node, stack, Way::Inbound, Reason::Fragmented)?;
    ensure!(dropped == CUTS.len() as u64, "{dropped} were dropped");
    inbound::passes_the_proxy_once(&outside, &pod, stack)
}

/// The segments that a namespace has received, once no closing connection adds to them.
fn segments_at_rest(netns: &Netns) -> Result<u64> {
    let mut before = segments_received(netns)?;
    loop {
        thread::sleep(A_MOMENT);
        let now = segments_received(netns)?;
        if now == before {
            return Ok(now);
        }
        before = now;
    }
}

/// Control: the kernel reassembles these fragments.
fn syn_reaches_a_plain_pod(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    drop(other.connect(stack, to)?);
    // The kernel itself refuses a first IPv6 fragment without the whole TCP header.
    let whole = |cut: &usize| stack.family() == Family::Ipv4 || *cut >= 20;
    for (identification, cut) in (1..).zip(CUTS.into_iter().filter(whole)) {
        let opened = pod.netns().statistic("snmp", "Tcp", "InSegs")?;
        let source = other.address(stack.family())?;
        for fragment in raw::fragmented_syn(source, 40_000 + identification, to, identification, cut) {
            other.netns().run(|| raw::send_marked(&fragment, to.ip(), 0))??;
        }
        redirect_tests::wait::until_true("segment", redirect_tests::wait::SOON, || {
            Ok(pod.netns().statistic("snmp", "Tcp", "InSegs")? > opened)
        })?;
    }
    ensure!(pod.netns().statistic("snmp", "Tcp", "InCsumErrors")? == 0, "a bad checksum");
    Ok(())
}
