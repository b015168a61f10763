//! Pods come and go at random, and node proxies and agents are killed at random, while every pod connects all the time. Only
//! failures that a killed proxy explains are allowed, nothing may bypass the proxy, and in the end nothing is left and the
//! agent's memory is back to normal. `cargo xtask test --soak MINUTES` sets the duration; by default the test takes seconds.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use fastrand::Rng;
use libtest_mimic::Trial;
use redirect_protocol::placement::Placement;
use redirect_tests::bench::scale::{descriptors, resident};
use redirect_tests::load::{self, Failure, Tally, Target};
use redirect_tests::{Families, Node, NodeOptions, Pod, ProxyOptions, Server, Stack, signals, wait};

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![trial(context, "soak::pods_proxies_and_agents", soak)]
}

/// The number of places, each of which has one pod after another.
const PLACES: usize = 3;

/// The pause between a client's connections.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest allowed duration of a connection: no proxy for a few seconds, and the retransmission after
/// that.
const LIMIT: Duration = Duration::from_secs(15);

/// The default duration.
const SHORT: Duration = Duration::from_secs(12);

/// How much the agent's memory may grow, in bytes: the allocator's fluctuations.
const MEMORY: u64 = 2 << 20;

fn soak(context: &Context) -> Result<()> {
    let length = match env::var("REDIRECT_SOAK") {
        Ok(minutes) => Duration::from_secs_f64(60.0 * minutes.parse::<f64>().context("REDIRECT_SOAK")?),
        Err(_) => SHORT,
    };
    let seed = match env::var("REDIRECT_SOAK_SEED") {
        Ok(seed) => seed.parse().context("REDIRECT_SOAK_SEED")?,
        Err(_) => fastrand::u64(..),
    };
    println!("soak: {length:?}, REDIRECT_SOAK_SEED={seed}");
    Soak::new(context)?.run(length, seed).with_context(|| format!("REDIRECT_SOAK_SEED={seed}"))
}

struct Soak {
    node: Arc<Node>,
    other: Pod,
    /// The faults of agents and proxies, with their times.
    faults: Mutex<Vec<Fault>>,
}

/// A fault, and the time for which it explains failures.
#[derive(Clone, Debug)]
struct Fault {
    kind: Kind,
    /// Its start.
    start: Instant,
    /// Its end, if it is over.
    end: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    AgentKilled,
    AgentStopped,
    ProxyKilled,
    ProxyReplaced,
    BothKilled,
}

impl Kind {
    const ALL: [Self; 5] =
        [Self::AgentKilled, Self::AgentStopped, Self::ProxyKilled, Self::ProxyReplaced, Self::BothKilled];

    /// Whether it resets connections that a proxy has or is about to get. A proxy of the node that ends resets connections in
    /// its accept queue, unless the host has `tcp_migrate_req`, which the agent does not set there.
    fn cuts(self, placement: Placement) -> bool {
        matches!(self, Self::ProxyKilled | Self::BothKilled)
            || (self == Self::ProxyReplaced && placement == Placement::Node)
    }
}

/// The results.
#[derive(Debug, Default)]
struct Sum {
    pods: usize,
    /// ADDs and DELs that were repeated after a fault.
    repeated: usize,
    load: Tally,
    /// Connections that a fault reset.
    cut: usize,
    /// Lines exchanged on connections that were open for a pod's whole life.
    lines: usize,
}

impl Sum {
    fn add(&mut self, other: Self) {
        let Self { pods, repeated, load, cut, lines } = other;
        self.pods += pods;
        self.repeated += repeated;
        self.load += load;
        self.cut += cut;
        self.lines += lines;
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pods, repeated, load, cut, lines } = self;
        write!(
            f,
            "{pods} pods, {repeated} ADDs and DELs repeated after faults; {load}, {cut} cut by faults; {lines} lines on open connections"
        )
    }
}

