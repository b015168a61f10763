//! Measurements of connections: the cases, and how arms alternate.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::load::{Block, Latency, Length, Outcome, Work};
use super::machine::stolen;
use super::proxies::cpu_time;
use super::statistics::Estimate;
use super::world::{Arm, PORT, World};
use crate::{Pod, Stack, signals};

/// The ends of the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scene {
    /// From a pod to its own proxy, which answers.
    SinkOutbound,
    /// From elsewhere to a pod's proxy, which answers.
    SinkInbound,
    /// From a pod by its proxy and the other pod's proxy to that pod.
    Path,
    /// The same through the tunnel between the proxies (HBONE), where they have one.
    Tunnel,
}

impl Scene {
    /// Whether an arm has it.
    #[must_use]
    pub fn has(self, arm: Arm) -> bool {
        !arm.is_floor() || matches!(self, Self::SinkOutbound | Self::SinkInbound)
    }

    /// As reports call it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::SinkOutbound => "outbound, to a sink",
            Self::SinkInbound => "inbound, to a sink",
            Self::Path => "pod to proxy to proxy to pod",
            Self::Tunnel => "pod to proxy, tunnel, proxy to pod",
        }
    }
}

/// A case to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Case {
    /// Between whom.
    pub scene: Scene,
    /// What.
    pub work: Work,
    /// How many clients at once.
    pub clients: usize,
    /// The kind of socket.
    pub stack: Stack,
}

impl Case {
    /// All cases of a scene.
    #[must_use]
    pub fn of(scene: Scene) -> Vec<Self> {
        let works = [(Work::Connections, 1), (Work::Connections, 16), (Work::PingPong, 1), (Work::Bulk, 1)];
        let with = |stack| works.map(|(work, clients)| Self { scene, work, clients, stack });
        // Inbound, the stack is that of the client outside: the pod's side can't distinguish v4-mapped from
        // IPv4.
        let stacks =
            Stack::ALL.into_iter().filter(|&stack| scene != Scene::SinkInbound || stack != Stack::Mapped);
        stacks.flat_map(with).collect()
    }

    /// The arms to compare: the stack matters to our programs only, not to packets.
    #[must_use]
    pub fn arms(self) -> Vec<Arm> {
        let arms = Arm::value_variants().iter().copied().filter(|&arm| self.scene.has(arm));
        arms.filter(|&arm| self.stack != Stack::Mapped || arm.is_floor() || arm.is_enrolled()).collect()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let work = match self.work {
            Work::Connections => "connection",
            Work::PingPong => "ping-pong",
            Work::Bulk => "bulk",
        };
        write!(f, "{work}")?;
        if self.clients > 1 {
            write!(f, ", {} clients", self.clients)?;
        }
        write!(f, ", {}", self.stack)
    }
}

/// One block of an arm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Of what.
    #[serde(flatten)]
    pub case: Case,
    /// How.
    pub arm: Arm,
    /// When.
    pub round: usize,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// CPU time of proxy and server for all operations, in nanoseconds.
    pub served_cpu: u64,
    /// Time that a hypervisor took from this machine meanwhile, in ticks.
    pub stolen: u64,
}

impl Sample {
    /// Nanoseconds for an operation, or for a byte. Less is better.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.outcome.nanoseconds as f64 / self.outcome.count as f64
    }

    /// Total CPU time for an operation, or for a byte, in nanoseconds.
    #[must_use]
    pub fn cpu(&self) -> f64 {
        (self.outcome.cpu + self.served_cpu) as f64 / self.outcome.all as f64
    }
}

/// Latency of one case in one arm.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latencies {
    /// Of what.
    #[serde(flatten)]
    pub case: Case,
    /// How.
    pub arm: Arm,
    /// The percentiles.
    pub latency: Latency,
}

/// Where a connection starts and what it dials.
struct Way<'a> {
    from: &'a Pod,
    to: SocketAddr,
}

