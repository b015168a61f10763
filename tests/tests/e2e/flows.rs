//! `redirect monitor` reports exactly the connections that sockets see.

use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_ebpf::Family;
use redirect_ebpf::maps::ConfigFlags;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::FlowReport;
use redirect_tests::connection::dial;
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Connection, Families, Monitor, Node, Pod, Stack};

use crate::context::{Context, for_every_stack, trial};
use crate::outbound;
use crate::probes::{Probing, is_exempt, probing};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "flows::captured", captured);
    trials.extend(for_every_stack(context, "flows::left_alone", left_alone));
    trials.extend(for_every_stack(context, "flows::refused", refused));
    trials.extend(for_every_stack(context, "flows::a_probe", probe));
    trials.push(trial(context, "flows::a_port_of_the_proxy_s", bind));
    trials.push(trial(context, "flows::filters", filters));
    trials.push(trial(context, "flows::off_when_the_last_listener_has_left", switch));
    trials.push(trial(context, "flows::with_the_next_agent", restart));
    trials.push(trial(context, "flows::a_limit_in_a_second", limit));
    trials.push(trial(context, "flows::more_than_is_read", full));
    trials.push(trial(context, "flows::one_of_so_many", sample));
    trials
}

fn is(flow: &FlowReport, direction: &str, verdict: &str, reason: &str) -> bool {
    (&*flow.direction, &*flow.verdict, &*flow.reason) == (direction, verdict, reason)
}

/// `SO_COOKIE`.
fn cookie(connection: &Connection) -> Result<u64> {
    let (mut cookie, mut length) = (0u64, 8);
    let socket = connection.stream().as_raw_fd();
    // SAFETY: the value lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    ensure!(result == 0, std::io::Error::last_os_error());
    Ok(cookie)
}

/// Values that only the hooks in pods know.
fn known<T>(context: &Context, value: T) -> Option<T> {
    (context.placement() == Placement::Pod).then_some(value)
}

fn captured(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    let monitor = Monitor::start(&node, &["--pod", &client.identity().uid])?;
    let at_server = Monitor::start(&node, &["--pod", &server.identity().uid])?;
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let began = jiff::Timestamp::now();
    let connection = client.connect(stack, to)?;

    let flow = monitor.hears("outbound connection", |flow| is(flow, "outbound", "captured", "enrolled"))?;
    ensure!(flow.pod.as_ref() == Some(client.identity()), "{flow:#?}");
    ensure!(flow.family == stack.family().name() && flow.destination == Some(to), "{flow:#?}");
    ensure!(flow.source == Some(canonical(connection.local_name)), "{flow:#?}");
    ensure!(flow.socket_cookie == known(context, cookie(&connection)?), "{flow:#?}");
    let second = jiff::SignedDuration::from_secs(1);
    ensure!(flow.time > began - second && flow.time < jiff::Timestamp::now() + second, "{flow:#?}");

    let flow = at_server.hears("inbound connection", |flow| is(flow, "inbound", "captured", "enrolled"))?;
    ensure!(flow.pod.as_ref() == Some(server.identity()), "{flow:#?}");
    ensure!(flow.family == stack.family().name() && flow.destination == Some(to), "{flow:#?}");
    ensure!(flow.source.map(|source| source.ip()) == Some(client.address(stack.family())?), "{flow:#?}");
    ensure!(flow.socket_cookie.is_none(), "there is no socket at the SYN: {flow:#?}");
    // On the host, the proxy's own connections are not reported.
    if context.placement() == Placement::Pod {
        let flow = at_server.hears("delivery", |flow| is(flow, "delivery", "passed", "proxy"))?;
        ensure!(flow.destination == Some(to), "{flow:#?}");
    }
    Ok(())
}

const EXCLUDED: u16 = 8443;

