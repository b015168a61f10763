//! Networks and ports that the agent is configured not to capture.

use std::net::IpAddr;
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::count::Reason;
use redirect_ebpf::{Direction, Family, Verdict};
use redirect_tests::{Connection, Families, Netns, Node, NodeOptions, Pod, Server, Stack, wait};

use crate::context::{Context, for_every_kind, for_every_stack, trial};
use crate::reports::counted;
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "exclusions::outbound_network", outbound_network);
    trials.extend(for_every_kind(context, "exclusions::inbound_network", inbound_network));
    trials.extend(for_every_kind(context, "exclusions::outbound_port", outbound_port));
    trials.extend(for_every_kind(context, "exclusions::inbound_port", inbound_port));
    trials.extend(for_every_stack(context, "exclusions::nested_networks", nested_networks));
    trials.extend(for_every_stack(context, "exclusions::everything_of_a_family", everything_of_a_family));
    trials.push(trial(context, "exclusions::bad_values_are_told", bad_values));
    trials.push(trial(context, "exclusions::full_map_is_told", full_map));
    trials.push(trial(context, "exclusions::map_that_is_just_full", just_full));
    trials
}

/// A node without an agent yet, so that its addresses can be among the agent's arguments.
pub(crate) fn empty_node(context: &Context) -> Result<Arc<Node>> {
    Node::with(&context.session()?, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })
}

pub(crate) fn run(node: &Node, arguments: &[String]) -> Result<()> {
    node.start_agent(arguments)?;
    node.start_proxy()
}

/// Networks of single addresses: /32 and /128.
pub(crate) fn single(addresses: &[IpAddr]) -> String {
    let networks = addresses.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }));
    networks.collect::<Vec<_>>().join(",")
}

pub(crate) fn chosen(node: &Arc<Node>, name: &str, number: u16) -> Result<Pod> {
    let spec = node.numbered(name, Families::Dual).with_addresses(&node.to_choose(number));
    Pod::start(node, spec.not_enrolled())
}

/// A connection that reaches its server without the proxy, and counts as excluded in `pod`.
pub(crate) fn passes_by(
    client: &Netns,
    server: &Server,
    to: (IpAddr, u16),
    stack: Stack,
    pod: &Pod,
    direction: Direction,
) -> Result<()> {
    let excluded = || -> Result<u64> {
        let status = pod.node().status()?;
        Ok(counted(&status, stack.family(), direction, Verdict::Passed, Reason::Excluded))
    };
    let (before, seen, proxied) = (excluded()?, server.accepted().len(), pod.proxied_at_all()?.len());
    let mut connection = Connection::open(client, stack, to.into())?;
    connection.exchange("hello")?;
    ensure!(connection.is_direct(), "{stack} to {to:?} went through a proxy: {:?}", connection.heard);
    ensure!(connection.peer_name == stack.spell(to.into()), "getpeername says {}", connection.peer_name);
    ensure!(server.accepted().len() == seen + 1);
    ensure!(pod.proxied_at_all()?.len() == proxied, "{:#?}", pod.proxied_at_all()?);
    ensure!(excluded()? == before + 1, "not counted: {:#?}", pod.node().status()?.counters);
    Ok(())
}

fn outbound_network(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = empty_node(context)?;
    let family = stack.family();
    run(&node, &["--exclude-outbound-networks".into(), single(&node.to_choose(1))])?;
    let client = node.enrolled("client", families)?;
    let (excluded, other) = (chosen(&node, "excluded", 1)?, chosen(&node, "other", 2)?);
    let listening = excluded.listen(stack)?;
    let to = (excluded.address(family)?, listening.port());
    passes_by(client.netns(), &listening, to, stack, &client, Direction::Outbound)?;
    // The neighbor's address, and the other direction, are not excluded.
    outbound::passes_the_proxy_once(&client, &other, stack)?;
    inbound::passes_the_proxy_once(excluded.netns(), &client, stack)
}

fn inbound_network(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = empty_node(context)?;
    let family = stack.family();
    run(&node, &["--exclude-inbound-networks".into(), single(&node.to_choose(1))])?;
    let server = node.enrolled("server", families)?;
    let (excluded, other) = (chosen(&node, "excluded", 1)?, chosen(&node, "other", 2)?);
    let listening = server.listen(stack)?;
    let to = (server.address(family)?, listening.port());
    passes_by(excluded.netns(), &listening, to, stack, &server, Direction::Inbound)?;
    inbound::passes_the_proxy_once(other.netns(), &server, stack)?;
    outbound::passes_the_proxy_once(&server, &excluded, stack)
}

