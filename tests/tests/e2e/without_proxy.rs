//! Connections while no proxy listens: held or refused, and never plaintext past the proxy. The tunnels of other proxies are no
//! exception: the embedded proxy has no listener for them, so another process in its cgroup stands in.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Verdict;
use redirect_ebpf::constants::PORT_TUNNEL;
use redirect_ebpf::count::{self, Reason};
use redirect_tests::connection::dial;
use redirect_tests::load::{self, Failure, Target};
use redirect_tests::wait;
use redirect_tests::{Connection, Direction, Families, Node, Pod, Server, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};
use crate::load::is_full;
use crate::reports::counted;
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for direction in [Direction::Outbound, Direction::Inbound] {
        let word = label(direction);
        let hold = move |context: &Context, families: Families, stack: Stack| {
            held(context, families, stack, direction)
        };
        trials.extend(for_every_kind(context, &format!("without_proxy::{word}_is_held"), hold));
        let refuse = move |context: &Context, families: Families, stack: Stack| {
            refused(context, families, stack, direction)
        };
        trials.extend(for_every_kind(context, &format!("without_proxy::{word}_is_refused"), refuse));
    }
    trials.extend(for_every_kind(context, "without_proxy::tunnel_is_held", tunnel_held));
    trials.extend(for_every_kind(context, "without_proxy::tunnel_is_refused", tunnel_refused));
    trials.extend(for_every_stack(context, "without_proxy::tunnel_while_the_proxy_is_killed", tunnel_killed));
    trials
}

/// How long there is no proxy.
const DOWN: Duration = Duration::from_millis(500);

/// Longer than any attempt may take.
const LIMIT: Duration = Duration::from_secs(15);

fn label(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

/// An enrolled pod without its proxy, and a server at the other end of connections in one direction.
struct Scene {
    node: Arc<Node>,
    pod: Pod,
    other: Pod,
    listening: Server,
    to: SocketAddr,
    direction: Direction,
    stack: Stack,
}

impl Scene {
    fn new(
        context: &Context,
        families: Families,
        stack: Stack,
        direction: Direction,
        arguments: &[&str],
    ) -> Result<Self> {
        let node = Node::with_arguments(&context.session()?, arguments)?;
        let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
        let server = if direction == Direction::Outbound { &other } else { &pod };
        let listening = server.listen(stack)?;
        let to = server.endpoint(stack.family(), listening.port())?;
        node.kill_proxy()?;
        Ok(Self { node, pod, other, listening, to, direction, stack })
    }

    fn client(&self) -> &Pod {
        if self.direction == Direction::Outbound { &self.pod } else { &self.other }
    }

    fn dropped(&self) -> Result<u64> {
        let direction = match self.direction {
            Direction::Outbound => count::Direction::Outbound,
            Direction::Inbound => count::Direction::Inbound,
        };
        let status = self.node.status()?;
        Ok(counted(&status, self.stack.family(), direction, Verdict::Dropped, Reason::NoListener))
    }

    /// With a proxy again.
    fn works(&self) -> Result<()> {
        match self.direction {
            Direction::Outbound => outbound::passes_the_proxy_once(&self.pod, &self.other, self.stack),
            Direction::Inbound => inbound::passes_the_proxy_once(self.other.netns(), &self.pod, self.stack),
        }
    }
}

fn held(context: &Context, families: Families, stack: Stack, direction: Direction) -> Result<()> {
    let scene = Scene::new(context, families, stack, direction, &["--without-proxy", "hold"])?;
    let connection = thread::scope(|scope| {
        let netns = scene.client().netns();
        let attempt = scope.spawn(|| Connection::open_within(netns, stack, scene.to, LIMIT));
        thread::sleep(DOWN);
        ensure!(!attempt.is_finished(), "an answer without a proxy: {:?}", attempt.join());
        ensure!(scene.dropped()? >= 1, "not counted: {:#?}", scene.node.status()?.counters);
        scene.node.start_proxy()?;
        attempt.join().map_err(|_| anyhow!("the client panicked"))?
    })?;
    ensure!(scene.listening.accepted() == [connection.heard], "{:?}", scene.listening.accepted());
    scene.pod.proxied_times(direction, scene.to, 1)?;
    scene.works()
}

fn refused(context: &Context, families: Families, stack: Stack, direction: Direction) -> Result<()> {
    const ATTEMPTS: u64 = 3;
    let scene = Scene::new(context, families, stack, direction, &["--without-proxy", "refuse"])?;
    for attempt in 1..=ATTEMPTS {
        let start = Instant::now();
        let outcome = scene.client().netns().run(|| dial(stack, scene.to, Duration::from_secs(5)))?;
        let error = outcome.err().context("an answer without a proxy")?;
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "attempt {attempt}: {error}");
        ensure!(
            start.elapsed() < wait::patient(Duration::from_millis(500)),
            "only after {:?}",
            start.elapsed()
        );
        let dropped = scene.dropped()?;
        ensure!(dropped == attempt, "counted {dropped}: {:#?}", scene.node.status()?.counters);
    }
    ensure!(scene.listening.accepted().is_empty(), "past the proxy: {:?}", scene.listening.accepted());

    scene.node.start_proxy()?;
    scene.works()?;
    // A closed port is refused as always.
    let (client, server) = match direction {
        Direction::Outbound => (&scene.pod, &scene.other),
        Direction::Inbound => (&scene.other, &scene.pod),
    };
    let error = client.connect(stack, server.endpoint(stack.family(), 9)?).err().context("a closed port")?;
    ensure!(outbound::is_refusal(client, &error), "{error:#}");
    Ok(())
}

