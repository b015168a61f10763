//! Many pods, many changes, many connections, both concurrent and sequential. `cargo xtask test --load` uses the numbers of a
//! large node and takes minutes; without it they are small.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use redirect_tests::bench::scale::resident;
use redirect_tests::load::{self, Target};
use redirect_tests::wait::patient;
use redirect_tests::{Families, Netns, Node, NodeOptions, Stack};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::context::{Context, for_every_stack, trial};
use crate::limits::{at_once, timed};

/// The deadline for an answer.
const ANSWER: Duration = Duration::from_secs(20);

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "load::open_connections", open_connections);
    trials.extend(for_every_stack(context, "load::connections_a_second", connections_a_second));
    trials.push(trial(context, "load::pods_come_and_go", pods_come_and_go));
    trials
}

/// Whether tests use the load of a large node (`--load`).
pub(crate) fn is_full() -> bool {
    std::env::var("REDIRECT_LOAD").is_ok_and(|value| value == "full")
}

/// A hundred ADDs and DELs per second on a node that already has many pods and connects all the time.
fn pods_come_and_go(context: &Context) -> Result<()> {
    /// The pause between changes.
    const PACE: Duration = Duration::from_millis(10);
    const WORKERS: usize = 4;
    let (pods, changes) = if is_full() { (1000, 6000) } else { (30, 200) };
    let agent_arguments = vec!["--max-pods".to_owned(), "1100".to_owned()];
    let node = Node::with(&context.session()?, NodeOptions { agent_arguments, ..NodeOptions::default() })?;
    let memory = || -> Result<u64> { Ok(node.with_agent(|agent| resident(agent.process().pid()))? / 1024) };
    let empty = memory()?;
    let staying = at_once(WORKERS, (0..pods).collect(), |_| node.enrolled("pod", Families::Dual))?;
    let full = memory()?;
    let other = node.plain("other", Families::Dual)?;
    let changing = at_once(WORKERS, (0..WORKERS).collect(), |_| node.plain("changing", Families::Dual))?;

    let stacks = Stack::ALL;
    let servers = stacks.iter().map(|&stack| other.listen(stack)).collect::<Result<Vec<_>>>()?;
    let targets = stacks.iter().zip(&servers).map(|(&stack, server)| {
        Ok(Target { from: staying[0].netns(), stack, to: other.endpoint(stack.family(), server.port())? })
    });
    let targets = targets.collect::<Result<Vec<_>>>()?;
    let next = AtomicUsize::new(0);
    let mut times = Vec::new();
    let start = Instant::now();
    let tally = load::during(&targets, Duration::from_secs(10), || {
        let change = |pod: &redirect_tests::Pod| -> Result<Vec<Duration>> {
            let mut times = Vec::new();
            let mut enrolled = false;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                // An even number of changes leaves the pod in its original state.
                if number >= changes && !enrolled {
                    return Ok(times);
                }
                let due = start + PACE * number as u32;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                times.push(timed(|| if enrolled { pod.unenroll() } else { pod.enroll() })?);
                enrolled = !enrolled;
            }
        };
        times = at_once(WORKERS, changing.iter().collect(), change)?.into_iter().flatten().collect();
        Ok(())
    })?;
    let took = start.elapsed();
    times.sort_unstable();
    println!(
        "load::pods_come_and_go: beside {pods} pods {} changes in {took:?} ({:.0} a second), median {:?}, slowest {:?}; {tally}; \
         the agent's memory {empty} KiB without pods, {full} KiB with {pods}",
        times.len(),
        times.len() as f64 / took.as_secs_f64(),
        times[times.len() / 2],
        times[times.len() - 1],
    );
    ensure!(tally.failed.is_empty() && tally.bypassed == 0, "{tally}: {:?}", tally.failed.first());
    let status = node.status()?;
    for map in status.maps.iter().filter(|map| ["PODS", "POD_IPV4", "POD_IPV6"].contains(&map.name.as_str()))
    {
        ensure!(map.entries == pods, "{} has {} entries for {pods} pods", map.name, map.entries);
    }
    ensure!(status.proxies.iter().any(|proxy| proxy.acknowledged == pods), "{:#?}", status.proxies);
    at_once(WORKERS, staying.into_iter().chain(changing).collect(), |mut pod| pod.delete())?;
    Ok(())
}