const EXCLUDED: u16 = 8443;

fn outbound_port(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let arguments = ["--exclude-outbound-ports", "9999,8443"];
    let node = Node::with_arguments(&context.session()?, &arguments)?;
    let (client, other) = (node.enrolled("client", families)?, node.plain("other", Families::Dual)?);
    let listening = Server::start(other.netns(), stack, EXCLUDED, "excluded")?;
    let to = (other.address(stack.family())?, EXCLUDED);
    passes_by(client.netns(), &listening, to, stack, &client, Direction::Outbound)?;
    outbound::passes_the_proxy_once(&client, &other, stack)?;
    // Inbound, the same port is captured.
    is_captured_inbound(&other, &client, stack)
}

fn inbound_port(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--exclude-inbound-ports", "8443"])?;
    let (server, other) = (node.enrolled("server", families)?, node.plain("other", Families::Dual)?);
    let listening = Server::start(server.netns(), stack, EXCLUDED, "excluded")?;
    let to = (server.address(stack.family())?, EXCLUDED);
    passes_by(other.netns(), &listening, to, stack, &server, Direction::Inbound)?;
    inbound::passes_the_proxy_once(other.netns(), &server, stack)?;
    // Outbound, the same port is captured.
    let _elsewhere = Server::start(other.netns(), stack, EXCLUDED, "elsewhere")?;
    let to = other.endpoint(stack.family(), EXCLUDED)?;
    let connection = server.connect(stack, to)?;
    ensure!(!connection.is_direct(), "{:?}", connection.heard);
    server.proxied_times(redirect_tests::Direction::Outbound, to, 1).map(drop)
}

fn is_captured_inbound(client: &Pod, server: &Pod, stack: Stack) -> Result<()> {
    let _listening = Server::start(server.netns(), stack, EXCLUDED, "not excluded")?;
    let to = server.endpoint(stack.family(), EXCLUDED)?;
    let connection = client.connect(stack, to)?;
    ensure!(!connection.is_direct(), "{:?}", connection.heard);
    server.proxied_times(redirect_tests::Direction::Inbound, to, 1).map(drop)
}

/// Short prefixes work next to longer ones inside them, and end at their boundaries. Host bits do not matter.
fn nested_networks(context: &Context, stack: Stack) -> Result<()> {
    let node = empty_node(context)?;
    let family = stack.family();
    // Of the addresses 1 to 8 after a multiple of 256, 4 to 7 are one network.
    let ([v4, v6], [inner_v4, inner_v6]) = (node.to_choose(7), node.to_choose(5));
    let networks = format!("{v4}/30,{inner_v4}/32,{v6}/126,{inner_v6}/128,{inner_v6}/127");
    run(&node, &["--exclude-outbound-networks".into(), networks])?;
    let client = node.enrolled("client", Families::Dual)?;
    for number in [4, 5, 6, 7] {
        let server = chosen(&node, "excluded", number)?;
        let listening = server.listen(stack)?;
        let to = (server.address(family)?, listening.port());
        passes_by(client.netns(), &listening, to, stack, &client, Direction::Outbound)?;
    }
    for number in [3, 8] {
        outbound::passes_the_proxy_once(&client, &chosen(&node, "other", number)?, stack)?;
    }
    Ok(())
}

/// `0.0.0.0/0` is not `::/0`; v4-mapped addresses are IPv4.
fn everything_of_a_family(context: &Context, stack: Stack) -> Result<()> {
    for direction in [Direction::Outbound, Direction::Inbound] {
        for excluded in Family::ALL {
            let everything = if excluded == Family::Ipv4 { "0.0.0.0/0" } else { "::/0" };
            let argument = format!("--exclude-{}-networks", direction.label());
            let node = Node::with_arguments(&context.session()?, &[&argument, everything])?;
            let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
            let (client, server) =
                if direction == Direction::Outbound { (&pod, &other) } else { (&other, &pod) };
            if excluded == stack.family() {
                let listening = server.listen(stack)?;
                let to = (server.address(excluded)?, listening.port());
                passes_by(client.netns(), &listening, to, stack, &pod, direction)?;
            } else if direction == Direction::Outbound {
                outbound::passes_the_proxy_once(&pod, &other, stack)?;
            } else {
                inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
            }
        }
    }
    Ok(())
}