/// An enrolled pod without its proxy, and another proxy's tunnel to it.
struct Tunnel {
    node: Arc<Node>,
    pod: Pod,
    peer: Pod,
    to: SocketAddr,
    stack: Stack,
}

impl Tunnel {
    fn new(context: &Context, families: Families, stack: Stack, setting: &str) -> Result<Self> {
        let node = Node::with_arguments(&context.session()?, &["--without-proxy", setting])?;
        let (pod, peer) = (node.enrolled("pod", families)?, node.plain("peer", Families::Dual)?);
        let to = pod.endpoint(stack.family(), PORT_TUNNEL)?;
        node.kill_proxy()?;
        Ok(Self { node, pod, peer, to, stack })
    }

    fn dropped(&self) -> Result<u64> {
        let status = self.node.status()?;
        let (family, direction) = (self.stack.family(), count::Direction::Inbound);
        Ok(counted(&status, family, direction, Verdict::Dropped, Reason::NoListener))
    }

    /// Checks that the proxy's listener has the connection with its dialed destination.
    fn reached(&self, connection: &Connection) -> Result<()> {
        ensure!(connection.heard.local == self.to, "{:?}", connection.heard);
        ensure!(
            connection.heard.peer.ip() == self.peer.address(self.stack.family())?,
            "{:?}",
            connection.heard
        );
        Ok(())
    }
}

fn tunnel_held(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let tunnel = Tunnel::new(context, families, stack, "hold")?;
    let (connection, _listener) = thread::scope(|scope| {
        let (netns, to) = (tunnel.peer.netns(), tunnel.to);
        let attempt = scope.spawn(move || Connection::open_within(netns, stack, to, LIMIT));
        thread::sleep(DOWN);
        ensure!(!attempt.is_finished(), "an answer without a proxy: {:?}", attempt.join());
        ensure!(tunnel.dropped()? >= 1, "not counted: {:#?}", tunnel.node.status()?.counters);
        let listener = tunnel.pod.listener_of_proxy(PORT_TUNNEL)?;
        Ok((attempt.join().map_err(|_| anyhow!("the client panicked"))??, listener))
    })?;
    tunnel.reached(&connection)
}

fn tunnel_refused(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let tunnel = Tunnel::new(context, families, stack, "refuse")?;
    for attempt in 1..=3 {
        let start = Instant::now();
        let outcome = tunnel.peer.netns().run(|| dial(stack, tunnel.to, LIMIT))?;
        let error = outcome.err().context("an answer without a proxy")?;
        ensure!(error.kind() == ErrorKind::ConnectionRefused, "attempt {attempt}: {error}");
        ensure!(start.elapsed() < wait::patient(DOWN), "only after {:?}", start.elapsed());
        ensure!(tunnel.dropped()? == attempt, "{:#?}", tunnel.node.status()?.counters);
    }
    let _listener = tunnel.pod.listener_of_proxy(PORT_TUNNEL)?;
    tunnel.reached(&Connection::open_within(tunnel.peer.netns(), stack, tunnel.to, LIMIT)?)
}

/// Only connections that a proxy had when it was killed fail.
fn tunnel_killed(context: &Context, stack: Stack) -> Result<()> {
    let kills = if is_full() { 10 } else { 2 };
    let tunnel = Tunnel::new(context, Families::Dual, stack, "hold")?;
    let mut listener = Some(tunnel.pod.listener_of_proxy(PORT_TUNNEL)?);
    let mut killed = Vec::new();
    let target = Target { from: tunnel.peer.netns(), stack, to: tunnel.to };
    let tally = load::during(&[target; 2], LIMIT, || {
        for _ in 0..kills {
            thread::sleep(DOWN);
            let mut old = listener.take().context("a listener")?;
            let before = Instant::now();
            old.kill()?;
            killed.push((before, Instant::now()));
            thread::sleep(DOWN);
            listener = Some(tunnel.pod.listener_of_proxy(PORT_TUNNEL)?);
        }
        thread::sleep(DOWN);
        Ok(())
    })?;
    println!("{kills} kills, {stack}: {tally}");
    let in_flight =
        |failure: &&Failure| killed.iter().any(|(from, to)| failure.start <= *to && failure.end >= *from);
    let others: Vec<_> = tally.failed.iter().filter(|failure| !in_flight(failure)).collect();
    ensure!(others.is_empty(), "{tally}: {others:#?}");
    ensure!(tally.succeeded() > 10 * kills, "hardly any load: {tally}");
    Ok(())
}
