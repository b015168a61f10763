//! The pod's own routing decides whether a family works, and with which address: captured connections have the sources that they
//! would have without a mesh, whatever the CNI plugins name.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::connection::dial;
use redirect_tests::kernel::Footprint;
use redirect_tests::stack::canonical;
use redirect_tests::{Connection, Direction, Families, Netns, Node, Pod, Server, Stack, wait};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::second_network::SecondNetwork;
use crate::{inbound, inspect, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 9] = [
        ("egress_interface", |context, stack| egress_interface(context, stack, Order::InterfaceFirst)),
        ("egress_interface_later", |context, stack| egress_interface(context, stack, Order::EnrollmentFirst)),
        ("sources_of_routes", sources_of_routes),
        ("sources_of_addresses", sources_of_addresses),
        ("sources_of_devices", sources_of_devices),
        ("routes_of_another_table", routes_of_another_table),
        ("refused_without_a_route", refused_without_a_route),
        ("contested_address", contested_address),
        ("a_thousand_routes", a_thousand_routes),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| for_every_stack(context, &format!("routing::{name}"), test))
        .collect()
}

/// What `ip` takes to mean a family.
const fn flag(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "-4",
        Family::Ipv6 => "-6",
    }
}

/// The source that the kernel gives a socket without capture.
fn without_us(
    netns: &Netns,
    stack: Stack,
    to: SocketAddr,
    device: Option<&str>,
) -> Result<io::Result<IpAddr>> {
    netns.run(|| {
        let socket = Socket::new(stack.domain(), Type::DGRAM, None)?;
        socket.bind_device(device.map(str::as_bytes))?;
        socket.connect(&stack.spell(to).into())?;
        Ok(source(&socket.local_addr()?.as_socket().expect("an IP socket")))
    })
}

/// The initial source of a captured connection, whatever its outcome.
fn captured(netns: &Netns, stack: Stack, to: SocketAddr, device: Option<&str>) -> Result<io::Result<IpAddr>> {
    netns.run(|| {
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        socket.bind_device(device.map(str::as_bytes))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&stack.spell(to).into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        Ok(source(&socket.local_addr()?.as_socket().expect("an IP socket")))
    })
}

fn source(of: &SocketAddr) -> IpAddr {
    canonical(*of).ip()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    InterfaceFirst,
    EnrollmentFirst,
}

/// Pods of IPv6 clusters on EKS have IPv4 through a separate device, for external traffic. Its address is link-local, and the
/// CNI plugin does not name it. IPv4 clusters have the reverse.
fn egress_interface(context: &Context, stack: Stack, order: Order) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let family = stack.family();
    let (families, device, [own, gateway], length) = match family {
        Family::Ipv4 => (Families::V6Only, "v4if0", ["169.254.172.2", "169.254.172.1"], 22),
        Family::Ipv6 => (Families::V4Only, "v6if0", ["fd00:a9fe::2", "fd00:a9fe::1"], 118),
    };
    let (address, beyond) = far(family);
    let pod = node.plain("pod", families)?;
    if order == Order::EnrollmentFirst {
        pod.enroll()?;
        let nowhere = SocketAddr::new(address, 9);
        ensure!(captured(pod.netns(), stack, nowhere, None)?.is_err(), "the pod can't speak {family}");
    }
    if family == Family::Ipv6 {
        pod.netns().set_sysctl("net.ipv6.conf.eth0.disable_ipv6", "1")?;
    }
    let nodad = if family == Family::Ipv6 { "nodad" } else { "" };
    pod.netns().ip(&format!(
        "link add {device} type veth peer name egress netns {}",
        node.netns().path().display()
    ))?;
    node.netns().ip_batch(&[
        format!("address add {gateway}/{length} dev egress {nodad}"),
        format!("address add {beyond} dev egress {nodad}"),
        "link set egress up".to_owned(),
    ])?;
    pod.netns().ip_batch(&[
        format!("address add {own}/{length} dev {device} {nodad}"),
        format!("link set {device} up"),
        format!("route add default via {gateway} dev {device}"),
    ])?;
    if order == Order::InterfaceFirst {
        pod.enroll_with_interface(device)?;
    }
    let own: IpAddr = own.parse()?;
    wait::until_true("agent that knows the address", wait::SOON, || {
        Ok(node.report(&pod)?.is_some_and(|report| report.addresses.contains(&own)))
    })?;

    let listening = Server::start(node.netns(), stack, 0, "node")?;
    let to = SocketAddr::new(address, listening.port());
    let mut connection = pod.connect(stack, to)?;
    connection.exchange("hello")?;
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let source = canonical(connection.local_name);
    ensure!(source.ip() == own, "getsockname says {source}");
    ensure!(connection.heard.peer.ip() == own && !connection.is_direct(), "{:?}", connection.heard);
    let entries = pod.proxied_times(Direction::Outbound, to, 1)?;
    ensure!(entries[0].is_of(family) && entries[0].source == source, "{entries:#?}");
    inbound::passes_at(node.netns(), &pod, stack, own)?;

    // It counts as the pod's address like any other.
    let report = node.report(&pod)?.context("an enrolled pod")?;
    ensure!(report.captured.iter().any(|name| name == family.name()), "{report:#?}");
    for direction in ["outbound", "inbound"] {
        let is_of = |counter: &&redirect_protocol::wire::PodCounter| {
            counter.family == family.name() && counter.direction == direction && counter.verdict == "captured"
        };
        let counted = report.counters.iter().find(is_of).map_or(0, |counter| counter.connections);
        ensure!(counted == 1, "{direction}: {report:#?}");
    }
    let (explanation, code) = inspect::explain(&node, &pod, &stack.spell(to).to_string())?;
    ensure!(code == Some(0) && explanation.captured, "{explanation:#?}");
    let itself = SocketAddr::new(own, 80);
    let (explanation, code) = inspect::explain(&node, &pod, &stack.spell(itself).to_string())?;
    ensure!(code == Some(0) && explanation.verdict.contains("own_address"), "{explanation:#?}");
    let (detail, code) = inspect::show(&node, &pod)?;
    ensure!(code == Some(0), "{detail:#?}");

    // The other family is unaffected.
    let other = node.plain("other", Families::Dual)?;
    families.stacks().try_for_each(|stack| outbound::passes_the_proxy_once(&pod, &other, stack))
}

