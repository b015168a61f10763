//! Successive connections and DNS queries of a pod while something happens, and their results.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{SocketAddr, UdpSocket};
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use hickory_proto::rr::RecordType;

use crate::dns::{PORT, check_answer, question};
use crate::pod::Pod;
use crate::stack::Stack;
use crate::wait::SOON;

/// A connection that takes longer was held and needed a retransmission.
const SLOW: Duration = Duration::from_millis(900);

/// The pause between two connections of the slower threads.
const PACE: Duration = Duration::from_millis(50);

/// The results of connections and queries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Connections that were tried.
    pub connections: u64,
    /// Questions that were asked.
    pub questions: u64,
    /// Those that needed a retransmission.
    pub slow: u64,
    /// Lines exchanged on long-lived connections.
    pub lines: u64,
    /// Those that failed, and why.
    pub failed: Vec<String>,
    /// Connections that bypassed the proxy.
    pub bypassed: Vec<String>,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.questions += other.questions;
        self.slow += other.slow;
        self.lines += other.lines;
        self.failed.extend(other.failed);
        self.bypassed.extend(other.bypassed);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connections, questions, slow, lines, failed, bypassed } = self;
        write!(
            f,
            "{connections} connections, {questions} questions, {lines} lines on open connections; {slow} slow, {} failed, \
             {} bypassed",
            failed.len(),
            bypassed.len()
        )
    }
}

impl Tally {
    /// Fails if anything failed or bypassed the proxy.
    pub fn check(&self) -> Result<()> {
        ensure!(self.failed.is_empty() && self.bypassed.is_empty(), "{self}: {self:?}");
        ensure!(self.connections > 0 && self.questions > 0 && self.lines > 0, "no load: {self}");
        Ok(())
    }
}

/// Runs `act` while the enrolled `pod` and `other`, which is not enrolled, connect to each other: at intervals, at full rate,
/// and over long-lived connections; and while the pod sends DNS queries.
pub fn during<T>(
    pod: &Pod,
    other: &Pod,
    stack: Stack,
    act: impl FnOnce() -> Result<T>,
) -> Result<(Tally, T)> {
    let (inside, outside) = (pod.listen(stack)?, other.listen(stack)?);
    let outward = other.endpoint(stack.family(), outside.port())?;
    let inward = pod.endpoint(stack.family(), inside.port())?;
    let server = SocketAddr::new(pod.node().gateway(stack.family()), PORT);
    let dns = pod.node().dns()?;
    let (stop, begun) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, begun) = (&stop, &begun);
    let mut tally = Tally::default();
    let outcome = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (client, to) in [(pod, outward), (other, inward)] {
            for pace in [Some(PACE), None] {
                threads.push(scope.spawn(move || connect(client, stack, to, pace, stop, begun)));
            }
            threads.push(scope.spawn(move || talk(client, stack, to, stop, begun)));
        }
        threads.push(scope.spawn(move || ask(pod, stack, server, stop, begun)));
        let all = threads.len() as u64;
        let outcome = crate::wait::until_true("load", 2 * SOON, || Ok(begun.load(Ordering::SeqCst) >= all))
            .and_then(|()| act());
        stop.store(true, Ordering::SeqCst);
        for thread in threads {
            tally += thread.join().map_err(|_| anyhow!("a client panicked"))?;
        }
        outcome
    });
    // Every query at the server must be the proxy's; its log is written with a delay.
    let uid = &pod.identity().uid;
    let unlogged = || -> Result<Vec<String>> {
        let logged = pod.node().access_log().questions()?;
        let logged: BTreeSet<String> =
            logged.into_iter().filter(|entry| entry.uid == *uid).filter_map(|entry| entry.name).collect();
        let heard = dns.heard().into_iter().map(|heard| heard.name);
        Ok(heard.filter(|name| !logged.contains(name)).collect())
    };
    let _ = crate::wait::until_true("logged questions", SOON, || Ok(unlogged()?.is_empty()));
    tally.bypassed.extend(unlogged()?);
    Ok((tally.clone(), outcome.with_context(|| format!("{tally:?}"))?))
}

fn connect(
    client: &Pod,
    stack: Stack,
    to: SocketAddr,
    pace: Option<Duration>,
    stop: &AtomicBool,
    begun: &AtomicU64,
) -> Tally {
    let mut tally = Tally::default();
    while !stop.load(Ordering::SeqCst) {
        let start = Instant::now();
        tally.connections += 1;
        match client.connect(stack, to) {
            Ok(connection) if connection.is_direct() => {
                tally.bypassed.push(format!("{:?}", connection.heard));
            }
            Ok(_) => {}
            Err(error) => tally.failed.push(format!("after {:?}: {error:#}", start.elapsed())),
        }
        tally.slow += u64::from(start.elapsed() > crate::wait::patient(SLOW));
        if tally.connections == 1 {
            begun.fetch_add(1, Ordering::SeqCst);
        }
        if let Some(pace) = pace {
            thread::sleep(pace.saturating_sub(start.elapsed()));
        }
    }
    tally
}

fn talk(client: &Pod, stack: Stack, to: SocketAddr, stop: &AtomicBool, begun: &AtomicU64) -> Tally {
    let mut tally = Tally::default();
    let result = (|| -> Result<()> {
        let mut connection = client.connect(stack, to)?;
        begun.fetch_add(1, Ordering::SeqCst);
        while !stop.load(Ordering::SeqCst) {
            connection.exchange(&format!("line {}", tally.lines))?;
            tally.lines += 1;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    })();
    tally.failed.extend(result.err().map(|error| format!("open connection: {error:#}")));
    tally
}

fn ask(pod: &Pod, stack: Stack, server: SocketAddr, stop: &AtomicBool, begun: &AtomicU64) -> Tally {
    let mut tally = Tally::default();
    while !stop.load(Ordering::SeqCst) {
        tally.questions += 1;
        let asked = (|| -> Result<()> {
            let socket = pod.netns().run(|| -> std::io::Result<UdpSocket> {
                let socket = socket2::Socket::new(stack.domain(), socket2::Type::DGRAM, None)?;
                socket.connect(&stack.spell(server).into())?;
                Ok(socket.into())
            })??;
            socket.set_read_timeout(Some(crate::wait::patient(SOON)))?;
            let question = question(&format!("load-{}.test.", tally.questions), RecordType::A)?;
            socket.send(&question)?;
            let mut buffer = [0; 1024];
            let length = socket.recv(&mut buffer)?;
            check_answer(&question, &buffer[..length])?;
            ensure!(socket.peer_addr()? == stack.spell(server), "getpeername says {}", socket.peer_addr()?);
            Ok(())
        })();
        tally.failed.extend(asked.err().map(|error| format!("question: {error:#}")));
        if tally.questions == 1 {
            begun.fetch_add(1, Ordering::SeqCst);
        }
        thread::sleep(PACE / 2);
    }
    tally
}