/// How large the agent is.
#[derive(Clone, Copy, Debug)]
struct Size {
    memory: u64,
    descriptors: usize,
}

impl Soak {
    fn new(context: &Context) -> Result<Self> {
        let options = NodeOptions { agent_arguments: arguments(), proxy: false, ..NodeOptions::default() };
        let node = Node::with(&context.session()?, options)?;
        start_proxy(&node)?;
        let other = node.plain("other", Families::Dual)?;
        Ok(Self { node, other, faults: Mutex::default() })
    }

    fn run(&self, length: Duration, seed: u64) -> Result<()> {
        let mut random = Rng::with_seed(seed);
        let begun = Instant::now();
        // Short-lived agents tell little about leaks, so the last third has no faults.
        let mut sum = self.phase(2 * length / 3, &mut random, true)?;
        self.nothing_is_left().context("after the faults")?;
        // A first round, so that the allocator has what it needs for this many pods.
        sum.add(self.phase(length / 12, &mut random, false)?);
        let before = self.size()?;
        sum.add(self.phase(length / 4, &mut random, false)?);
        self.nothing_is_left().context("in the end")?;
        // A connection of the command line may just be closing.
        let after = wait::until("agent without connections", wait::SOON, || {
            let size = self.size()?;
            Ok((size.descriptors <= before.descriptors).then_some(size))
        });
        let after = after.with_context(|| format!("before: {before:?}, now: {:?}", self.size()))?;
        let faults = self.faults().into_iter().fold(BTreeMap::<_, usize>::new(), |mut faults, fault| {
            *faults.entry(fault.kind).or_default() += 1;
            faults
        });
        println!(
            "soak: {:?}: {sum}; faults: {faults:?}; the agent without pods: {} then {} KiB, {} then {} descriptors",
            begun.elapsed(),
            before.memory >> 10,
            after.memory >> 10,
            before.descriptors,
            after.descriptors,
        );
        ensure!(after.memory <= before.memory + MEMORY, "the agent's memory grows: {before:?}, {after:?}");
        ensure!(sum.load.tried > sum.pods && sum.lines > 0, "no load: {sum}");
        self.node.kill_proxy()?;
        self.node.end_agent()
    }

    /// Pods come and go for this long, and are deleted in the end.
    fn phase(&self, length: Duration, random: &mut Rng, faulty: bool) -> Result<Sum> {
        let end = Instant::now() + length;
        let over = AtomicBool::new(false);
        let mut sum = Sum::default();
        thread::scope(|scope| {
            let places: Vec<_> = (0..PLACES)
                .map(|_| {
                    let (over, random) = (&over, random.fork());
                    scope.spawn(move || {
                        self.place(random, over).inspect_err(|_| over.store(true, Ordering::SeqCst))
                    })
                })
                .collect();
            let mut outcome = Ok(());
            while outcome.is_ok()
                && Instant::now() < end
                && !over.load(Ordering::SeqCst)
                && !signals::interrupted()
            {
                thread::sleep(between(random, 200, 1500).min(end.saturating_duration_since(Instant::now())));
                if faulty {
                    outcome = self.fault(random);
                }
            }
            over.store(true, Ordering::SeqCst);
            for place in places {
                sum.add(place.join().map_err(|_| anyhow!("a place panicked"))??);
            }
            outcome
        })?;
        self.judge(&mut sum)?;
        Ok(sum)
    }