/// An address on the second network that is in none of the pod's on-link networks.
fn far(family: Family) -> (IpAddr, String) {
    let far: IpAddr = match family {
        Family::Ipv4 => [203, 0, 113, 9].into(),
        Family::Ipv6 => [0x2001, 0xdb8, 9, 0, 0, 0, 0, 9].into(),
    };
    let length = if far.is_ipv4() { 32 } else { 128 };
    (far, format!("{far}/{length}"))
}

/// A pod on two networks, with two addresses on the second one, and a server beyond it.
struct Scene {
    node: Arc<Node>,
    network: SecondNetwork,
    stack: Stack,
    /// On the second network.
    addresses: [IpAddr; 2],
    listening: Server,
    to: SocketAddr,
}

impl Scene {
    fn new(context: &Context, stack: Stack) -> Result<Self> {
        let node = Node::start(&context.session()?)?;
        let network = SecondNetwork::behind(node.enrolled("pod", Families::Dual)?)?;
        let family = stack.family();
        let (second, length): (IpAddr, _) = match family {
            Family::Ipv4 => ([192, 168, 78, 1].into(), 24),
            Family::Ipv6 => ([0xfd03, 0, 0, 0, 0, 0, 0, 1].into(), 64),
        };
        let nodad = if family == Family::Ipv6 { "nodad" } else { "" };
        let (far, destination) = far(family);
        network.pod.netns().ip(&format!("address add {second}/{length} dev net1 {nodad}"))?;
        network.outside.ip_batch(&[
            format!("address add {destination} dev net1 {nodad}"),
            format!("route add {second} dev net1"),
        ])?;
        network.is_known()?;
        let listening = Server::start(&network.outside, stack, 0, "far")?;
        let to = SocketAddr::new(far, listening.port());
        let addresses = [SecondNetwork::address(family, SecondNetwork::POD), second];
        Ok(Self { node, network, stack, addresses, listening, to })
    }

    fn pod(&self) -> &Pod {
        &self.network.pod
    }

    fn change(&self, command: &str) -> Result<()> {
        let far = far(self.stack.family()).1;
        let command = command.replace("FAR", &far);
        self.pod().netns().ip(&format!("{} {command}", flag(self.stack.family()))).map(drop)
    }