/// Connections through the proxy that are all open at the same time.
fn open_connections(context: &Context, stack: Stack) -> Result<()> {
    /// Each has as many connections as there are ports.
    const LISTENERS: usize = 4;
    let connections = if is_full() { 50_000 } else { 1_000 };
    // Both ends are in this process, and as many are in the proxy, which inherits the limit.
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = limit.max(2 * connections as u64 + 2000);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).with_context(|| {
        format!("this machine does not let a process have {limit} open files; one of --vm 6.12 does")
    })?;

    let node = Node::start(&context.session()?)?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    client.netns().set_sysctl("net.ipv4.ip_local_port_range", "1024 65000")?;
    let any = SocketAddr::new(server.address(stack.family())?, 0);
    let listeners = server.netns().run(|| {
        (0..LISTENERS).map(|_| std::net::TcpListener::bind(any)).collect::<std::io::Result<Vec<_>>>()
    })??;
    let to: Vec<_> = listeners.iter().map(|listener| Ok(listener.local_addr()?)).collect::<Result<_>>()?;
    let to: Vec<_> = to.into_iter().map(|address| stack.spell(address)).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let serving = scope.spawn(|| echo(server.netns(), listeners, &over));
        let called = client.netns().run(|| call(&to, connections));
        over.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow!("the server panicked"))??;
        let (opened, exchanged) = called?.with_context(|| gave_up(client.netns()))?;
        println!(
            "load::open_connections::{}: {connections} open in {opened:?} ({:.0} a second), a byte to and fro on each in \
             {exchanged:?}",
            stack.label(),
            connections as f64 / opened.as_secs_f64(),
        );
        Ok(())
    })
}

/// Short connections, as fast as they can be made.
fn connections_a_second(context: &Context, stack: Stack) -> Result<()> {
    let connections = if is_full() { 300_000 } else { 3_000 };
    let node = context.node()?;
    let (client, server) = (node.enrolled("client", Families::Dual)?, node.plain("server", Families::Dual)?);
    let any = SocketAddr::new(server.address(stack.family())?, 0);
    let listener = server.netns().run(|| std::net::TcpListener::bind(any))??;
    let to = stack.spell(listener.local_addr()?);
    let over = AtomicBool::new(false);
    let (direct, took) = thread::scope(|scope| {
        let serving = scope.spawn(|| tell_ports(server.netns(), listener, &over));
        let called = client.netns().run(|| call_in_turn(to, connections));
        over.store(true, Ordering::Relaxed);
        serving.join().map_err(|_| anyhow!("the server panicked"))??;
        called?
    })?;
    println!(
        "load::connections_a_second::{}: {connections} connections succeeded in {took:?} ({:.0} a second), {direct} bypassed",
        stack.label(),
        connections as f64 / took.as_secs_f64(),
    );
    ensure!(direct == 0, "{direct} of {connections} bypassed the proxy");
    Ok(())
}

/// Tells each client its port, and closes first, as servers of short connections do.
fn tell_ports(netns: &Netns, listener: std::net::TcpListener, over: &AtomicBool) -> Result<()> {
    serve(netns, vec![listener], over, |mut stream, peer| async move {
        let _ = stream.write_all(&peer.port().to_be_bytes()).await;
    })
}

