//! Network namespaces inside a pod: containers in a pod, sandboxes, VPNs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::connection::dial;
use redirect_tests::stack::canonical;
use redirect_tests::{Connection, Direction, Netns, Pod, Stack};

use super::{LONG_ENOUGH, Scene};
use crate::context::{Context, for_every_stack_in_pods};

/// The difference in placement `node`.
const ELSEWHERE: &str =
    "what the pod forwards is dropped as spoofed, or captured with the address of the pod";

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 4] = [
        ("nested_namespace_routed", |context, stack| nested(context, stack, Joint::Routed)),
        ("nested_namespace_masqueraded", |context, stack| nested(context, stack, Joint::Masqueraded)),
        ("nested_namespace_on_the_pods_device", on_the_pods_device),
        ("nested_namespace_to_the_pod", to_the_pod),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| {
            for_every_stack_in_pods(context, &format!("odd_sockets::{name}"), ELSEWHERE, test)
        })
        .collect()
}

/// How the pod forwards the nested namespace's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joint {
    /// With their own addresses.
    Routed,
    /// With the pod's.
    Masqueraded,
}

pub(crate) fn address(family: Family, host: u8) -> IpAddr {
    match family {
        Family::Ipv4 => Ipv4Addr::new(192, 168, 77, host).into(),
        Family::Ipv6 => Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host.into()).into(),
    }
}

/// A namespace behind the pod, whose packets the pod forwards.
pub(crate) fn behind(pod: &Pod, joint: Joint) -> Result<Netns> {
    let (outer, nested) = (pod.netns(), Netns::new("nested")?);
    let peer = nested.path();
    outer.ip(&format!("link add inner type veth peer name eth0 netns {}", peer.display()))?;
    for (netns, device, host) in [(outer, "inner", 1), (&nested, "eth0", 2)] {
        netns.ip_batch(&[
            format!("address add {}/24 dev {device}", address(Family::Ipv4, host)),
            format!("address add {}/64 dev {device} nodad", address(Family::Ipv6, host)),
            format!("link set {device} up"),
        ])?;
    }
    nested.ip_batch(&[
        format!("route add default via {}", address(Family::Ipv4, 1)),
        format!("route add default via {}", address(Family::Ipv6, 1)),
    ])?;
    outer.set_sysctl("net.ipv4.ip_forward", "1")?;
    outer.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
    if joint == Joint::Masqueraded {
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        let rules = "table inet nested {\n chain out {\n type nat hook postrouting priority 100\n oifname eth0 masquerade\n }\n}\n";
        outer.output(nft, rules.as_bytes())?;
    }
    Ok(nested)
}

/// The nested namespace is not declared. Its connections are not the pod's, but must not be forwarded past the proxy
/// either: they are dropped at ingress, and counted. Istio: its inbound rule catches them by mistake, and ztunnel refuses
/// connections to addresses that are not the pod's.
fn nested(context: &Context, stack: Stack, joint: Joint) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let nested = behind(&scene.client, joint)?;
    let outcome = nested.run(|| dial(stack, scene.to, LONG_ENOUGH))?;
    ensure!(outcome.is_err(), "the connection was made");
    ensure!(scene.listening.accepted().is_empty(), "the server accepted {:?}", scene.listening.accepted());
    let forwarded = scene.dropped(Way::Inbound, Reason::Forwarded)?;
    let unmarked = scene.dropped(Way::Outbound, Reason::Unmarked)?;
    ensure!(forwarded + unmarked > 0, "nothing was counted");
    Ok(())
}

/// A macvlan device sends through the pod's device without the pod's stack. Its packets pass the same egress guard.
/// Answers to its own Ethernet address never involve the pod. Istio: no rule of the pod sees such packets, so they reach
/// the destination past the proxy.
fn on_the_pods_device(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::alone(context, stack)?;
    let nested = Netns::new("nested")?;
    let made = scene.client.netns().ip("link add link eth0 name macvlan0 type macvlan mode bridge");
    if let Err(error) = made {
        println!("skipped: on_the_pods_device::{}: no macvlan here: {error:#}", stack.label());
        return Ok(());
    }
    scene.client.netns().ip(&format!("link set macvlan0 netns {}", nested.path().display()))?;
    let own = scene.client.node().address(stack.family(), 0x3e00);
    let length = if own.is_ipv4() { "16" } else { "64" };
    nested.ip_batch(&[
        format!("address add {own}/{length} dev macvlan0 {}", if own.is_ipv6() { "nodad" } else { "" }),
        "link set macvlan0 up".to_owned(),
    ])?;
    let outcome = nested.run(|| dial(stack, scene.to, LONG_ENOUGH))?;
    ensure!(outcome.is_err(), "the connection was made");
    scene.was_held(Way::Outbound, Reason::Unmarked)
}

/// To the pod itself the nested namespace is a client like any other. Istio: the same.
fn to_the_pod(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::on_shared(context, stack)?;
    let nested = behind(&scene.client, Joint::Routed)?;
    let listening = scene.client.listen(stack)?;
    let to = SocketAddr::new(scene.client.address(stack.family())?, listening.port());
    redirect_tests::wait::until_true("program on the new device", redirect_tests::wait::SOON, || {
        let report = scene.client.node().report(&scene.client)?;
        Ok(report.is_some_and(|report| report.interfaces.iter().any(|name| name == "inner")))
    })?;
    let mut connection = Connection::open(&nested, stack, to)?;
    connection.exchange("hello")?;
    let entries = scene.client.proxied(Direction::Inbound, to)?;
    let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(entry.source == canonical(connection.local_name), "{entry:#?}");
    ensure!(connection.heard.peer.ip() == address(stack.family(), 2), "{:?}", connection.heard);
    Ok(())
}