    /// Checks that a connection has this source, which the kernel chooses, and that the proxy's has it as
    /// well.
    fn comes_from(&self, expected: IpAddr) -> Result<()> {
        let Self { stack, to, .. } = *self;
        let netns = self.pod().netns();
        let chosen = without_us(netns, stack, to, None)??;
        ensure!(chosen == expected, "the kernel chooses {chosen}, not {expected}");
        wait::until_true(&format!("connection from {expected}"), wait::SOON, || {
            Ok(captured(netns, stack, to, None)?.is_ok_and(|source| source == expected))
        })?;
        let mut connection = self.pod().connect(stack, to)?;
        connection.exchange("hello")?;
        let source = canonical(connection.local_name);
        ensure!(source.ip() == expected, "getsockname says {source}");
        ensure!(connection.heard.peer.ip() == expected && !connection.is_direct(), "{:?}", connection.heard);
        let entries =
            self.node.access_log().connections(&source.to_string(), |entry| entry.source == source)?;
        ensure!(entries.len() == 1 && entries[0].is_of(stack.family()), "{entries:#?}");
        ensure!(self.listening.accepted().contains(&connection.heard));
        Ok(())
    }
}

/// Routes that appear, change and disappear while the pod is enrolled.
fn sources_of_routes(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(context, stack)?;
    let [first, second] = scene.addresses;
    let choice = || -> Result<IpAddr> { Ok(without_us(scene.pod().netns(), stack, scene.to, None)??) };
    let eth0 = choice()?;
    ensure!(eth0 == scene.pod().address(stack.family())?, "{eth0}");
    scene.change("route add FAR dev net1")?;
    let chosen = choice()?;
    ensure!([first, second].contains(&chosen), "{chosen}");
    scene.comes_from(chosen)?;
    for of in [first, second, first] {
        scene.change(&format!("route replace FAR dev net1 src {of}"))?;
        scene.comes_from(of)?;
    }
    scene.change("route del FAR")?;
    let gone = || captured(scene.pod().netns(), stack, scene.to, None);
    wait::until_true("connection from eth0", wait::SOON, || Ok(gone()?.is_ok_and(|source| source == eth0)))?;
    let (detail, code) = inspect::show(&scene.node, scene.pod())?;
    ensure!(code == Some(0), "{detail:#?}");
    Ok(())
}

/// Addresses that are deprecated, removed and added; an interface that disappears.
fn sources_of_addresses(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(context, stack)?;
    scene.change("route add FAR dev net1")?;
    let chosen = without_us(scene.pod().netns(), stack, scene.to, None)??;
    let [of, other] = if chosen == scene.addresses[0] {
        scene.addresses
    } else {
        let [first, second] = scene.addresses;
        [second, first]
    };
    scene.comes_from(of)?;
    let length = if of.is_ipv4() { 24 } else { 64 };
    if stack.family() == Family::Ipv6 {
        scene.change(&format!("address change {of}/{length} dev net1 preferred_lft 0"))?;
        scene.comes_from(other)?;
        scene.change(&format!("address change {of}/{length} dev net1 preferred_lft forever"))?;
        scene.comes_from(of)?;
    }
    scene.change(&format!("address del {of}/{length} dev net1"))?;
    scene.comes_from(other)?;
    let has = |address: IpAddr| -> Result<bool> {
        Ok(scene.node.report(scene.pod())?.is_some_and(|report| report.addresses.contains(&address)))
    };
    wait::until_true("agent that knows the address no more", wait::SOON, || Ok(!has(of)?))?;
    let third = if of.is_ipv4() { "192.168.79.1/32" } else { "fd04::1/128" };
    scene.change(&format!("address add {third} dev net1 {}", if of.is_ipv4() { "" } else { "nodad" }))?;
    let third: IpAddr = third.split('/').next().context("an address")?.parse()?;
    wait::until_true("agent that knows the address", wait::SOON, || has(third))?;
    let outside = SecondNetwork::address(stack.family(), SecondNetwork::OUTSIDE);
    scene.change(&format!("route replace {outside} dev net1"))?;
    inbound::passes_at(&scene.network.outside, scene.pod(), stack, other)?;

    scene.pod().netns().ip("link del net1")?;
    wait::until_true("agent that knows the addresses no more", wait::SOON, || {
        Ok(!has(other)? && !has(third)?)
    })?;
    let eth0 = scene.pod().address(stack.family())?;
    let source = captured(scene.pod().netns(), stack, scene.to, None)??;
    ensure!(source == eth0, "{source}");
    let outsider = scene.node.plain("other", Families::Dual)?;
    outbound::passes_the_proxy_once(scene.pod(), &outsider, stack)
}

/// Sockets that are bound to a device.
fn sources_of_devices(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(context, stack)?;
    let netns = scene.pod().netns();
    for gateway in [false, true] {
        if gateway {
            let gateway = SecondNetwork::address(stack.family(), SecondNetwork::OUTSIDE);
            scene.change(&format!("route add default via {gateway} dev net1 metric 5000"))?;
        }
        for device in ["eth0", "net1"] {
            let chosen = without_us(netns, stack, scene.to, Some(device))?.ok();
            let what = format!("connection from {chosen:?}, bound to {device}");
            let mut source = None;
            let outcome = wait::until_true(&what, wait::SOON, || {
                source = captured(netns, stack, scene.to, Some(device))?.ok();
                Ok(source == chosen)
            });
            outcome.with_context(|| format!("{source:?}"))?;
            ensure!(chosen.is_some() || !gateway, "no source on {device}");
        }
    }
    Ok(())
}

