//! Pods that send from addresses that are not their own.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Cluster, Connection, Direction as Way, Families, Node, Pod, Stack};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_stack, trial};
use crate::reports::counted;
use crate::{inbound, outbound, raw};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Family) -> Result<()>;
    let tests: [(&str, Test); 3] = [
        ("are_dropped", |context, family| by_setting(context, family, true)),
        ("are_let_through_on_request", |context, family| by_setting(context, family, false)),
        ("of_one_pod_are_dropped_on_request", verified_by_annotation),
    ];
    let of_families = tests.into_iter().flat_map(|(word, test)| {
        Family::ALL.into_iter().map(move |family| {
            let name = format!("spoofed_sources::{word}::{}", family.name().to_lowercase());
            trial(context, name, move |context| test(context, family))
        })
    });
    let name = "spoofed_sources::of_one_pod_are_let_through_on_request";
    of_families.chain(for_every_stack(context, name, let_through_by_annotation)).collect()
}

const ANNOTATION: &str = "ambient-redirect.io/source-ip-verification";

/// An address that no pod has.
fn elsewhere(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => [198, 51, 100, 7].into(),
        Family::Ipv6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, 7].into(),
    }
}

/// Sends a SYN from the pod with any source. The port identifies it.
fn send(pod: &Pod, source: IpAddr, port: u16, to: SocketAddr) -> Result<()> {
    let syn = raw::syn(source, port, to, 1);
    pod.netns().run(|| -> Result<()> {
        raw::socket(to.ip())?.send_to(&syn, &SocketAddr::new(to.ip(), 0).into())?;
        Ok(())
    })?
}

/// Checks the results of the pods' outbound connections: the numbers captured, and dropped as spoofed.
fn becomes(node: &Node, family: Family, captured: u64, dropped: u64) -> Result<()> {
    let count = |family, verdict, reason| -> Result<u64> {
        Ok(counted(&node.status()?, family, Direction::Outbound, verdict, reason))
    };
    let both = |family| -> Result<(u64, u64)> {
        Ok((
            count(family, Verdict::Captured, Reason::Enrolled)?,
            count(family, Verdict::Dropped, Reason::Spoofed)?,
        ))
    };
    wait::until_true("count of the packets", SOON, || Ok(both(family)? == (captured, dropped)))
        .with_context(|| format!("not {captured} captured and {dropped} dropped: {:?}", both(family)))?;
    for other in Family::ALL.into_iter().filter(|other| *other != family) {
        ensure!(both(other)? == (0, 0), "{other}: {:#?}", node.status()?.counters);
    }
    Ok(())
}

/// Whatever the setting: no pod can use another pod's address.
fn by_setting(context: &Context, family: Family, verified: bool) -> Result<()> {
    let setting = format!("--source-ip-verification={verified}");
    let node = Node::with_arguments(&context.session()?, &[&setting])?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let neighbour = node.enrolled("neighbour", Families::Dual)?;
    let to = other.endpoint(family, 7)?;
    send(&pod, elsewhere(family), 1024, to)?;
    send(&pod, neighbour.address(family)?, 1025, to)?;
    let (captured, dropped) = if verified { (0, 2) } else { (1, 1) };
    becomes(&node, family, captured, dropped)?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    Ok(())
}

/// Two pods, of which the first has the annotation, and a pod that is not enrolled.
fn annotated(cluster: &Cluster, value: &str) -> Result<[Pod; 3]> {
    let [one, two, other] = ["one", "two", "other"].map(|name| cluster.node().plain(name, Families::Dual));
    let pods = [one?, two?, other?];
    for (pod, annotations) in pods.iter().zip([&[(ANNOTATION, value)][..], &[]]) {
        cluster.announce(pod, annotations);
        pod.enroll()?;
    }
    Ok(pods)
}

fn verified_by_annotation(context: &Context, family: Family) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &["--source-ip-verification=false"])?;
    let [verified, free, other] = annotated(&cluster, "true")?;
    let to = other.endpoint(family, 7)?;
    send(&verified, elsewhere(family), 1024, to)?;
    becomes(cluster.node(), family, 0, 1)?;
    send(&free, elsewhere(family), 1025, to)?;
    becomes(cluster.node(), family, 1, 1)
}

/// Connects from an address that the pod has, but neither a plugin nor Kubernetes names.
fn call(
    pod: &Pod,
    stack: Stack,
    own: IpAddr,
    to: SocketAddr,
    limit: Duration,
) -> Result<std::io::Result<Socket>> {
    pod.netns().run(|| {
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        socket.bind(&stack.spell(SocketAddr::new(own, 0)).into())?;
        socket.connect_timeout(&stack.spell(to).into(), limit)?;
        socket.set_read_timeout(Some(wait::patient(SOON)))?;
        Ok(socket)
    })
}

/// A pod connects from such an address through the proxy; the pod next to it may not.
fn let_through_by_annotation(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let (node, family) = (cluster.node(), stack.family());
    let [free, bound, other] = annotated(&cluster, "false")?;
    let listening = other.listen(stack)?;
    let to = other.endpoint(family, listening.port())?;
    let dropped = || -> Result<u64> {
        Ok(counted(&node.status()?, family, Direction::Outbound, Verdict::Dropped, Reason::Spoofed))
    };
    let own = elsewhere(family);
    // Without `nodad` it is tentative for a moment, even on `lo`.
    let rest = if family == Family::Ipv4 { "/32 dev lo" } else { "/128 dev lo nodad" };
    for pod in [&free, &bound] {
        pod.netns().ip(&format!("address add {own}{rest}"))?;
    }
    node.netns().ip(&format!("route add {own} via {}", free.address(family)?))?;

    let socket = call(&free, stack, own, to, wait::patient(SOON))??;
    let mut connection = Connection::greeted(socket.into())?;
    connection.exchange("hello")?;
    let source = canonical(connection.local_name);
    ensure!(source.ip() == own && connection.heard.peer.ip() == own, "{source}: {:?}", connection.heard);
    ensure!(!connection.is_direct(), "past the proxy: {:?}", connection.heard);
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let log = node.access_log();
    let entries = log.connections(&format!("{source} to {to}"), |entry| entry.source == source)?;
    ensure!(entries.len() == 1 && entries[0].direction == Way::Outbound, "{entries:#?}");
    ensure!(dropped()? == 0, "{:#?}", node.status()?.counters);

    let failed = call(&bound, stack, own, to, wait::patient(Duration::from_millis(300)))?;
    ensure!(failed.is_err() && listening.accepted().len() == 1, "{:?}", listening.accepted());
    ensure!(dropped()? > 0, "{:#?}", node.status()?.counters);

    // Another pod's address is not permitted, and the pods' own addresses work as before.
    let before = dropped()?;
    send(&free, bound.address(family)?, 1024, to)?;
    wait::until_true("count of the other pod's address", SOON, || Ok(dropped()? > before))?;
    for pod in [&free, &bound] {
        outbound::passes_the_proxy_once(pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }

    // Removing the annotation ends the permission.
    cluster.announce(&free, &[]);
    let before = dropped()?;
    wait::until_true("drop without the annotation", SOON, || {
        send(&free, own, 1025, to)?;
        Ok(dropped()? > before)
    })
}