    /// Every failure must be explained by a fault, and nothing may bypass the proxy.
    fn judge(&self, sum: &mut Sum) -> Result<()> {
        let failed = std::mem::take(&mut sum.load.failed);
        let all = failed.len();
        sum.load.failed = failed.into_iter().filter(|failure| !self.is_cut(failure)).collect();
        sum.cut += all - sum.load.failed.len();
        ensure!(sum.load.bypassed == 0, "{sum}");
        let near = |failure: &Failure| {
            let seconds = |then: Instant| match then.checked_duration_since(failure.end) {
                Some(after) => after.as_secs_f64(),
                None => -failure.end.duration_since(then).as_secs_f64(),
            };
            let about = |fault: &Fault| {
                let (start, end) = (seconds(fault.start), fault.end.map_or(f64::INFINITY, seconds));
                (end > -10.0 && start < 2.0).then(|| format!("{:?} {start:.1} to {end:.1} s", fault.kind))
            };
            let faults: Vec<_> = self.faults().iter().filter_map(about).collect();
            format!("after {:.1} s: {}; {}", -seconds(failure.start), failure.error, faults.join(", "))
        };
        let failed: Vec<_> = sum.load.failed.iter().take(10).map(near).collect();
        ensure!(failed.is_empty(), "{sum}: {failed:#?}");
        Ok(())
    }

    fn is_cut(&self, failure: &Failure) -> bool {
        self.faults().iter().any(|fault| {
            fault.kind.cuts(self.node.session().placement())
                && fault.start <= failure.end
                && fault.end.is_none_or(|end| failure.start <= end)
        })
    }

    /// Whether agent or proxy were away at some time since then, so that the plugin may have failed.
    fn was_disturbed(&self, since: Instant) -> bool {
        self.faults().iter().any(|fault| fault.end.is_none_or(|end| since <= end))
    }