fn left_alone(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(
        &context.session()?,
        &["--exclude-outbound-ports", "8443", "--exclude-inbound-ports", "8443"],
    )?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    let monitor = Monitor::start(&node, &[])?;
    let _listening = redirect_tests::Server::start(server.netns(), stack, EXCLUDED, "excluded")?;
    let to = server.endpoint(stack.family(), EXCLUDED)?;
    let connection = client.connect(stack, to)?;
    let flow = monitor.hears("outbound connection", |flow| is(flow, "outbound", "passed", "excluded"))?;
    ensure!(flow.pod.as_ref() == Some(client.identity()) && flow.destination == Some(to), "{flow:#?}");
    ensure!(flow.family == stack.family().name(), "{flow:#?}");
    let source = canonical(connection.local_name);
    match context.placement() {
        Placement::Pod => ensure!(flow.source.is_none(), "the kernel had not chosen a port yet: {flow:#?}"),
        Placement::Node => ensure!(flow.source == Some(source), "{flow:#?}"),
    }
    ensure!(flow.socket_cookie == known(context, cookie(&connection)?), "{flow:#?}");
    let flow = monitor.hears("inbound connection", |flow| is(flow, "inbound", "passed", "excluded"))?;
    ensure!(flow.pod.as_ref() == Some(server.identity()) && flow.destination == Some(to), "{flow:#?}");
    ensure!(flow.source == Some(source), "{flow:#?}");
    Ok(())
}

fn refused(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--without-proxy", "refuse"])?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let (far, near) = (other.listen(stack)?, pod.listen(stack)?);
    let outbound = other.endpoint(stack.family(), far.port())?;
    let inbound = pod.endpoint(stack.family(), near.port())?;
    node.kill_proxy()?;
    let monitor = Monitor::start(&node, &["--verdict", "dropped"])?;
    for (from, to, direction) in [(&pod, outbound, "outbound"), (&other, inbound, "inbound")] {
        ensure!(from.netns().run(|| dial(stack, to, SOON))?.is_err(), "{direction} is not refused");
        let flow = monitor.hears(direction, |flow| is(flow, direction, "dropped", "no_listener"))?;
        ensure!(flow.pod.as_ref() == Some(pod.identity()) && flow.destination == Some(to), "{flow:#?}");
        ensure!(flow.family == stack.family().name(), "{flow:#?}");
    }
    Ok(())
}

/// The kubelet's connection, as the pod's application sees it.
fn probe(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let monitor = Monitor::start(&node, &["--pod", &pod.identity().uid, "--verdict", "passed"])?;
    let answer = is_exempt(&kubelet, node.netns(), &pod, stack)?;
    let flow = monitor.hears("probe", |flow| is(flow, "inbound", "passed", "probe"))?;
    ensure!(flow.pod.as_ref() == Some(pod.identity()), "{flow:#?}");
    ensure!(flow.family == stack.family().name(), "{flow:#?}");
    ensure!(flow.source == answer.getsockname.map(canonical), "{flow:#?}, {answer:?}");
    ensure!(flow.destination == answer.getpeername.map(canonical), "{flow:#?}, {answer:?}");
    Ok(())
}

fn bind(context: &Context) -> Result<()> {
    context.needs_placement_pod("the proxy's ports are the host's")?;
    let node = context.node()?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let monitor = Monitor::start(&node, &["--pod", &pod.identity().uid, "--direction", "bind"])?;
    for address in ["0.0.0.0:15001", "[::]:15001"] {
        let address: SocketAddr = address.parse()?;
        ensure!(pod.netns().run(|| std::net::TcpListener::bind(address))?.is_err());
        let flow = monitor.hears("bind()", |flow| flow.source == Some(address))?;
        ensure!(is(&flow, "bind", "dropped", "proxy_port") && flow.socket_cookie.is_some(), "{flow:#?}");
    }
    Ok(())
}