/// Connects many times, a few at once. Returns how many came from the client's own port, and the duration.
fn call_in_turn(to: SocketAddr, connections: usize) -> Result<(usize, Duration)> {
    const AT_ONCE: usize = 32;
    Builder::new_current_thread().enable_all().build()?.block_on(async {
        let start = Instant::now();
        let next = Arc::new(AtomicUsize::new(0));
        let mut calling = JoinSet::new();
        for _ in 0..AT_ONCE {
            let next = next.clone();
            calling.spawn(async move {
                let mut direct = 0;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= connections {
                        return anyhow::Ok(direct);
                    }
                    let ports = tokio::time::timeout(patient(ANSWER), ask_port(to));
                    let ports = ports.await.context("no answer").flatten();
                    let (own, seen) = ports.with_context(|| format!("connection {number}"))?;
                    direct += usize::from(own == seen);
                }
            });
        }
        let mut direct = 0;
        while let Some(called) = calling.join_next().await {
            direct += called??;
        }
        Ok((direct, start.elapsed()))
    })
}

/// The client's own port, and the one that the server sees.
async fn ask_port(to: SocketAddr) -> Result<(u16, u16)> {
    let mut stream = TcpStream::connect(to).await?;
    let own = stream.local_addr()?.port();
    let mut seen = Vec::new();
    stream.read_to_end(&mut seen).await?;
    let seen = seen.as_slice().try_into().with_context(|| format!("the server said {seen:?}"))?;
    Ok((own, u16::from_be_bytes(seen)))
}

/// How many connections TCP gave up, by reason.
fn gave_up(netns: &Netns) -> String {
    const REASONS: [&str; 5] =
        ["TCPAbortOnData", "TCPAbortOnClose", "TCPAbortOnMemory", "TCPAbortOnTimeout", "TCPAbortFailed"];
    let count = |reason| format!("{reason} {:?}", netns.statistic("netstat", "TcpExt", reason).ok());
    REASONS.map(count).join(", ")
}

/// Echoes until it is over.
fn echo(netns: &Netns, listeners: Vec<std::net::TcpListener>, over: &AtomicBool) -> Result<()> {
    serve(netns, listeners, over, |mut stream, _| async move {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
}

/// Serves clients until it is over.
fn serve<T: Future<Output = ()> + Send + 'static>(
    netns: &Netns,
    listeners: Vec<std::net::TcpListener>,
    over: &AtomicBool,
    each: impl Fn(TcpStream, SocketAddr) -> T + Copy + Send + Sync + 'static,
) -> Result<()> {
    netns.run(|| {
        Builder::new_current_thread().enable_all().build()?.block_on(async {
            let mut accepting = JoinSet::new();
            for listener in listeners {
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                accepting.spawn(async move {
                    loop {
                        let (stream, peer) = listener.accept().await?;
                        tokio::spawn(each(stream, peer));
                    }
                    #[expect(unreachable_code, reason = "the type of the task")]
                    std::io::Result::Ok(())
                });
            }
            while !over.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        })
    })?
}

/// Opens the connections and uses each; then uses each again. Returns the durations.
fn call(to: &[SocketAddr], connections: usize) -> Result<(Duration, Duration)> {
    const AT_ONCE: usize = 64;
    Builder::new_current_thread().enable_all().build()?.block_on(async {
        let start = Instant::now();
        let (mut opening, mut open) = (JoinSet::new(), Vec::new());
        for number in 0..connections {
            if opening.len() >= AT_ONCE {
                open.push(opening.join_next().await.context("none")???);
            }
            let to = to[number % to.len()];
            opening.spawn(async move {
                let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
                let mut stream = socket.connect(to).await.with_context(|| format!("connection {number}"))?;
                exchange(&mut stream).await.with_context(|| format!("connection {number}"))?;
                anyhow::Ok((number, Instant::now(), stream))
            });
        }
        while let Some(opened) = opening.join_next().await {
            open.push(opened??);
        }
        let opened = start.elapsed();
        let start = Instant::now();
        for (number, since, stream) in &mut open {
            let exchanged = exchange(stream).await;
            exchanged.with_context(|| format!("connection {number}, after {:?}", since.elapsed()))?;
        }
        ensure!(open.len() == connections, "{} are open", open.len());
        Ok((opened, start.elapsed()))
    })
}

async fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x").await?;
    let mut answer = [0];
    let read = stream.read_exact(&mut answer);
    tokio::time::timeout(patient(ANSWER), read).await.context("no answer")??;
    Ok(())
}
