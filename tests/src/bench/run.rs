//! A run: the experiments, their durations and order, and the output.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;

use super::enrollment::{self, Enrollment};
use super::extra::{self, Hook, Many, Turns};
use super::load::Length;
use super::machine::{Busy, Machine, wait_for_namespaces, wait_for_quiet};
use super::proxies::Serving;
use super::scale::{self, Scale};
use super::traffic::{Case, Clients, Effort, Latencies, Sample, Scene};
use super::world::World;
use crate::Session;
use crate::proxy::ProxyKind;

/// Settings of a run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Less of everything: within three minutes.
    #[arg(long)]
    pub quick: bool,
    /// Each experiment for a moment, to see that it works: the figures mean nothing.
    #[arg(long, conflicts_with = "quick")]
    pub smoke: bool,
    /// Runs the whole path through this node proxy, such as a ztunnel, instead of the embedded one.
    #[arg(long, value_name = "PATH")]
    pub proxy: Option<PathBuf>,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,
    /// Runs these experiments alone.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Experiment>,
    /// Does not wait for a quiet machine.
    #[arg(long)]
    pub no_wait: bool,
    /// Writes a summary between the markers of this file.
    #[arg(long, value_name = "FILE")]
    pub docs: Option<PathBuf>,
    /// Compares this build with another one: a directory that holds its `redirect` and `redirect-cni`.
    #[arg(long, value_name = "DIRECTORY")]
    pub against: Option<PathBuf>,
    /// How well ratios of arms are to be known: half of their interval, in percent.
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = percent)]
    pub precision: f64,
    /// How long a ratio is measured at most, in seconds, where it does not become that precise.
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<f64>,
}

/// A share, as `1%` or `0.5`.
fn percent(text: &str) -> Result<f64> {
    let number: f64 = text.strip_suffix('%').unwrap_or(text).trim().parse()?;
    ensure!(number > 0.0 && number <= 100.0, "not between 0 and 100");
    Ok(number / 100.0)
}

/// An experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Experiment {
    /// Connections to a proxy that answers itself.
    Sink,
    /// Connections through a proxy, and where it has one through its tunnel.
    Path,
    /// Connections of a pod to two destinations in turn.
    Turns,
    /// Run time of the programs.
    Hooks,
    /// Connections while there are many pods, or exclusions.
    Many,
    /// Enrollment of pods.
    Enrollment,
    /// Memory by the number of pods.
    Scale,
}

impl Options {
    fn wants(&self, experiment: Experiment) -> bool {
        self.only.is_empty() || self.only.contains(&experiment)
    }

    fn plan(&self) -> Plan {
        const MILLISECOND: u64 = 1000;
        let milliseconds =
            |measured, warm_up| Length { measured: measured * MILLISECOND, warm_up: warm_up * MILLISECOND };
        let (rounds, limit) = match (self.smoke, self.quick) {
            (true, _) => (1, 0.0),
            (_, true) => (20, 5.0),
            _ => (100, 20.0),
        };
        let (turns, enrollments, crowds, levels, many): (_, _, (&[usize], _), &[usize], _) =
            match (self.smoke, self.quick) {
                (true, _) => (30, 2, (&[1, 2], 1), &[0, 2], 2),
                (_, true) => (400, 40, (&[1, 10, 100], 2), &[0, 10, 100, 250], 250),
                _ => (3000, 300, (&[1, 10, 100], 10), &[0, 10, 100, 250, 1000], 1000),
            };
        Plan {
            turns: milliseconds(turns, 40),
            hooks: milliseconds(if self.smoke { 10 } else { 400 }, 40),
            enrollments,
            crowds,
            levels,
            idle: Duration::from_millis(if self.smoke {
                50
            } else if self.quick {
                1000
            } else {
                5000
            }),
            many,
            effort: Effort {
                length: Length { measured: 5 * MILLISECOND, warm_up: MILLISECOND / 2 },
                precision: self.precision,
                rounds,
                limit: Duration::from_secs_f64(self.limit.unwrap_or(limit)),
            },
            patience: Duration::from_secs(if self.smoke || self.no_wait {
                0
            } else if self.quick {
                20
            } else {
                300
            }),
        }
    }
}

/// The extent of each experiment.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Of comparisons of arms.
    effort: Effort,
    /// How long to wait for a quiet machine.
    patience: Duration,
    /// Destinations in turn: long enough for conntrack's stalls to show.
    turns: Length,
    /// Run time of programs.
    hooks: Length,
    /// Enrollments of one pod.
    enrollments: usize,
    /// Pods that are enrolled at once, and how often.
    crowds: (&'static [usize], usize),
    /// Numbers of pods.
    levels: &'static [usize],
    /// How long to observe an idle agent.
    idle: Duration,
    /// Many pods, many exclusions.
    many: usize,
}

/// All measurements.
#[derive(Clone, Debug, Serialize)]
pub struct Data {
    /// Where.
    pub machine: Machine,
    /// Whether it was a short run.
    pub quick: bool,
    /// The proxy of the whole path.
    pub proxy: String,
    /// The wanted precision of ratios, as a share.
    pub precision: f64,
    /// Connections.
    pub samples: Vec<Sample>,
    /// Their latencies.
    pub latencies: Vec<Latencies>,
    /// Destinations in turn.
    pub turns: Vec<Turns>,
    /// Run time of programs.
    pub hooks: Vec<Hook>,
    /// Many pods, many exclusions.
    pub many: Vec<Many>,
    /// Enrollment.
    pub enrollment: Option<Enrollment>,
    /// Memory.
    pub scale: Option<Scale>,
}

