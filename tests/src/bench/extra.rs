//! Further measurements of connections, besides the comparison of arms: alternating destinations, run time of programs,
//! many pods and exclusions.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::Serialize;

use super::crowd::{BarePod, gather};
use super::load::{Length, Work};
use super::traffic::{Case, Clients, Effort, Sample, Scene};
use super::world::{Arm, PORT, World};
use crate::Stack;

/// Connections of one pod to two destinations in turn.
#[derive(Clone, Debug, Serialize)]
pub struct Turns {
    /// How.
    pub arm: Arm,
    /// The kind of socket.
    pub stack: Stack,
    /// To one destination, in connections per second.
    pub one: f64,
    /// To two in turn.
    pub two: f64,
    /// Connections that failed.
    pub errors: u64,
    /// Retransmitted SYNs of the pod.
    pub retransmits: u64,
}

/// Measures them in the arms that redirect.
pub fn turns(world: &World, length: Length) -> Result<Vec<Turns>> {
    let mut all = Vec::new();
    let arms = [Arm::Ebpf, Arm::Iptables, Arm::Nft];
    let mut clients = Clients::start(world, Scene::SinkOutbound, &arms)?;
    for stack in [Stack::V4, Stack::V6] {
        let case = Case { scene: Scene::SinkOutbound, work: Work::Connections, clients: 16, stack };
        for arm in arms {
            let pair = world.of(arm)?;
            let destinations: Vec<SocketAddr> = [&pair.server, world.outside(arm)?]
                .into_iter()
                .map(|pod| pod.endpoint(stack.family(), PORT))
                .collect::<Result<_>>()?;
            let resent = || pair.client.netns().statistic("netstat", "TcpExt", "TCPSynRetrans");
            let one = clients.generate(case, arm, destinations.get(..1).unwrap_or_default(), length)?;
            let before = resent()?;
            let two = clients.generate(case, arm, &destinations, length)?;
            let rate =
                |outcome: &super::load::Outcome| outcome.count as f64 * 1e9 / outcome.nanoseconds as f64;
            all.push(Turns {
                arm,
                stack,
                one: rate(&one),
                two: rate(&two),
                errors: two.errors,
                retransmits: resent()? - before,
            });
        }
    }
    Ok(all)
}

/// The cost of a program.
#[derive(Clone, Debug, Serialize)]
pub struct Hook {
    /// The program's name.
    pub program: String,
    /// The load during the measurement.
    pub during: Case,
    /// How often it ran for each connection, or round trip.
    pub runs: f64,
    /// Its run time in nanoseconds, including the measurement's overhead.
    pub nanoseconds: f64,
}

/// Measures the run time of every program under load in our arm.
pub fn hooks(world: &World, length: Length) -> Result<Vec<Hook>> {
    let mut hooks = Vec::new();
    let _enabled = enable_stats(Stats::RunTime).context("run time of programs")?;
    for scene in [Scene::SinkOutbound, Scene::SinkInbound] {
        let mut clients = Clients::start(world, scene, &[Arm::Ebpf])?;
        for stack in [Stack::V4, Stack::V6] {
            for work in [Work::Connections, Work::PingPong] {
                let case = Case { scene, work, clients: 1, stack };
                clients.measure(case, Arm::Ebpf, 0, length)?;
                let before = run_times(world)?;
                let sample = clients.measure(case, Arm::Ebpf, 0, length)?;
                for (program, (runs, time)) in run_times(world)? {
                    let (old_runs, old_time) = before.get(&program).copied().unwrap_or_default();
                    let (runs, time) = (runs - old_runs, time - old_time);
                    if runs > 0 {
                        hooks.push(Hook {
                            program,
                            during: case,
                            runs: runs as f64 / sample.outcome.all as f64,
                            nanoseconds: time as f64 / runs as f64,
                        });
                    }
                }
            }
        }
    }
    Ok(hooks)
}

/// Runs and nanoseconds of each of the agent's programs so far.
fn run_times(world: &World) -> Result<BTreeMap<String, (u64, u64)>> {
    let status = world.node().status()?;
    let mut times = BTreeMap::new();
    for program in loaded_programs() {
        let program = program?;
        if let Some(ours) = status.programs.iter().find(|ours| ours.id == program.id()) {
            times.insert(
                ours.name.clone(),
                (program.run_count(), u64::try_from(program.run_time().as_nanos())?),
            );
        }
    }
    Ok(times)
}

/// Connections of one enrolled pod while there are many pods, or many exclusions.
#[derive(Clone, Debug, Serialize)]
pub struct Many {
    /// Many of what.
    pub what: String,
    /// Samples of ebpf and of floor with few.
    pub few: Vec<Sample>,
    /// With many.
    pub many: Vec<Sample>,
}

/// Measures connections with few pods, then with many.
pub fn many_pods(world: &World, count: usize, effort: Effort) -> Result<Many> {
    let few = compare(world, effort)?;
    let agent = world.node().agent_socket();
    let pods: Vec<BarePod> = gather(1, count)?;
    for pod in &pods {
        pod.enroll(&agent)?;
    }
    let many = compare(world, effort)?;
    for pod in &pods {
        pod.unenroll(&agent)?;
    }
    Ok(Many { what: format!("{count} pods"), few, many })
}

/// Our arm and the floor.
pub fn compare(world: &World, effort: Effort) -> Result<Vec<Sample>> {
    let scene = Scene::SinkOutbound;
    let mut clients = Clients::start(world, scene, &[Arm::Floor, Arm::Ebpf])?;
    let mut samples = Vec::new();
    for stack in [Stack::V4, Stack::V6] {
        let case = Case { scene, work: Work::Connections, clients: 1, stack };
        samples.extend(clients.compare(case, effort)?);
    }
    Ok(samples)
}
