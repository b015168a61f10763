//! Spoofed SYNs fill the queues of the proxy's or the application's listener. Clients still connect, through SYN cookies.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::node::NodeOptions;
use redirect_tests::{Connection, Direction, Families, Netns, Node, Pod, Stack};

use crate::context::{Context, for_every_stack};
use crate::exclusions::{chosen, empty_node, passes_by, run, single};
use crate::probes::{Probing, is_exempt, probing};
use crate::{inbound, raw};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "syn_flood::clients_get_in", clients_get_in);
    trials.extend(for_every_stack(context, "syn_flood::excluded_client", excluded_client));
    trials.extend(for_every_stack(context, "syn_flood::probe", probe));
    trials
}

/// The maximum number of spoofed SYNs, however long the clients take.
const SPOOFED: u64 = 20_000;
const CLIENTS: usize = 100;

/// Sources that do not exist: no host completes the handshake, or resets it.
fn spoofed(family: Family, number: u64) -> IpAddr {
    let [.., c, d] = number.to_be_bytes();
    match family {
        Family::Ipv4 => [198, 18, c, d].into(),
        Family::Ipv6 => [0x2001, 0x0db8, 0, 0, 0, 0, u16::from(c), u16::from(d)].into(),
    }
}

fn spoofed_network(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "198.18.0.0/16",
        Family::Ipv6 => "2001:db8::/64",
    }
}

fn clients_get_in(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with(&context.session()?, NodeOptions { proxy: false, ..NodeOptions::default() })?;
    let outside = Netns::new("outside")?;
    node.attach(&outside, "outside")?;
    // Without a route to the sources, a pod does not answer them.
    for family in Family::ALL {
        let (network, via) = (spoofed_network(family), node.attached(family));
        node.netns().ip(&format!("route add {network} via {via}"))?;
    }
    let pod = node.plain("pod", Families::Dual)?;
    // Set before the proxy listens: short queues, and cookies once these are full.
    for (name, value) in
        [("net.core.somaxconn", "8"), ("net.ipv4.tcp_max_syn_backlog", "8"), ("net.ipv4.tcp_syncookies", "1")]
    {
        pod.netns().set_sysctl(name, value)?;
        node.netns().set_sysctl(name, value)?;
    }
    node.start_proxy()?;
    pod.enroll()?;
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    drop(Connection::open(&outside, stack, to)?);

    let cookies = |name| pod.proxy_netns().statistic("netstat", "TcpExt", name);
    let (sent_before, used_before) = (cookies("SyncookiesSent")?, cookies("SyncookiesRecv")?);
    let (sent, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let began = Instant::now();
    let times = thread::scope(|scope| {
        let flood = scope.spawn(|| outside.run(|| flood(stack.family(), to, &sent, &stop)));
        while sent.load(Ordering::Relaxed) < 500 && !flood.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        let times = (0..CLIENTS).map(|_| one_client(&outside, stack, to)).collect::<Result<Vec<_>>>();
        stop.store(true, Ordering::Relaxed);
        flood.join().map_err(|_| anyhow!("the flood panicked"))???;
        times
    })?;
    let elapsed = began.elapsed();
    let (given, used) = (cookies("SyncookiesSent")? - sent_before, cookies("SyncookiesRecv")? - used_before);
    let sent = sent.load(Ordering::Relaxed);
    let slowest = times.iter().max().context("clients")?;
    println!(
        "{stack}: {CLIENTS} clients within {elapsed:?} of {sent} spoofed SYNs ({:.0} a second), slowest {slowest:?}; \
         cookies given {given}, used {used}",
        sent as f64 / elapsed.as_secs_f64()
    );
    ensure!(used >= CLIENTS as u64 / 2, "only {used} connections by cookie: the queues were not full");
    let proxied = pod.proxied(Direction::Inbound, to)?;
    ensure!(proxied.len() == 1 + CLIENTS, "{} connections came to the proxy", proxied.len());
    ensure!(listening.accepted().len() == 1 + CLIENTS, "{} came on", listening.accepted().len());
    Ok(())
}

/// Makes every listener answer with cookies, as under a flood.
fn force_cookies(netns: &Netns) -> Result<()> {
    netns.set_sysctl("net.ipv4.tcp_syncookies", "2")
}

/// Exempt connections reach the application although its listener keeps no state of their handshakes. In the second round, the
/// proxy's listener has sent cookies as well, and would accept theirs.
fn exempt_with_cookies(
    pod: &Pod,
    stack: Stack,
    other: &Pod,
    mut exempt: impl FnMut() -> Result<()>,
) -> Result<()> {
    force_cookies(pod.netns())?;
    force_cookies(pod.node().netns())?;
    let used = || pod.netns().statistic("netstat", "TcpExt", "SyncookiesRecv");
    for round in 1..=2 {
        let before = used()?;
        exempt().with_context(|| format!("round {round}"))?;
        ensure!(used()? > before, "round {round}: no cookie was used");
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

fn excluded_client(context: &Context, stack: Stack) -> Result<()> {
    let node = empty_node(context)?;
    run(&node, &["--exclude-inbound-networks".into(), single(&node.to_choose(1))])?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let (excluded, other) = (chosen(&node, "excluded", 1)?, chosen(&node, "other", 2)?);
    let listening = pod.listen(stack)?;
    let to = (pod.address(stack.family())?, listening.port());
    exempt_with_cookies(&pod, stack, &other, || {
        passes_by(excluded.netns(), &listening, to, stack, &pod, redirect_ebpf::Direction::Inbound)
    })
}

fn probe(context: &Context, stack: Stack) -> Result<()> {
    let Probing { node, kubelet } = probing(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    exempt_with_cookies(&pod, stack, &other, || is_exempt(&kubelet, node.netns(), &pod, stack).map(drop))
}

fn one_client(outside: &Netns, stack: Stack, to: SocketAddr) -> Result<Duration> {
    // Spreads the clients over the flood.
    thread::sleep(Duration::from_millis(10));
    let began = Instant::now();
    let mut connection = Connection::open(outside, stack, to)?;
    connection.exchange("hello")?;
    ensure!(connection.heard.peer.port() != connection.local_name.port(), "{:?}", connection.heard);
    Ok(began.elapsed())
}

fn flood(family: Family, to: SocketAddr, sent: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let socket = raw::socket(to.ip())?;
    let destination = SocketAddr::new(to.ip(), 0).into();
    for number in 0..SPOOFED {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let port = 1024 + (number % 60_000) as u16;
        let syn = raw::syn(spoofed(family, number), port, to, number as u32);
        socket.send_to(&syn, &destination)?;
        sent.fetch_add(1, Ordering::Relaxed);
        if number % 20 == 0 {
            // About 20,000 per second: a flood, but not one that overloads the machine.
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}
