//! Pods that get another interface while they are enrolled, as from Multus. Neither a plugin nor Kubernetes names its
//! addresses.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::constants::ROUTE_TABLE;
use redirect_tests::connection::dial;
use redirect_tests::stack::canonical;
use redirect_tests::{Connection, Direction, Families, Netns, Node, Pod, Server, Stack, wait};
use serde_json::Value;

use crate::context::{Context, for_every_stack};
use crate::{inbound, time_wait};

/// Why placement `node` has no such test.
pub(crate) const REASON: &str = "a pod that gets another way out is refused";

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 6] = [
        ("inbound", |context, stack| inbound(&context.node()?, stack)),
        ("outbound", outbound),
        ("time_wait_inbound", |context, stack| in_time_wait(&context.node()?, stack, Direction::Inbound)),
        ("time_wait_outbound", |context, stack| in_time_wait(&context.node()?, stack, Direction::Outbound)),
        ("time_wait_noted_when_they_listen", noted_when_they_listen),
        ("refused_without_proxy", refused),
    ];
    let trials = tests.map(|(name, test)| for_every_stack(context, &format!("second_network::{name}"), test));
    trials.into_iter().flatten().collect()
}

/// The pod, and the other end of its second network.
pub(crate) struct SecondNetwork {
    pub(crate) pod: Pod,
    pub(crate) outside: Netns,
}

impl SecondNetwork {
    fn new(node: &Arc<Node>) -> Result<Self> {
        let network = Self::behind(node.enrolled("pod", Families::Dual)?)?;
        network.is_known()?;
        Ok(network)
    }

    /// Attaches a pod to it.
    pub(crate) fn behind(pod: Pod) -> Result<Self> {
        let outside = Netns::new("second-network")?;
        let link = format!("link add net1 type veth peer name net1 netns {}", outside.path().display());
        pod.netns().ip(&link)?;
        for (netns, host) in [(pod.netns(), Self::POD), (&outside, Self::OUTSIDE)] {
            netns.ip_batch(&[
                format!("address add {}/24 dev net1", Self::address(Family::Ipv4, host)),
                format!("address add {}/64 dev net1 nodad", Self::address(Family::Ipv6, host)),
                "link set net1 up".to_owned(),
            ])?;
        }
        Ok(Self { pod, outside })
    }

    /// Waits until the agent knows the pod's interface, and has mirrored its routes.
    pub(crate) fn is_known(&self) -> Result<()> {
        let on_net1 = |route: &Value| route["dev"] == "net1";
        wait::until_true("agent that knows the new interface", wait::SOON, || {
            let Some(report) = self.pod.node().report(&self.pod)? else { return Ok(false) };
            let routes = self.pod.netns().json(&format!("ip -6 -j route show table {ROUTE_TABLE}"))?;
            Ok(report.interfaces.iter().any(|name| name == "net1")
                && routes.as_array().is_some_and(|routes| routes.iter().any(on_net1)))
        })
    }

    pub(crate) const POD: u8 = 1;
    pub(crate) const OUTSIDE: u8 = 2;

    pub(crate) fn address(family: Family, host: u8) -> IpAddr {
        match family {
            Family::Ipv4 => [192, 168, 77, host].into(),
            Family::Ipv6 => [0xfd02, 0, 0, 0, 0, 0, 0, host.into()].into(),
        }
    }
}

/// Connections that arrive through it pass the proxy.
pub(crate) fn inbound(node: &Arc<Node>, stack: Stack) -> Result<()> {
    let SecondNetwork { pod, outside } = SecondNetwork::new(node)?;
    let address = SecondNetwork::address(stack.family(), SecondNetwork::POD);
    inbound::passes_at(&outside, &pod, stack, address)
}

/// And connections that leave through it.
fn outbound(context: &Context, stack: Stack) -> Result<()> {
    let SecondNetwork { pod, outside } = SecondNetwork::new(&context.node()?)?;
    let listening = Server::start(&outside, stack, 0, "outside")?;
    let address = |host| SecondNetwork::address(stack.family(), host);
    let to = SocketAddr::new(address(SecondNetwork::OUTSIDE), listening.port());
    let mut connection = Connection::open(pod.netns(), stack, to)?;
    connection.exchange("hello")?;
    let source = canonical(connection.local_name);
    let entries = pod.proxied_times(Direction::Outbound, to, 1)?;
    ensure!(entries[0].is_of(stack.family()) && entries[0].source == source, "{entries:#?}");
    // As without a mesh.
    ensure!(source.ip() == address(SecondNetwork::POD), "getsockname says {source}");
    ensure!(connection.heard.peer.ip() == source.ip(), "{:?}", connection.heard);
    ensure!(connection.heard.peer != source, "the client came itself: {source}");
    Ok(())
}

fn noted_when_they_listen(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &time_wait::BY_SOCK_OPS)?;
    time_wait::DIRECTIONS.into_iter().try_for_each(|(direction, _)| in_time_wait(&node, stack, direction))
}

fn in_time_wait(node: &Arc<Node>, stack: Stack, direction: Direction) -> Result<()> {
    let SecondNetwork { pod, outside } = SecondNetwork::new(node)?;
    let address = |host| SecondNetwork::address(stack.family(), host);
    let inside = (pod.netns(), address(SecondNetwork::POD));
    let outside = (&outside, address(SecondNetwork::OUTSIDE));
    time_wait::one_source_port(&pod, stack, direction, inside, outside)
}

/// Connections are refused while there is no proxy, if configured.
fn refused(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--without-proxy", "refuse"])?;
    let SecondNetwork { pod, outside } = SecondNetwork::new(&node)?;
    let listening = pod.listen(stack)?;
    let to = SocketAddr::new(SecondNetwork::address(stack.family(), SecondNetwork::POD), listening.port());
    Connection::open(&outside, stack, to)?.exchange("hello")?;
    pod.proxied_times(Direction::Inbound, to, 1)?;
    let accepted = listening.accepted().len();
    node.kill_proxy()?;
    let error = outside.run(|| dial(stack, to, Duration::from_secs(5)))?.err();
    let error = error.context("an answer without a proxy")?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "{error}");
    ensure!(listening.accepted().len() == accepted, "the application was reached");
    Ok(())
}
