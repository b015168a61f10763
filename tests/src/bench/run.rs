//! A run: which experiments, how long, in which order, and where the results go.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;

use super::enrolment::{self, Enrolment};
use super::extra::{self, Hook, Many, Turns};
use super::machine::{Busy, Machine, wait_for_quiet};
use super::proxies::Serving;
use super::scale::{self, Scale};
use super::traffic::{self, Case, Length, Sample, Scene};
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
    /// How many rounds.
    #[arg(long)]
    pub rounds: Option<usize>,
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
    /// Enrolment of pods.
    Enrolment,
    /// Memory by the number of pods.
    Scale,
}

impl Options {
    fn wants(&self, experiment: Experiment) -> bool {
        self.only.is_empty() || self.only.contains(&experiment)
    }

    fn plan(&self) -> Plan {
        let (rounds, measured, warm_up) = match (self.smoke, self.quick) {
            (true, _) => (1, 10, 2),
            (_, true) => (5, 100, 15),
            _ => (15, 400, 40),
        };
        let turns = |measured| Length { measured, warm_up };
        let (turns, enrolments, crowds, levels, many): (_, _, (&[usize], _), &[usize], _) =
            match (self.smoke, self.quick) {
                (true, _) => (turns(30), 2, (&[1, 2], 1), &[0, 2], 2),
                (_, true) => (turns(400), 40, (&[1, 10, 100], 2), &[0, 10, 100, 250], 250),
                _ => (turns(3000), 300, (&[1, 10, 100], 10), &[0, 10, 100, 250, 1000], 1000),
            };
        Plan {
            turns,
            enrolments,
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
            rounds: self.rounds.unwrap_or(rounds),
            length: Length { measured, warm_up },
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

/// How much of everything.
#[derive(Clone, Copy, Debug)]
struct Plan {
    rounds: usize,
    length: Length,
    /// How long a quiet machine is waited for.
    patience: Duration,
    /// Destinations in turn: long enough for conntrack's stalls to show.
    turns: Length,
    /// Enrolments of one pod.
    enrolments: usize,
    /// Pods that are enrolled at once, and how often.
    crowds: (&'static [usize], usize),
    /// Numbers of pods.
    levels: &'static [usize],
    /// How long an idle agent is watched.
    idle: Duration,
    /// Many pods, many exclusions.
    many: usize,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Data {
    /// Where.
    pub machine: Machine,
    /// Whether it was a short run.
    pub quick: bool,
    /// The proxy of the whole path.
    pub proxy: String,
    /// Connections.
    pub samples: Vec<Sample>,
    /// Destinations in turn.
    pub turns: Vec<Turns>,
    /// Run time of programs.
    pub hooks: Vec<Hook>,
    /// Many pods, many exclusions.
    pub many: Vec<Many>,
    /// Enrolment.
    pub enrolment: Option<Enrolment>,
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
        samples: Vec::new(),
        turns: Vec::new(),
        hooks: Vec::new(),
        many: Vec::new(),
        enrolment: None,
        scale: None,
    };
    data.machine.load_before = wait_for_quiet(plan.patience)?;
    connections(session, options, plan, &mut data)?;
    if options.wants(Experiment::Many) {
        data.many.push(exclusions(session, plan)?);
    }
    if options.wants(Experiment::Enrolment) {
        let (crowds, rounds) = plan.crowds;
        let plan = enrolment::Plan { attempts: plan.enrolments, crowds: crowds.to_vec(), rounds };
        data.enrolment = Some(step("enrolment", || enrolment::measure(session, &plan))?);
    }
    if options.wants(Experiment::Scale) {
        data.scale = Some(step("memory", || scale::measure(session, plan.levels, plan.idle))?);
    }
    Ok(data)
}

fn connections(session: &Arc<Session>, options: &Options, plan: Plan, data: &mut Data) -> Result<()> {
    use Experiment::{Hooks, Many, Path, Sink, Turns};
    if ![Sink, Path, Turns, Hooks, Many].into_iter().any(|experiment| options.wants(experiment)) {
        return Ok(());
    }
    let mut world = step("pods of every arm", || World::new(session, Serving::Sink, &[]))?;
    let (busy, own) = (Busy::now()?, world.cpu_time()?);
    if options.wants(Sink) {
        rounds(&world, &[Scene::SinkOutbound, Scene::SinkInbound], plan, data)?;
    }
    if options.wants(Turns) {
        data.turns = step("destinations in turn", || extra::turns(&world, plan.turns))?;
    }
    if options.wants(Hooks) {
        data.hooks = step("run time of programs", || extra::hooks(&world, plan.length))?;
    }
    if options.wants(Many) {
        let many = || extra::many_pods(&world, plan.many, plan.rounds, plan.length);
        data.many.push(step("connections among many pods", many)?);
    }
    if options.wants(Path) {
        world.start_proxies(Serving::Pass)?;
        rounds(&world, &[Scene::Path], plan, data)?;
        if session.binaries().kind == ProxyKind::Ztunnel {
            world.start_tunnels()?;
            rounds(&world, &[Scene::Tunnel], plan, data)?;
        }
    }
    data.machine.disturbance = busy.disturbance(Busy::now()?, world.cpu_time()? - own);
    Ok(())
}

/// As many networks of each family and ports, none of which matters to the connections that are measured.
fn exclusions(session: &Arc<Session>, plan: Plan) -> Result<Many> {
    let few = {
        let world = World::new(session, Serving::Sink, &[])?;
        extra::compare(&world, plan.rounds, plan.length)?
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
        let world = World::new(session, Serving::Sink, &agent)?;
        extra::compare(&world, plan.rounds, plan.length)
    })?;
    Ok(Many { what: format!("{count} exclusions of each kind"), few, many })
}

/// Says what is done and how long it took.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = work().with_context(|| what.to_owned())?;
    eprintln!("{what}: {:.1} s", started.elapsed().as_secs_f32());
    Ok(result)
}

/// Every case in every arm, round by round; the arms of a case one right after the other, in changing order.
fn rounds(world: &World, scenes: &[Scene], plan: Plan, data: &mut Data) -> Result<()> {
    let cases: Vec<Case> = scenes.iter().flat_map(|&scene| Case::of(scene)).collect();
    for &case in &cases {
        for arm in case.arms() {
            let verified = traffic::verify(world, case, arm);
            verified.with_context(|| format!("{}, {case}, arm {}", case.scene.label(), arm.label()))?;
        }
    }
    for round in 0..plan.rounds {
        let started = Instant::now();
        for &case in &cases {
            let mut arms = case.arms();
            let turn = round % arms.len();
            arms.rotate_left(turn);
            for arm in arms {
                data.samples.push(traffic::measure(world, case, arm, round, plan.length)?);
            }
        }
        eprintln!(
            "{scenes:?}: round {} of {} took {:.1} s",
            round + 1,
            plan.rounds,
            started.elapsed().as_secs_f32()
        );
    }
    Ok(())
}