impl<'a> Way<'a> {
    fn of(world: &'a World, case: Case, arm: Arm) -> Result<Self> {
        let pair = world.of(arm)?;
        let outside = world.outside(arm)?;
        let to = pair.server.endpoint(case.stack.family(), PORT)?;
        Ok(match case.scene {
            Scene::SinkOutbound if arm.is_floor() => {
                Self { from: &pair.client, to: SocketAddr::new(case.stack.loopback(), PORT_OUTBOUND) }
            }
            Scene::SinkInbound if arm.is_floor() => {
                Self { from: outside, to: SocketAddr::new(to.ip(), PORT_INBOUND) }
            }
            Scene::SinkOutbound | Scene::Path | Scene::Tunnel => Self { from: &pair.client, to },
            Scene::SinkInbound => Self { from: outside, to },
        })
    }
}

/// The extent of a comparison.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Of a block.
    pub length: Length,
    /// The wanted half-width of the relevant ratios' intervals, as a share.
    pub precision: f64,
    /// The fewest rounds of a case.
    pub rounds: usize,
    /// The maximum duration of a case, however wide its interval.
    pub limit: Duration,
}

/// The load generators of a scene.
#[derive(Debug)]
pub struct Clients<'a> {
    world: &'a World,
    clients: BTreeMap<Arm, Client>,
}

impl<'a> Clients<'a> {
    /// Starts those of these arms.
    pub fn start(world: &'a World, scene: Scene, arms: &[Arm]) -> Result<Self> {
        let mut clients = BTreeMap::new();
        for &arm in arms.iter().filter(|&&arm| scene.has(arm)) {
            let case = Case { scene, work: Work::Connections, clients: 1, stack: Stack::V4 };
            let netns = Way::of(world, case, arm)?.from.netns();
            clients.insert(arm, Client::start(world, arm, netns)?);
        }
        Ok(Self { world, clients })
    }

    /// The arms of a case that have one.
    fn arms(&self, case: Case) -> Vec<Arm> {
        case.arms().into_iter().filter(|arm| self.clients.contains_key(arm)).collect()
    }

    fn of(&mut self, arm: Arm) -> Result<&mut Client> {
        self.clients.get_mut(&arm).with_context(|| format!("no clients of {}", arm.label()))
    }

    /// Fails unless an arm is what it claims to be: the right process answers, with the right original destination,
    /// and the packets pass the arm's rules or programs and no others.
    pub fn verify(&mut self, case: Case, arm: Arm) -> Result<()> {
        let world = self.world;
        let way = Way::of(world, case, arm)?;
        let expected_port = match (case.scene, arm) {
            (Scene::Path | Scene::Tunnel, _) | (_, Arm::None) => PORT,
            (Scene::SinkOutbound, _) => PORT_OUTBOUND,
            (Scene::SinkInbound, _) => PORT_INBOUND,
        };
        let family = case.stack.family();
        let before = Counts::read(world, family)?;
        let sight = self.of(arm)?.identify(case.stack, way.to)?;
        let after = Counts::read(world, family)?;
        let destination = crate::stack::canonical(sight.destination);
        ensure!(
            sight.port == expected_port,
            "the listener of port {} answered, not {expected_port}",
            sight.port
        );
        ensure!(destination == way.to, "the original destination is {destination}, not {}", way.to);
        let outbound = u64::from(case.scene != Scene::SinkInbound);
        // Tunnels go to the proxy's port directly.
        let inbound = u64::from(matches!(case.scene, Scene::SinkInbound | Scene::Path));
        let mut expected = before;
        match arm {
            // The other build has its own counters; it is enough that its listener answered.
            Arm::Floor | Arm::Again | Arm::None | Arm::Against => {}
            Arm::Ebpf => expected.add(0, outbound, inbound),
            Arm::Iptables => expected.add(1, outbound, inbound),
            Arm::Nft => expected.add(2, outbound, inbound),
        }
        ensure!(
            after == expected,
            "redirected connections (programs, iptables, nft): {after:?}, not {expected:?}"
        );
        Ok(())
    }

    /// Measures one block, to these destinations.
    pub fn generate(&mut self, case: Case, arm: Arm, to: &[SocketAddr], length: Length) -> Result<Outcome> {
        let Case { work, clients, stack, .. } = case;
        let block = Block { work, stack, clients, to: to.to_vec(), length };
        self.of(arm)?.measure(&block).with_context(|| format!("{}, {case}", case.scene.label()))
    }