/// From the same connections, each monitor gets those that match its filter.
fn filters(context: &Context) -> Result<()> {
    let node = node_with_a_closed_port(context, &[])?;
    let (one, two) = (node.enrolled("one", Families::Dual)?, node.enrolled("two", Families::Dual)?);
    let server = node.plain("server", Families::Dual)?;
    let address = server.address(Stack::V6.family())?.to_string();
    let name = one.identity().to_string();
    let mine = |flow: &FlowReport| flow.pod.as_ref() == Some(one.identity());
    let all = Monitor::start(&node, &[])?;
    let by_pod = Monitor::start(&node, &["--pod", &name])?;
    let by_namespace = Monitor::start(&node, &["--namespace", "no-such-namespace"])?;
    let by_family = Monitor::start(&node, &["--pod", &name, "--family", "ipv6"])?;
    let by_address = Monitor::start(&node, &["--pod", &name, "--address", &address])?;
    let by_direction = Monitor::start(&node, &["--pod", &name, "--direction", "inbound"])?;
    for stack in [Stack::V4, Stack::V6] {
        outbound::passes_the_proxy_once(&two, &server, stack)?;
        outbound::passes_the_proxy_once(&one, &server, stack)?;
    }
    // The last event: once it has arrived, all earlier ones have.
    let last = closed(&node, Family::Ipv6);
    ensure!(one.netns().run(|| dial(Stack::V6, last, SOON))?.is_err());
    let ends = |flow: &FlowReport| mine(flow) && flow.destination == Some(last);
    for monitor in [&all, &by_pod, &by_family] {
        monitor.hears("last connection", ends)?;
    }
    // In the pods, the proxy's own connections are reported as well.
    let each = if context.placement() == Placement::Pod { 2 } else { 1 };
    let two_s = all.heard().iter().filter(|flow| flow.pod.as_ref() == Some(two.identity())).count();
    ensure!(two_s >= 2 * each, "{:#?}", all.heard());
    ensure!(by_pod.heard().iter().all(mine), "{:#?}", by_pod.heard());
    let expected: Vec<_> = by_pod.heard().into_iter().filter(|flow| flow.family == "IPv6").collect();
    ensure!(by_family.heard() == expected && expected.len() > each, "{:#?}", by_family.heard());
    let own = if context.placement() == Placement::Pod {
        by_address.hears("proxy's own connection", |flow| is(flow, "outbound", "passed", "proxy"))?
    } else {
        by_address.hears("connection", |flow| is(flow, "outbound", "captured", "enrolled"))?
    };
    ensure!(mine(&own), "{own:#?}");
    let to_server = |flow: &FlowReport| flow.destination.is_some_and(|to| to.ip().to_string() == address);
    ensure!(by_address.heard().iter().all(to_server) && by_address.heard().len() >= each);
    ensure!(by_namespace.heard().is_empty() && by_direction.heard().is_empty());
    Ok(())
}

/// The pin of one of the agent's maps.
pub(crate) fn pinned(node: &Node, map: &str) -> Result<PathBuf> {
    let maps = std::fs::read_dir(node.pin_dir())?.filter_map(|entry| Some(entry.ok()?.path()));
    let directory =
        maps.filter(|path| path.to_string_lossy().contains("/maps-v")).last().context("no maps")?;
    let mut pins = std::fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path()));
    pins.find(|path| path.to_string_lossy().contains(&format!("/{map}-")))
        .with_context(|| format!("no {map}"))
}

/// Whether the kernel side reports connections, according to bpftool.
fn is_on(node: &Node) -> Result<bool> {
    let config = pinned(node, "CONFIG")?;
    let output = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(config).output()?;
    let dump: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    // The flags follow the cookie, eight bytes each.
    let flags = dump[0]["value"][8].as_str().context("no flags")?;
    let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16)?;
    Ok(ConfigFlags(flags).contains(ConfigFlags::FLOWS))
}

fn listeners(node: &Node, count: usize) -> Result<()> {
    wait::until_true("listeners", SOON, || Ok(node.status()?.flows.listeners == count))
}

fn switch(context: &Context) -> Result<()> {
    let node = node_with_a_closed_port(context, &[])?;
    ensure!(!is_on(&node)?);
    let mut one = Monitor::start(&node, &[])?;
    let mut two = Monitor::start(&node, &["--family", "IPv4", "--count", "1"])?;
    listeners(&node, 2)?;
    ensure!(is_on(&node)?);
    one.kill()?;
    listeners(&node, 1)?;
    ensure!(is_on(&node)?);
    // The other one stops after one connection.
    let pod = node.enrolled("pod", Families::Dual)?;
    let closed = closed(&node, Family::Ipv4);
    ensure!(pod.netns().run(|| dial(Stack::V4, closed, SOON))?.is_err());
    ensure!(two.wait()?.success() && two.heard().len() == 1, "{:#?}", two.heard());
    wait::until_true("kernel side that tells nothing", SOON, || Ok(!is_on(&node)?))?;
    listeners(&node, 0)
}