/// The pod has a routing table of its own, as for VPNs and source-based routing: connections to its
/// destinations are captured.
fn routes_of_another_table(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (family, gateway) = (flag(stack.family()), node.gateway(stack.family()));
    let own = pod.address(stack.family())?;
    let subnet = node.subnet(stack.family());
    for command in [
        format!("route add {subnet} dev eth0 src {own} table 77"),
        format!("route add default via {gateway} table 77"),
        "rule add pref 20000 lookup 77".to_owned(),
        format!("route del {subnet} dev eth0"),
        "route flush default".to_owned(),
    ] {
        pod.netns().ip(&format!("{family} {command}")).map(drop).or_else(|error| {
            // The default route may have disappeared with its on-link network.
            if command.contains("flush") { Ok(()) } else { Err(error) }
        })?;
    }
    let to = other.endpoint(stack.family(), 9)?;
    ensure!(without_us(pod.netns(), stack, to, None)?? == own);
    wait::until_true("captured connection", wait::SOON, || {
        Ok(captured(pod.netns(), stack, to, None)?.is_ok())
    })?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

/// Without a route in the pod, connections fail at once, with the kernel's own error.
fn refused_without_a_route(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let family = stack.family();
    let lacking = if family == Family::Ipv4 { Families::V6Only } else { Families::V4Only };
    let (to, network) = far(family);
    let to = SocketAddr::new(to, 9);
    let refusal = |pod: &Pod| -> Result<Option<i32>> {
        let began = Instant::now();
        let error = pod.netns().run(|| dial(stack, to, wait::SOON))?.err().context("a connection")?;
        ensure!(began.elapsed() < wait::patient(Duration::from_secs(1)), "only after {:?}", began.elapsed());
        Ok(error.raw_os_error())
    };
    let same = |plain: &Pod, pod: &Pod| -> Result<()> {
        let wanted = refusal(plain)?;
        wait::until_true(&format!("error {wanted:?}"), wait::SOON, || Ok(refusal(pod)? == wanted))?;
        ensure!(pod.proxied_at_all()?.is_empty(), "{:#?}", pod.proxied_at_all()?);
        Ok(())
    };
    // The pod has no address of the family.
    let (plain, pod) = (node.plain("plain", lacking)?, node.enrolled("pod", lacking)?);
    same(&plain, &pod)?;
    // The pod has an address, and loses its default route; then it refuses a network.
    let (plain, pod) = (node.plain("plain", Families::Dual)?, node.enrolled("pod", Families::Dual)?);
    for command in [format!("route add prohibit {network}"), format!("route replace unreachable {network}")] {
        for pod in [&plain, &pod] {
            pod.netns().ip(&format!("{} {command}", flag(family)))?;
        }
        // Until then it was captured.
        let wanted = refusal(&plain)?;
        wait::until_true(&format!("error {wanted:?}"), wait::SOON, || {
            let outcome = pod.netns().run(|| dial(stack, to, wait::SOON))?;
            Ok(outcome.err().is_some_and(|error| error.raw_os_error() == wanted))
        })?;
    }
    for pod in [&plain, &pod] {
        pod.netns().ip(&format!("{} route del {network}", flag(family)))?;
        pod.netns().ip(&format!("{} route del default", flag(family)))?;
    }
    let wanted = refusal(&plain)?;
    wait::until_true(&format!("error {wanted:?}"), wait::SOON, || {
        let outcome = pod.netns().run(|| dial(stack, to, wait::SOON))?;
        Ok(outcome.err().is_some_and(|error| error.raw_os_error() == wanted))
    })?;
    // On-link traffic continues, and so do deliveries.
    let other = node.plain("other", Families::Dual)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

/// Two pods have the same address on independent networks; and one has an address on its `lo` that belongs to another pod.
/// Addresses named for one pod never count for the other.
fn contested_address(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let one = SecondNetwork::behind(node.enrolled("one", Families::Dual)?)?;
    let address = SecondNetwork::address(stack.family(), SecondNetwork::POD);
    let listed = |pod: &Pod, address: &IpAddr| -> Result<bool> {
        Ok(node.report(pod)?.context("an enrolled pod")?.addresses.contains(address))
    };
    wait::until_true("address of net1", wait::SOON, || listed(&one.pod, &address))?;
    let two = SecondNetwork::behind(node.enrolled("two", Families::Dual)?)?;
    two.is_known()?;
    for network in [&one, &two] {
        inbound::passes_at(&network.outside, &network.pod, stack, address)?;
        let listening = Server::start(&network.outside, stack, 0, "outside")?;
        let to =
            SocketAddr::new(SecondNetwork::address(stack.family(), SecondNetwork::OUTSIDE), listening.port());
        wait::until_true("connection from net1", wait::SOON, || {
            Ok(captured(network.pod.netns(), stack, to, None)?.is_ok_and(|source| source == address))
        })?;
        let mut connection = network.pod.connect(stack, to)?;
        connection.exchange("hello")?;
        ensure!(connection.heard.peer.ip() == address && !connection.is_direct(), "{:?}", connection.heard);
    }
    ensure!(!listed(&two.pod, &address)?, "{:#?}", node.report(&two.pod)?);

    let taken = one.pod.address(stack.family())?;
    let length = if taken.is_ipv4() { 32 } else { 128 };
    let nodad = if taken.is_ipv4() { "" } else { "nodad" };
    // The first network must not learn about it.
    two.pod.netns().set_sysctl("net.ipv4.conf.all.arp_ignore", "1")?;
    two.pod.netns().ip(&format!("address add {taken}/{length} dev lo {nodad}"))?;
    // Notifications are in order.
    let own = if taken.is_ipv4() { "192.168.99.1" } else { "fd99::1" };
    two.pod.netns().ip(&format!("address add {own}/{length} dev lo {nodad}"))?;
    wait::until_true("address on lo", wait::SOON, || listed(&two.pod, &own.parse()?))?;
    ensure!(!listed(&two.pod, &taken)? && listed(&one.pod, &taken)?);
    let other = node.plain("other", Families::Dual)?;
    inbound::passes_the_proxy_once(other.netns(), &one.pod, stack)?;
    outbound::passes_the_proxy_once(&one.pod, &other, stack)
}

/// Enrollment stays within its time limit, and leaves nothing.
fn a_thousand_routes(context: &Context, stack: Stack) -> Result<()> {
    const ROUTES: u16 = 1000;
    let node = Node::start(&context.session()?)?;
    let network = SecondNetwork::behind(node.plain("pod", Families::Dual)?)?;
    let (pod, family) = (&network.pod, stack.family());
    let before = Footprint::of(pod.netns())?;
    let gateway = SecondNetwork::address(family, SecondNetwork::OUTSIDE);
    let destination = |number: u16| match family {
        Family::Ipv4 => format!("100.{}.{}.0/24", 64 + number / 256, number % 256),
        Family::Ipv6 => format!("2001:db8:{number:x}::/48"),
    };
    let routes = (0..ROUTES).map(|number| format!("route add {} via {gateway}", destination(number)));
    pod.netns().ip_batch(&routes.collect::<Vec<_>>())?;
    let began = Instant::now();
    pod.enroll()?;
    println!("routing::a_thousand_routes::{}: enrolled after {:?}", stack.label(), began.elapsed());
    let footprint = Footprint::of(pod.netns())?;
    let mirrored = if family == Family::Ipv6 { usize::from(ROUTES) } else { 0 };
    ensure!(footprint.routes.len() < mirrored + 16, "{} routes", footprint.routes.len());
    network.is_known()?;

    let far: IpAddr = if family == Family::Ipv4 { "100.64.7.9".parse()? } else { "2001:db8:7::9".parse()? };
    let rest = if family == Family::Ipv4 { "/32 dev net1" } else { "/128 dev net1 nodad" };
    network.outside.ip(&format!("address add {far}{rest}"))?;
    let listening = Server::start(&network.outside, stack, 0, "far")?;
    let mut connection = Connection::open(pod.netns(), stack, SocketAddr::new(far, listening.port()))?;
    connection.exchange("hello")?;
    let own = SecondNetwork::address(family, SecondNetwork::POD);
    ensure!(source(&connection.local_name) == own && connection.heard.peer.ip() == own, "{connection:?}");
    ensure!(!connection.is_direct(), "{connection:?}");

    // They all go, and come back.
    pod.netns().ip("link set net1 down")?;
    let left = |most: usize| -> Result<bool> { Ok(Footprint::of(pod.netns())?.routes.len() < most) };
    wait::until_true("table without the routes", wait::SOON, || left(16))?;
    pod.unenroll()?;
    ensure!(Footprint::of(pod.netns())?.routes == before.routes);
    Ok(())
}