/// Runs the experiments.
pub fn run(session: &Arc<Session>, options: &Options) -> Result<Data> {
    let plan = options.plan();
    let mut data = Data {
        machine: Machine::look()?,
        quick: options.quick,
        proxy: match session.binaries().kind {
            ProxyKind::Embedded => "embedded".to_owned(),
            ProxyKind::Ztunnel => "ztunnel".to_owned(),
        },
        precision: options.precision,
        samples: Vec::new(),
        latencies: Vec::new(),
        turns: Vec::new(),
        hooks: Vec::new(),
        many: Vec::new(),
        enrollment: None,
        scale: None,
    };
    let against = options
        .against
        .as_ref()
        .map(|directory| session.with_build(directory.join("redirect"), directory.join("redirect-cni")));
    let against = against.transpose()?;
    data.machine.load_before = wait_for_quiet(plan.patience)?;
    // First, because it suffers from a kernel that has many namespaces to clean up.
    if options.wants(Experiment::Enrollment) {
        let (crowds, rounds) = plan.crowds;
        let plan = enrollment::Plan { attempts: plan.enrollments, crowds: crowds.to_vec(), rounds };
        data.enrollment = Some(step("enrollment", || enrollment::measure(session, against.as_ref(), &plan))?);
        wait_for_namespaces()?;
    }
    connections(session, against.as_ref(), options, plan, &mut data)?;
    if options.wants(Experiment::Many) {
        data.many.push(exclusions(session, plan)?);
    }
    if options.wants(Experiment::Scale) {
        wait_for_namespaces()?;
        data.scale = Some(step("memory", || scale::measure(session, plan.levels, plan.idle))?);
    }
    Ok(data)
}

fn connections(
    session: &Arc<Session>,
    against: Option<&Arc<Session>>,
    options: &Options,
    plan: Plan,
    data: &mut Data,
) -> Result<()> {
    use Experiment::{Hooks, Many, Path, Sink, Turns};
    if ![Sink, Path, Turns, Hooks, Many].into_iter().any(|experiment| options.wants(experiment)) {
        return Ok(());
    }
    let mut world = step("pods of every arm", || World::new(session, against, Serving::Sink, &[]))?;
    let (busy, own) = (Busy::now()?, world.cpu_time()?);
    if options.wants(Sink) {
        compare(&world, &[Scene::SinkOutbound, Scene::SinkInbound], plan, data)?;
    }
    if options.wants(Turns) {
        data.turns = step("destinations in turn", || extra::turns(&world, plan.turns))?;
    }
    if options.wants(Hooks) {
        data.hooks = step("run time of programs", || extra::hooks(&world, plan.hooks))?;
    }
    if options.wants(Many) {
        let many = || extra::many_pods(&world, plan.many, plan.effort);
        data.many.push(step("connections among many pods", many)?);
    }
    if options.wants(Path) {
        world.start_proxies(Serving::Pass)?;
        compare(&world, &[Scene::Path], plan, data)?;
        if session.binaries().kind == ProxyKind::Ztunnel {
            world.start_tunnels()?;
            compare(&world, &[Scene::Tunnel], plan, data)?;
        }
    }
    data.machine.disturbance = busy.disturbance(Busy::now()?, world.cpu_time()? - own);
    Ok(())
}

/// As many networks per family and ports, none of which matches the measured connections.
fn exclusions(session: &Arc<Session>, plan: Plan) -> Result<Many> {
    let few = {
        let world = World::new(session, None, Serving::Sink, &[])?;
        extra::compare(&world, plan.effort)?
    };
    let count = u16::try_from(plan.many)?;
    let networks: Vec<String> = (0..count)
        .flat_map(|number| {
            let [high, low] = number.to_be_bytes();
            [format!("172.31.{high}.{low}/32"), format!("fd31::{number:x}:0/112")]
        })
        .collect();
    let ports: Vec<String> = (0..count).map(|number| (20_000 + number).to_string()).collect();
    let agent = [
        format!("--exclude-outbound-networks={}", networks.join(",")),
        format!("--exclude-outbound-ports={}", ports.join(",")),
    ];
    let many = step("connections with many exclusions", || {
        let world = World::new(session, None, Serving::Sink, &agent)?;
        extra::compare(&world, plan.effort)
    })?;
    Ok(Many { what: format!("{count} exclusions of each kind"), few, many })
}

/// Prints a step and its duration.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = work().with_context(|| what.to_owned())?;
    eprintln!("{what}: {:.1} s", started.elapsed().as_secs_f32());
    Ok(result)
}

/// Every case in every arm.
fn compare(world: &World, scenes: &[Scene], plan: Plan, data: &mut Data) -> Result<()> {
    let arms = world.arms();
    for &scene in scenes {
        let mut clients = Clients::start(world, scene, &arms)?;
        for case in Case::of(scene) {
            for &arm in case.arms().iter().filter(|arm| arms.contains(arm)) {
                let verified = clients.verify(case, arm);
                verified.with_context(|| format!("{}, {case}, arm {}", scene.label(), arm.label()))?;
            }
        }
        for case in Case::of(scene) {
            let samples = step(&format!("{}, {case}", scene.label()), || clients.compare(case, plan.effort))?;
            data.samples.extend(samples);
            data.latencies.extend(clients.finish(case)?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precision_is_in_percent() {
        assert_eq!(percent("1%").expect("a share"), 0.01);
        assert_eq!(percent("2.5").expect("a share"), 0.025);
        assert!(["", "%", "0", "-1%", "101", "one"].iter().all(|text| percent(text).is_err()));
    }
}