fn restart(context: &Context) -> Result<()> {
    let arguments = ["--on-exit", "keep", "--exclude-outbound-ports", "9"].map(str::to_owned);
    let node = node_with_a_closed_port(context, &["--on-exit", "keep"])?;
    let (pod, server) = (node.enrolled("pod", Families::Dual)?, node.plain("server", Families::Dual)?);
    for killed in [true, false] {
        let mut monitor = Monitor::start(&node, &[])?;
        if killed {
            node.kill_agent()?;
        } else {
            node.end_agent()?;
        }
        ensure!(!monitor.wait()?.success(), "a listener without an agent should fail");
        ensure!(is_on(&node)? == killed, "an agent that ends in order turns them off");
        // Not reported to any monitor, nor to a later one.
        let closed = closed(&node, Family::Ipv4);
        ensure!(pod.netns().run(|| dial(Stack::V4, closed, SOON))?.is_err());
        node.start_agent(&arguments)?;
        node.wait_for_proxy()?;
        ensure!(!is_on(&node)?);
        let monitor = Monitor::start(&node, &[])?;
        for stack in Stack::ALL {
            outbound::passes_the_proxy_once(&pod, &server, stack)?;
            monitor.hears("outbound connection", |flow| {
                is(flow, "outbound", "captured", "enrolled") && flow.family == stack.family().name()
            })?;
        }
        ensure!(
            !monitor.heard().iter().any(|flow| flow.destination == Some(closed)),
            "{:#?}",
            monitor.heard()
        );
    }
    node.uninstall(&["--force"])?;
    Ok(())
}

/// A node with an excluded port without a listener: connections to it are refused at once, and each causes one event,
/// wherever the hooks are.
fn node_with_a_closed_port(context: &Context, arguments: &[&str]) -> Result<Arc<Node>> {
    let all: Vec<_> = arguments.iter().copied().chain(["--exclude-outbound-ports", "9"]).collect();
    Node::with_arguments(&context.session()?, &all)
}

fn closed(node: &Node, family: Family) -> SocketAddr {
    (node.gateway(family), 9).into()
}

/// Connections that are refused at once.
fn burst(pod: &Pod, number: usize) -> Result<()> {
    let closed = closed(pod.node(), Family::Ipv6);
    pod.netns().run(|| -> Result<()> {
        for _ in 0..number {
            ensure!(std::net::TcpStream::connect(closed).is_err());
        }
        Ok(())
    })?
}

fn limit(context: &Context) -> Result<()> {
    const MANY: usize = 200;
    let node = node_with_a_closed_port(context, &["--flow-rate", "2"])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let monitor = Monitor::start(&node, &[])?;
    burst(&pod, MANY)?;
    // Each is reported or counted as lost.
    wait::until_true("every connection", SOON, || {
        let flows = node.status()?.flows;
        Ok(monitor.heard().len() + usize::try_from(flows.rate_limit)? == MANY && flows.rate_limit > 0)
    })
    .with_context(|| {
        format!("{:?}, {} told", node.status().map(|status| status.flows), monitor.heard().len())
    })
}

/// While the agent is stopped, events are kept as long as there is room.
fn full(context: &Context) -> Result<()> {
    const MANY: usize = 6000;
    let node = node_with_a_closed_port(context, &["--flow-rate", "1000000"])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let monitor = Monitor::start(&node, &[])?;
    let agent = Pid::from_raw(node.with_agent(|agent| Ok(agent.process().pid()))?.try_into()?);
    kill(agent, Signal::SIGSTOP)?;
    let burst = burst(&pod, MANY);
    kill(agent, Signal::SIGCONT)?;
    burst?;
    wait::until_true("every connection", SOON, || {
        let flows = node.status()?.flows;
        let lost = usize::try_from(flows.ring_full + flows.rate_limit + flows.slow_listener)?;
        Ok(monitor.heard().len() + lost == MANY && flows.ring_full > 0)
    })
    .with_context(|| {
        format!("{:?}, {} told", node.status().map(|status| status.flows), monitor.heard().len())
    })
}

fn sample(context: &Context) -> Result<()> {
    const MANY: usize = 500;
    let node = node_with_a_closed_port(context, &["--flow-sample", "10"])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let monitor = Monitor::start(&node, &[])?;
    burst(&pod, MANY)?;
    // Each CPU samples independently, and may have some left over.
    let cpus = std::thread::available_parallelism()?.get();
    let least = (MANY / 10).saturating_sub(cpus).max(1);
    wait::until_true("some connections", SOON, || Ok(monitor.heard().len() >= least))?;
    ensure!(monitor.heard().len() <= MANY / 10, "{:#?}", monitor.heard());
    ensure!(node.status()?.flows.rate_limit == 0);
    Ok(())
}