/// The error of an agent that refuses to start.
fn refusal(context: &Context, arguments: &[&str]) -> Result<String> {
    refused(context, arguments).map(|(_, text)| text)
}

/// The same with its exit status. An agent that starts all the same is ended, and leaves nothing.
pub(crate) fn refused(context: &Context, arguments: &[&str]) -> Result<(ExitStatus, String)> {
    let session = context.session()?;
    // Names on a bpffs can't contain dots.
    let directory = tempfile::Builder::new().prefix("refused-").tempdir_in(session.directory())?;
    let mut command = Command::new(&session.binaries().redirect);
    command.arg("agent").arg("--cgroup").arg(session.cgroup().path()).args(arguments);
    for socket in ["--socket", "--zds-socket"] {
        command.arg(socket).arg(directory.path().join(&socket[2..]));
    }
    let pins = session.pins().join(directory.path().file_name().unwrap_or_default());
    command.arg("--pin-dir").arg(&pins).arg("--state-dir").arg(directory.path().join("state"));
    let log = directory.path().join("log");
    command.stdout(std::process::Stdio::null()).stderr(std::fs::File::create(&log)?);
    let mut child = command.spawn()?;
    let mut status = None;
    let ended = wait::until_true("end of the agent", wait::SOON, || {
        status = child.try_wait()?;
        Ok(status.is_some())
    });
    if ended.is_err() {
        child.kill()?;
        child.wait()?;
    }
    // Maps are pinned before they turn out to be too small.
    if pins.exists() {
        std::fs::remove_dir_all(&pins)?;
    }
    ended?;
    let status = status.filter(|status| !status.success());
    let status = status.with_context(|| format!("{arguments:?}: the agent ended well"))?;
    Ok((status, std::fs::read_to_string(log)?))
}

fn bad_values(context: &Context) -> Result<()> {
    let networks =
        ["10.0.0.0/33", "fd00::/129", "10.0.0/8", "fd00::g/64", "somewhere", "::ffff:10.0.0.0/104"];
    let ports = ["65536", "-1", "http", "0", "80-90"];
    for direction in ["outbound", "inbound"] {
        for (kind, values) in [("networks", &networks[..]), ("ports", &ports[..])] {
            for value in values {
                let argument = format!("--exclude-{direction}-{kind}");
                let text = refusal(context, &[&format!("{argument}={value}")])?;
                for wanted in [*value, &argument] {
                    ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
                }
            }
        }
    }
    Ok(())
}

fn full_map(context: &Context) -> Result<()> {
    let cases = [
        ("--exclude-outbound-networks", "10.1.0.0/16,10.2.0.0/16,10.3.0.0/16"),
        ("--exclude-inbound-networks", "fd01::/16,fd02::/16,fd03::/16"),
        ("--exclude-outbound-ports", "1,2,3"),
    ];
    for (argument, value) in cases {
        let text = refusal(context, &[argument, value, "--max-exclusions", "2"])?;
        for wanted in ["--max-exclusions", " 2 "] {
            ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
        }
    }
    Ok(())
}

/// Ports and networks of each family have separate limits.
fn just_full(context: &Context) -> Result<()> {
    let arguments = [
        "--max-exclusions",
        "2",
        "--exclude-outbound-networks",
        "192.0.2.0/24,198.51.100.0/24,2001:db8::/32,2001:db8:1::/48",
        "--exclude-outbound-ports",
        "1,2",
    ];
    let node = Node::with_arguments(&context.session()?, &arguments)?;
    let status = node.status()?;
    for name in ["EXCLUDED_IPV4", "EXCLUDED_IPV6", "EXCLUDED_PORTS"] {
        let map = status.maps.iter().find(|map| map.name == name);
        ensure!(map.is_some_and(|map| map.entries == 2 && map.capacity == 2), "{name}: {:#?}", status.maps);
    }
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&client, &server, stack)?;
    }
    Ok(())
}