    fn faults(&self) -> Vec<Fault> {
        self.faults.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Kills or replaces an agent or a proxy, and starts another one.
    fn fault(&self, random: &mut Rng) -> Result<()> {
        let kind = Kind::ALL[random.usize(..Kind::ALL.len())];
        let number = {
            let mut faults = self.faults.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            faults.push(Fault { kind, start: Instant::now(), end: None });
            faults.len() - 1
        };
        let away = between(random, 0, 1000);
        let node = &self.node;
        let agent = || -> Result<()> {
            thread::sleep(away);
            node.start_agent(&arguments())
        };
        let done = match kind {
            Kind::AgentKilled => {
                node.kill_agent().and_then(|()| agent()).and_then(|()| node.wait_for_proxy())
            }
            Kind::AgentStopped => {
                node.end_agent().and_then(|()| agent()).and_then(|()| node.wait_for_proxy())
            }
            Kind::ProxyKilled => node.kill_proxy().and_then(|()| {
                thread::sleep(away);
                start_proxy(node)
            }),
            Kind::ProxyReplaced => start_proxy(node),
            Kind::BothKilled => node
                .kill_proxy()
                .and_then(|()| node.kill_agent())
                .and_then(|()| agent())
                .and_then(|()| start_proxy(node)),
        };
        done.with_context(|| format!("{kind:?}"))?;
        let mut faults = self.faults.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        faults[number].end = Some(Instant::now());
        Ok(())
    }

    /// One pod after another.
    fn place(&self, mut random: Rng, over: &AtomicBool) -> Result<Sum> {
        let mut sum = Sum::default();
        while !over.load(Ordering::SeqCst) && !signals::interrupted() {
            let mut pod = self.node.plain("pod", Families::Dual)?;
            if self.until_undisturbed(|| over.load(Ordering::SeqCst), &mut sum, || pod.enroll())?.is_some() {
                sum.pods += 1;
                self.life(&pod, &mut random, over, &mut sum)
                    .with_context(|| format!("pod {}", pod.identity()))?;
            }
            // Some runtimes call the plugin when the namespace is already gone.
            if random.u8(..4) == 0 {
                let remains = pod.end_without_del()?;
                self.until_undisturbed(|| false, &mut sum, || remains.delete())?;
            } else {
                self.until_undisturbed(|| false, &mut sum, || pod.delete())?;
            }
        }
        Ok(sum)
    }

    /// Repeats an operation while a fault explains its failure, as a runtime does.
    fn until_undisturbed<T>(
        &self,
        over: impl Fn() -> bool,
        sum: &mut Sum,
        mut act: impl FnMut() -> Result<T>,
    ) -> Result<Option<T>> {
        loop {
            let begun = Instant::now();
            match act() {
                Ok(done) => return Ok(Some(done)),
                Err(error) if self.was_disturbed(begun) => {
                    sum.repeated += 1;
                    if over() {
                        return Ok(None);
                    }
                    signals::check().with_context(|| format!("{error:#}"))?;
                    thread::sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error.context("nothing was wrong with agent or proxy")),
            }
        }
    }

    /// Connections from and to a pod with every kind of socket, and one that stays open.
    fn life(&self, pod: &Pod, random: &mut Rng, over: &AtomicBool, sum: &mut Sum) -> Result<()> {
        let servers = Stack::ALL.map(|stack| anyhow::Ok((stack, pod.listen(stack)?, self.outside(stack)?)));
        let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
        let mut targets = Vec::new();
        for (stack, inside, outside) in &servers {
            let (stack, family) = (*stack, stack.family());
            let to = self.other.endpoint(family, outside.port())?;
            targets.push(Target { from: pod.netns(), stack, to });
            targets.push(Target {
                from: self.other.netns(),
                stack,
                to: pod.endpoint(family, inside.port())?,
            });
        }
        let talking = &targets[random.usize(..targets.len())];
        let end = Instant::now() + between(random, 300, 4000);
        let (mut lines, mut failed) = (0, Vec::new());
        let mut tally = load::paced(&targets, LIMIT, PAUSE, || {
            let over = || Instant::now() >= end || over.load(Ordering::SeqCst);
            while !over() {
                let start = Instant::now();
                if let Err(error) = load::talk(talking, LIMIT, over, &mut lines) {
                    failed.push(Failure {
                        start,
                        end: Instant::now(),
                        error: format!("open connection: {error:#}"),
                    });
                }
            }
            Ok(())
        })?;
        tally.failed.extend(failed);
        sum.load += tally;
        sum.lines += lines;
        Ok(())
    }

    /// A server of the other pod, which may reuse ports: [`Pod::listen`] never does, and an hour needs more than there are.
    fn outside(&self, stack: Stack) -> Result<Server> {
        Server::start(self.other.netns(), stack, 0, &self.other.identity().name)
    }

    /// Waits until neither kernel nor agent know any pod.
    fn nothing_is_left(&self) -> Result<()> {
        let left = || -> Result<Vec<String>> {
            let mut left: Vec<String> =
                self.node.reports()?.into_iter().map(|report| format!("pod {}", report.pod)).collect();
            for map in self.node.status()?.maps {
                if map.entries > 0 && PODS.contains(&map.name.as_str()) {
                    left.push(format!("{} entries of {}", map.entries, map.name));
                }
            }
            let checkpoints = fs::read_dir(self.node.state_dir().join("pods"))?.flatten();
            left.extend(checkpoints.map(|checkpoint| checkpoint.path().display().to_string()));
            Ok(left)
        };
        wait::until_true("end of all pods", wait::SOON, || Ok(left()?.is_empty()))
            .with_context(|| format!("left: {:?}", left()))
    }

    fn size(&self) -> Result<Size> {
        self.node.with_agent(|agent| {
            let process = agent.process().pid();
            Ok(Size { memory: resident(process)?, descriptors: descriptors(process)? })
        })
    }
}

/// The maps with entries of pods.
const PODS: [&str; 4] = ["PODS", "POD_IPV4", "POD_IPV6", "INTERFACES"];

fn arguments() -> Vec<String> {
    ["--on-exit", "keep"].map(str::to_owned).to_vec()
}

/// A proxy that lets connections end when another one replaces it.
fn start_proxy(node: &Node) -> Result<()> {
    node.start_proxy_with(&ProxyOptions { drain: 10, ..ProxyOptions::default() })
}

/// A random number of milliseconds.
fn between(random: &mut Rng, from: u64, to: u64) -> Duration {
    Duration::from_millis(random.u64(from..=to))
}
