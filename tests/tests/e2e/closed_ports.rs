//! Closed ports, unreachable destinations and narrow links: errors arrive at once, at the right socket.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::connection::{dial, io_kind};
use redirect_tests::wait;
use redirect_tests::{Connection, Direction, Families, Netns, Node, Pod, ProxyKind, Server, Stack};
use socket2::SockRef;

use crate::context::{Context, for_every_kind, for_every_stack, trial};
use crate::outbound;
use crate::transitions::Deaf;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "closed_ports::loopback", |context, families, stack| {
        let pod = context.node()?.enrolled("pod", families)?;
        is_refused(&pod, stack, stack.loopback())
    });
    trials.extend(for_every_kind(context, "closed_ports::own_address", |context, families, stack| {
        let pod = context.node()?.enrolled("pod", families)?;
        is_refused(&pod, stack, pod.address(stack.family())?)
    }));
    trials.extend(for_every_kind(
        context,
        "closed_ports::through_two_proxies",
        |context, families, stack| {
            let node = context.node()?;
            let (client, server) = (node.enrolled("client", families)?, node.enrolled("server", families)?);
            outbound::is_refused_soon(&client, &server, stack)
        },
    ));
    trials.extend(for_every_stack(context, "closed_ports::unreachable", unreachable));
    trials.push(trial(context, "closed_ports::no_answer", no_answer));
    trials.extend(for_every_stack(context, "closed_ports::no_answer_any_more", no_answer_any_more));
    trials.extend(for_every_stack(context, "closed_ports::narrow_link_1280", |context, stack| {
        narrow_link(context, stack, 1280)
    }));
    for stack in [Stack::V4, Stack::Mapped] {
        let name = format!("closed_ports::narrow_link_1000::{}", stack.label());
        trials.push(trial(context, name, move |context| narrow_link(context, stack, 1000)));
    }
    trials
}

/// Without a proxy the error is the kernel's own: ECONNREFUSED.
fn is_refused(pod: &Pod, stack: Stack, address: IpAddr) -> Result<()> {
    let start = Instant::now();
    let outcome = pod.netns().run(|| dial(stack, (address, 9).into(), Duration::from_secs(5)))?;
    let kind = outcome.err().context("a closed port answered")?.kind();
    ensure!(kind == ErrorKind::ConnectionRefused, "{kind:?}");
    ensure!(start.elapsed() < wait::patient(Duration::from_millis(500)), "only after {:?}", start.elapsed());
    ensure!(pod.proxied_at_all()?.is_empty());
    Ok(())
}

/// Networks with unreachable or blackhole routes on the node.
fn nowhere(kind: &str, family: Family) -> (String, IpAddr) {
    let number = if kind == "unreachable" { 1 } else { 2 };
    match family {
        Family::Ipv4 => (format!("203.0.{number}.0/24"), [203, 0, number, 5].into()),
        Family::Ipv6 => {
            let address = [0x2001, 0xdb8, 0xffff, number.into(), 0, 0, 0, 5];
            (format!("2001:db8:ffff:{number}::/64"), address.into())
        }
    }
}

/// Clients give up while their destination has not answered, and the proxy gives up with them.
fn no_answer_any_more(context: &Context, stack: Stack) -> Result<()> {
    const CLIENTS: usize = 300;
    context.needs(ProxyKind::Embedded, "what another proxy does is its own affair")?;
    let node = Node::start(&context.session()?)?;
    let (client, other) = (node.enrolled("client", Families::Dual)?, node.plain("other", Families::Dual)?);
    let _deaf = Deaf::new(other.netns(), "syn")?;
    let to = other.endpoint(stack.family(), 80)?;
    let sockets =
        || -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{}/fd", node.proxy_pid()?))?.count()) };
    let before = sockets()?;
    let dialled = client
        .netns()
        .run(|| (0..CLIENTS).map(|_| dial(stack, to, wait::SOON)).collect::<std::io::Result<Vec<_>>>())??;
    let both = before + 2 * CLIENTS;
    wait::until_true("sockets for all of them", wait::SOON, || Ok(sockets()? >= both))?;
    for stream in dialled {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    wait::until_true("end of the proxy's sockets", wait::SOON, || Ok(sockets()? < before + CLIENTS / 10))?;
    let ends = || -> Result<Vec<String>> {
        Ok(node.access_log().entries()?.into_iter().filter_map(|entry| entry.result).collect())
    };
    wait::until_true("end of all of them in the log", wait::SOON, || Ok(ends()?.len() == CLIENTS))?;
    // The proxy's own timeout, after ten seconds, is not the cause.
    let ends = ends()?;
    ensure!(ends.iter().all(|end| end.starts_with("client: ")), "{ends:?}");
    Ok(())
}

/// The node answers by ICMP, which belongs to the proxy's connection; the client learns of it by a reset.
fn unreachable(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (network, address) = nowhere("unreachable", stack.family());
    node.netns().ip(&format!("route add unreachable {network}"))?;
    let client = node.enrolled("client", Families::Dual)?;
    let to = SocketAddr::new(address, 80);
    let start = Instant::now();
    let error = client.connect(stack, to).err().context("an unreachable destination answered")?;
    ensure!(start.elapsed() < wait::patient(Duration::from_secs(2)), "only after {:?}", start.elapsed());
    ensure!(io_kind(&error).is_some_and(|kind| kind != ErrorKind::WouldBlock), "{error:#}");
    let entries = client.node().access_log().entries()?;
    let result = entries.iter().find_map(|entry| entry.result.clone());
    ensure!(client.proxied(Direction::Outbound, to)?.len() == 1);
    println!("{stack}: the client got {error:#}; the proxy {result:?} after {:?}", start.elapsed());
    Ok(())
}

/// The destination never answers: the proxy times out, and the client gets an error.
fn no_answer(context: &Context) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(15);
    let node = Node::start(&context.session()?)?;
    for family in Family::ALL {
        node.netns().ip(&format!("route add blackhole {}", nowhere("blackhole", family).0))?;
    }
    let client = node.enrolled("client", Families::Dual)?;
    thread::scope(|scope| {
        let attempts = Stack::ALL.map(|stack| {
            let client = client.netns();
            scope.spawn(move || -> Result<()> {
                let to = SocketAddr::new(nowhere("blackhole", stack.family()).1, 80);
                let start = Instant::now();
                let error = Connection::open_within(client, stack, to, PATIENCE).err();
                let error = error.context("a destination that does not exist answered")?;
                let kind = io_kind(&error);
                ensure!(kind.is_some_and(|kind| kind != ErrorKind::WouldBlock), "{error:#}");
                ensure!(start.elapsed() < wait::patient(PATIENCE), "only after {:?}", start.elapsed());
                Ok(())
            })
        });
        attempts
            .into_iter()
            .try_for_each(|attempt| attempt.join().map_err(|_| anyhow!("a client panicked"))?)
    })
}

