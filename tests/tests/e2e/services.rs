//! Services: address translation in the node's namespace, as kube-proxy sets it up, behind the proxy. The agent does not
//! know about them; an enrolled client reaches them in its chosen family, and through the proxy.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::stack::canonical;
use redirect_tests::wait;
use redirect_tests::{Direction, Families, Netns, Node, Pod, PodSpec, Server};

use crate::context::{Context, trial};
use crate::outbound;

/// A Service, and the pod behind it.
#[derive(Clone, Copy)]
struct Service {
    policy: &'static str,
    /// The families that it has cluster IPs of.
    families: Families,
    namespace: &'static str,
    /// The families that the pod has addresses of.
    pod: Families,
    greeting: &'static str,
}

const SERVICES: [Service; 6] = [
    Service {
        policy: "require_dual_stack",
        families: Families::Dual,
        namespace: "dual-stack",
        pod: Families::Dual,
        greeting: "hello dualstack",
    },
    Service {
        policy: "single_stack",
        families: Families::V4Only,
        namespace: "ipv4",
        pod: Families::V4Only,
        greeting: "hello ipv4",
    },
    Service {
        policy: "single_stack",
        families: Families::V6Only,
        namespace: "ipv6",
        pod: Families::V6Only,
        greeting: "hello ipv6",
    },
    Service {
        policy: "single_stack",
        families: Families::V6Only,
        namespace: "dual-stack",
        pod: Families::Dual,
        greeting: "hello dualstack",
    },
    // On a dual-stack cluster these have both cluster IPs, even if their pods have one family.
    Service {
        policy: "prefer_dual_stack",
        families: Families::Dual,
        namespace: "ipv4",
        pod: Families::V4Only,
        greeting: "hello ipv4",
    },
    Service {
        policy: "prefer_dual_stack",
        families: Families::Dual,
        namespace: "ipv6",
        pod: Families::V6Only,
        greeting: "hello ipv6",
    },
];

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let each = |service: Service| {
        let name =
            format!("services::{}::{}::{}", service.policy, service.namespace, service.families.label());
        trial(context, name, move |context| reach(context, service))
    };
    SERVICES.into_iter().map(each).collect()
}

const PORT: u16 = 80;
const TARGET: u16 = 9000;

fn cluster_ip(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => [172, 30, 0, 7].into(),
        Family::Ipv6 => [0xfd96, 0, 0, 0, 0, 0, 0, 7].into(),
    }
}

/// The rules that kube-proxy would write for a Service with this pod; a family without an endpoint is
/// refused.
fn translate(node: &Node, outside: &Netns, service: Service, pod: &Pod) -> Result<()> {
    let (mut translated, mut refused) = (String::new(), String::new());
    for family in service.families.iter() {
        let (word, ip) = (if family == Family::Ipv4 { "ip" } else { "ip6" }, cluster_ip(family));
        if service.pod.has(family) {
            let to = pod.endpoint(family, TARGET)?;
            translated += &format!("{word} daddr {ip} tcp dport {PORT} dnat {word} to {to}\n");
        } else {
            refused += &format!("{word} daddr {ip} tcp dport {PORT} reject\n");
        }
    }
    let rules = format!(
        "table inet services {{\n\
         chain translate {{ type nat hook prerouting priority dstnat;\n{translated}}}\n\
         chain translate_own {{ type nat hook output priority -100;\n{translated}}}\n\
         chain refuse {{ type filter hook forward priority filter;\n{refused}}}\n\
         chain refuse_own {{ type filter hook output priority filter;\n{refused}}}\n}}\n"
    );
    // A refused packet has to be forwarded first, as it is on the default route of a real node.
    node.attach(outside, "uplink")?;
    for (family, network) in [(Family::Ipv4, "172.30.0.0/16"), (Family::Ipv6, "fd96::/64")] {
        node.netns().ip(&format!("route add {network} via {}", node.attached(family)))?;
    }
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"]);
    node.netns().output(nft, rules.as_bytes()).map(drop)
}

fn reach(context: &Context, service: Service) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let client = Pod::start(&node, PodSpec::new("sleep", Families::Dual))?;
    // Not on the client's bridge: the answers have to return through the node.
    let spec = PodSpec::new("tcp-echo", service.pod).in_namespace(service.namespace).routed();
    let pod = Pod::start(&node, spec)?;
    let outside = Netns::new("outside")?;
    translate(&node, &outside, service, &pod)?;

    for stack in service.families.stacks() {
        let family = stack.family();
        let to = SocketAddr::new(cluster_ip(family), PORT);
        if !service.pod.has(family) {
            let start = Instant::now();
            let error = client.connect(stack, to).err().context("a family without endpoints answered")?;
            ensure!(outbound::is_refusal(&client, &error), "{error:#}");
            ensure!(
                start.elapsed() < wait::patient(Duration::from_secs(2)),
                "only after {:?}",
                start.elapsed()
            );
            continue;
        }
        let server = Server::start(pod.netns(), stack, TARGET, service.greeting)?;
        let mut connection = client.connect(stack, to)?;
        connection.exchange("hello")?;
        let heard = &connection.heard;
        ensure!(heard.greeting == service.greeting, "{heard:?}");
        ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
        let source = canonical(connection.local_name);
        ensure!(source.ip() == client.address(family)?, "the client's own address is {source}");
        ensure!(heard.peer.ip() == source.ip(), "the application saw {}", heard.peer);
        ensure!(heard.local == pod.endpoint(family, TARGET)?, "the application is at {}", heard.local);

        let log = node.access_log();
        let entries = log.connections(&format!("{source} to {to}"), |entry| entry.source == source)?;
        let [outbound] = &entries[..] else { bail!("not one entry but {entries:#?}") };
        ensure!(outbound.direction == Direction::Outbound && outbound.is_of(family), "{outbound:#?}");
        ensure!(outbound.original_destination == to, "{outbound:#?}");
        let inbound = pod.proxied(Direction::Inbound, pod.endpoint(family, TARGET)?)?;
        ensure!(inbound.iter().all(|entry| entry.is_of(family)), "{inbound:#?}");
        ensure!(server.accepted().len() == 1);
    }
    Ok(())
}