    /// Measures one block.
    pub fn measure(&mut self, case: Case, arm: Arm, round: usize, length: Length) -> Result<Sample> {
        signals::check()?;
        let to = Way::of(self.world, case, arm)?.to;
        let processes = self.world.processes(arm)?;
        let served = || processes.iter().map(|&process| cpu_time(process)).sum::<Result<u64>>();
        let (before, stolen_before) = (served()?, stolen()?);
        let outcome = self.generate(case, arm, &[to], length)?;
        let (served_cpu, stolen) = (served()? - before, stolen()? - stolen_before);
        Ok(Sample { case, arm, round, outcome, served_cpu, stolen })
    }

    /// Ends the connections of a case. How long operations took.
    pub fn finish(&mut self, case: Case) -> Result<Vec<Latencies>> {
        let arms = self.arms(case).into_iter();
        arms.map(|arm| Ok(Latencies { case, arm, latency: self.of(arm)?.finish()? })).collect()
    }

    /// Measures a case in blocks of all arms, in random order, until the relevant ratios are as precise as wanted.
    pub fn compare(&mut self, case: Case, effort: Effort) -> Result<Vec<Sample>> {
        /// The number of rounds between checks of the intervals.
        const STRIDE: usize = 20;
        let mut arms = self.arms(case);
        for &arm in &arms {
            // Opens connections, and does one-time work.
            self.measure(case, arm, 0, effort.length)?;
        }
        let (mut samples, started) = (Vec::new(), Instant::now());
        for round in 0.. {
            let enough =
                round >= effort.rounds && round % STRIDE == 0 && precision(&samples) <= effort.precision;
            if round >= effort.rounds && (enough || started.elapsed() >= effort.limit) {
                break;
            }
            fastrand::shuffle(&mut arms);
            for &arm in &arms {
                samples.push(self.measure(case, arm, round, effort.length)?);
            }
        }
        Ok(samples)
    }
}

/// The worst precision of the relevant ratios.
fn precision(samples: &[Sample]) -> f64 {
    let costs =
        |arm| -> Vec<f64> { samples.iter().filter(|sample| sample.arm == arm).map(Sample::cost).collect() };
    let ours = costs(Arm::Ebpf);
    let others = [Arm::Floor, Arm::Again, Arm::Against, Arm::None, Arm::Iptables].map(costs);
    let [floor, again, against, none, iptables] = &others;
    // If no client can dial the proxy directly, the comparison is with the arm without a proxy and with iptables.
    let pairs = if floor.is_empty() {
        vec![(&ours, none), (iptables, &ours)]
    } else {
        vec![(&ours, floor), (again, floor)]
    };
    let pairs = pairs.into_iter().chain([(&ours, against)]);
    pairs.filter_map(|(a, b)| Estimate::ratio(a, b)).map(|estimate| estimate.precision()).fold(0.0, f64::max)
}

/// Redirected connections of the clients' pods outbound and of the servers' pods inbound: by our programs, by iptables, by
/// nft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts([[u64; 2]; 3]);

impl Counts {
    fn read(world: &World, family: Family) -> Result<Self> {
        let status = world.node().status()?;
        let captured = |direction: &str| {
            let of = |counter: &&redirect_protocol::wire::CounterReport| {
                counter.family == family.to_string()
                    && counter.direction == direction
                    && counter.verdict == "captured"
            };
            status.counters.iter().filter(of).map(|counter| counter.connections).sum()
        };
        let mut counts = [[captured("outbound"), captured("inbound")], [0; 2], [0; 2]];
        for (place, arm) in [(1, Arm::Iptables), (2, Arm::Nft)] {
            let pair = world.of(arm)?;
            let netfilter = arm.netfilter().context("rules")?;
            counts[place] = [
                netfilter.redirected(pair.client.netns(), family, PORT_OUTBOUND)?,
                netfilter.redirected(pair.server.netns(), family, PORT_INBOUND)?,
            ];
        }
        Ok(Self(counts))
    }

    fn add(&mut self, place: usize, outbound: u64, inbound: u64) {
        if let Some([out, into]) = self.0.get_mut(place) {
            *out += outbound;
            *into += inbound;
        }
    }
}