/// pod ─1500─ node ─1500─ near ─MTU─ remote ─1500─ far: only ICMP tells the ends about the narrow link, and it has to reach
/// the proxy's sockets on the pod's side.
fn narrow_link(context: &Context, stack: Stack, mtu: u32) -> Result<()> {
    let family = stack.family();
    let node = Node::start(&context.session()?)?;
    let (near, remote, far) = (Netns::new("near")?, Netns::new("remote")?, Netns::new("far")?);
    node.attach(&near, "near")?;
    for router in [&near, &remote] {
        router.set_sysctl("net.ipv4.ip_forward", "1")?;
        router.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
    }
    for (number, device, left, right) in [(30, "narrow", &near, &remote), (31, "far", &remote, &far)] {
        let peer = right.path();
        left.ip(&format!("link add {device} type veth peer name {device} netns {}", peer.display()))?;
        for (netns, host) in [(left, 1), (right, 2)] {
            netns.ip_batch(&[
                format!("address add 172.{number}.0.{host}/24 dev {device}"),
                format!("address add fd{number}::{host}/64 dev {device} nodad"),
                format!("link set {device} up"),
            ])?;
        }
        right.ip_batch(&[
            format!("route add default via 172.{number}.0.1"),
            format!("route add default via fd{number}::1"),
        ])?;
    }
    near.ip_batch(&[
        "route add 172.31.0.0/24 via 172.30.0.2".into(),
        "route add fd31::/64 via fd30::2".into(),
    ])?;
    let far_address: IpAddr = match family {
        Family::Ipv4 => [172, 31, 0, 2].into(),
        Family::Ipv6 => [0xfd31, 0, 0, 0, 0, 0, 0, 2].into(),
    };
    node.netns().ip(&format!("route add {far_address} via {}", node.attached(family)))?;
    for router in [&near, &remote] {
        router.ip(&format!("link set narrow mtu {mtu}"))?;
    }

    let pod = node.enrolled("pod", Families::Dual)?;
    let too_big = |netns: &Netns| too_big(netns, family);
    let before = (too_big(pod.proxy_netns())?, too_big(&far)?);

    let listening = Server::start(&far, stack, 0, "far")?;
    let to = SocketAddr::new(far_address, listening.port());
    megabyte(pod.connect(stack, to)?)?;
    ensure!(pod.proxied(Direction::Outbound, to)?.len() == 1);

    let listening = pod.listen(stack)?;
    let to = pod.endpoint(family, listening.port())?;
    megabyte(Connection::open(&far, stack, to)?)?;
    ensure!(pod.proxied(Direction::Inbound, to)?.len() == 1);

    let told = (too_big(pod.proxy_netns())? - before.0, too_big(&far)? - before.1);
    ensure!(told.0 > 0 && told.1 > 0, "the link was not narrow: {told:?} messages came");
    Ok(())
}

fn megabyte(mut connection: Connection) -> Result<()> {
    let data: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_ne_bytes).collect();
    let start = Instant::now();
    ensure!(connection.transfer(&data)? == data, "the data came back changed");
    ensure!(start.elapsed() < wait::patient(Duration::from_secs(4)), "only after {:?}", start.elapsed());
    ensure!(connection.finish()? == data.len() as u64);
    Ok(())
}

/// How many "too big" messages a namespace has received.
fn too_big(netns: &Netns, family: Family) -> Result<u64> {
    match family {
        Family::Ipv4 => netns.statistic("snmp", "Icmp", "InDestUnreachs"),
        Family::Ipv6 => netns.statistic_ipv6("Icmp6InPktTooBigs"),
    }
}
