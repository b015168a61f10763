//! Measurements of connections: cases, and how an arm measures one.

use std::fmt;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use serde::{Deserialize, Serialize};

use super::load::{self, Outcome, Work};
use super::place::{APPLICATIONS, Place};
use super::proxies::cpu_time;
use super::world::{Arm, PORT, World, own_program};
use crate::netns::Netns;
use crate::testbed::SocketKind;
use crate::{Pod, Stack, signals};

/// Between whom.
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
    /// The arms that have it.
    #[must_use]
    pub fn arms(self) -> &'static [Arm] {
        match self {
            Self::SinkOutbound | Self::SinkInbound => &Arm::ALL,
            Self::Path | Self::Tunnel => &[Arm::None, Arm::Ebpf, Arm::Iptables, Arm::Nft],
        }
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

/// What is measured.
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
        // Inbound, it is the client's kind, which is outside: the pod's side can't tell v4-mapped from IPv4.
        let stacks =
            Stack::ALL.into_iter().filter(|&stack| scene != Scene::SinkInbound || stack != Stack::Mapped);
        stacks.flat_map(with).collect()
    }

    /// The arms to compare: the socket's kind makes a difference to programs only, to packets none.
    #[must_use]
    pub fn arms(self) -> Vec<Arm> {
        let arms = self.scene.arms().iter().copied();
        arms.filter(|&arm| self.stack != Stack::Mapped || matches!(arm, Arm::Floor | Arm::Ebpf)).collect()
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

/// One measurement.
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
}

impl Sample {
    /// Nanoseconds for an operation, or for a byte. Less is better.
    #[must_use]
    pub fn cost(&self) -> f64 {
        self.outcome.nanoseconds as f64 / self.outcome.count as f64
    }

    /// CPU time for an operation, or for a byte, in nanoseconds, of everybody.
    #[must_use]
    pub fn cpu(&self) -> f64 {
        (self.outcome.cpu + self.served_cpu) as f64 / self.outcome.all as f64
    }
}

/// Where a connection starts and what it dials.
struct Way<'a> {
    from: &'a Pod,
    to: SocketAddr,
}

impl<'a> Way<'a> {
    fn of(world: &'a World, case: Case, arm: Arm) -> Result<Self> {
        let pair = world.of(arm)?;
        let family = case.stack.family();
        let to = pair.server.endpoint(family, PORT)?;
        Ok(match (case.scene, arm) {
            (Scene::SinkOutbound, Arm::Floor) => {
                Self { from: &pair.client, to: SocketAddr::new(case.stack.loopback(), PORT_OUTBOUND) }
            }
            (Scene::SinkInbound, Arm::Floor) => {
                Self { from: world.outside(), to: SocketAddr::new(to.ip(), PORT_INBOUND) }
            }
            (Scene::SinkOutbound | Scene::Path | Scene::Tunnel, _) => Self { from: &pair.client, to },
            (Scene::SinkInbound, _) => Self { from: world.outside(), to },
        })
    }
}

/// How long a measurement takes, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Measured.
    pub measured: u64,
    /// Before.
    pub warm_up: u64,
}

/// Measures once.
pub fn measure(world: &World, case: Case, arm: Arm, round: usize, length: Length) -> Result<Sample> {
    signals::check()?;
    let way = Way::of(world, case, arm)?;
    let processes = world.processes(arm)?;
    let served = || processes.iter().map(|&process| cpu_time(process)).sum::<Result<u64>>();
    let before = served()?;
    let outcome =
        generate(world, way.from.netns(), arm, (case.work, case.clients, case.stack), &[way.to], length)
            .with_context(|| format!("{case}, {}", arm.label()))?;
    let served_cpu = served()? - before;
    Ok(Sample { case, arm, round, outcome, served_cpu })
}

/// Runs the load generator.
pub fn generate(
    world: &World,
    netns: &Netns,
    arm: Arm,
    (work, clients, stack): (Work, usize, Stack),
    to: &[SocketAddr],
    length: Length,
) -> Result<Outcome> {
    let work = match work {
        Work::Connections => "connections",
        Work::PingPong => "ping-pong",
        Work::Bulk => "bulk",
    };
    let mut command = own_program()?;
    command.args(["load", "--work", work, "--family", SocketKind::of(stack)]);
    command.args(["--clients", &clients.to_string()]);
    command.args(["--milliseconds", &length.measured.to_string(), "--warm-up", &length.warm_up.to_string()]);
    command.args(to.iter().flat_map(|to| ["--to".to_owned(), to.to_string()]));
    command.args(Place::arguments(APPLICATIONS, world.cgroup_of(arm).as_deref()));
    let output = netns.output(command, b"")?;
    let outcome: Outcome = serde_json::from_slice(&output).context("outcome of the load generator")?;
    ensure!(outcome.count > 0, "nothing came of it, with {} errors", outcome.errors);
    Ok(outcome)
}

/// An error unless an arm is what it claims to be: who answers, what it takes for the destination, and that the
/// packets went through the arm's rules or programs and through no other's.
pub fn verify(world: &World, case: Case, arm: Arm) -> Result<()> {
    let way = Way::of(world, case, arm)?;
    let expected_port = match (case.scene, arm) {
        (Scene::Path | Scene::Tunnel, _) | (_, Arm::None) => PORT,
        (Scene::SinkOutbound, _) => PORT_OUTBOUND,
        (Scene::SinkInbound, _) => PORT_INBOUND,
    };
    let family = case.stack.family();
    let before = Counts::read(world, family)?;
    let sight = way.from.netns().run(|| load::identify(case.stack, way.to))??;
    let after = Counts::read(world, family)?;
    let destination = crate::stack::canonical(sight.destination);
    ensure!(sight.port == expected_port, "the listener of port {} answered, not {expected_port}", sight.port);
    ensure!(destination == way.to, "the original destination is {destination}, not {}", way.to);
    let outbound = u64::from(case.scene != Scene::SinkInbound);
    // Tunnels go to the proxy's port as they are.
    let inbound = u64::from(matches!(case.scene, Scene::SinkInbound | Scene::Path));
    let mut expected = before;
    match arm {
        Arm::Floor | Arm::None => {}
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

/// Redirected connections of the clients' pods outbound and of the servers' pods inbound: by our programs, by iptables, by
/// nft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts([[u64; 2]; 3]);

impl Counts {
    fn read(world: &World, family: Family) -> Result<Self> {
        let status = world.node().status()?;
        let steered = |direction: &str| {
            let of = |counter: &&redirect_protocol::wire::CounterReport| {
                counter.family == family.to_string()
                    && counter.direction == direction
                    && counter.verdict == "steered"
            };
            status.counters.iter().filter(of).map(|counter| counter.connections).sum()
        };
        let mut counts = [[steered("outbound"), steered("inbound")], [0; 2], [0; 2]];
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
