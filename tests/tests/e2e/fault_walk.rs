//! Injects faults one after the other into everything that the agent requests from the kernel, from proxies and from the API
//! server, and that the plugin requests from the kernel and the agent: while pods are added and deleted, agents start and replace
//! each other, and everything is removed. The error names the cause, nothing is left, nothing bypasses the proxy, and the next
//! attempt succeeds. Some calls hang as well: enrolled pods must not notice.
//!
//! By default the test takes a sample of ADD and DEL with a seed that it prints; with `cargo xtask test --load` it takes every
//! point of all operations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use fastrand::Rng;
use libtest_mimic::Trial;
use redirect_testing::{ApiServer, Fault as Answer};
use redirect_tests::agent::Agent;
use redirect_tests::faults::{Fault, Faults, Point};
use redirect_tests::kernel::Footprint;
use redirect_tests::{Cluster, Families, Node, NodeOptions, Pod, Server, Stack, signals, wait};

use crate::context::{Context, trial};
use crate::load::is_full;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![trial(context, "fault_walk::points_and_operations", walk)]
}

/// The text of [`redirect_tests::faults::ERROR`] from strerror(3).
const CAUSE: &str = "Remote I/O error";

/// aya and the agent probe the kernel with these: any error counts as an answer, and the consequences are reported.
const TRIED: [&str; 4] = ["bpf MAP_CREATE", "bpf OBJ_GET", "bpf BTF_LOAD", "bpf PROG_LOAD"];

/// How long to test a sample of an operation's points.
const SAMPLE: Duration = Duration::from_secs(5);

/// How many occurrences of a point are tested per operation, if all points are.
const OCCURRENCES: usize = 5;

/// The faulty answers of the API server.
const ANSWERS: [Answer; 6] = [
    Answer::Status(500),
    Answer::Status(403),
    Answer::RetryAfter(429, 1),
    Answer::Malformed,
    Answer::HangUp,
    Answer::Stall,
];

/// The prefix of points that are requests to the API server.
const API: &str = "API ";

/// The fault at a point.
#[derive(Clone, Debug)]
enum Case {
    /// At the call with this number.
    Call(usize, Fault),
    /// At the first request.
    Request(Answer),
}

/// The operation during which points are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Add,
    Del,
    Restart,
    Upgrade,
    Uninstall,
}

impl Operation {
    const ALL: [Self; 5] = [Self::Add, Self::Del, Self::Restart, Self::Upgrade, Self::Uninstall];

    const fn label(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Restart => "restart",
            Self::Upgrade => "upgrade",
            Self::Uninstall => "uninstall",
        }
    }
}

/// The result of an operation with a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// It succeeded.
    Borne,
    /// It failed and named the cause.
    Named,
    /// The call hung, and the operation succeeded once it went on.
    Waited,
    /// The call did not occur this time.
    Missed,
}

impl Outcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Borne => "borne",
            Self::Named => "named",
            Self::Waited => "waited",
            Self::Missed => "missed",
        }
    }
}

fn walk(context: &Context) -> Result<()> {
    let seed = match env::var("REDIRECT_FAULTS_SEED") {
        Ok(seed) => seed.parse().context("REDIRECT_FAULTS_SEED")?,
        Err(_) => fastrand::u64(..),
    };
    let place = context.placement();
    println!("fault_walk: placement {place:?}, REDIRECT_FAULTS_SEED={seed}");
    let mut world = World::new(context)?;
    let mut random = Rng::with_seed(seed);
    let (mut table, mut wrong) = (Table::default(), Vec::new());
    for operation in operations() {
        let points =
            world.points(operation).with_context(|| format!("{} without a fault", operation.label()))?;
        let points: BTreeMap<Point, usize> =
            points.into_iter().filter(|(point, _)| is_chosen(point)).collect();
        let begun = Instant::now();
        let mut cases = cases(&points, &mut random);
        for (point, count) in &points {
            table.reached(point, operation, *count);
        }
        while let Some((point, case)) = cases.pop() {
            if !is_full() && begun.elapsed() > SAMPLE {
                break;
            }
            signals::check()?;
            let outcome = match &case {
                Case::Call(occurrence, fault) => world.with_fault(operation, &point, *occurrence, *fault),
                Case::Request(answer) => world.with_answer(operation, &point, answer),
            };
            match outcome {
                Ok(outcome) => table.outcome(&point, operation, outcome),
                Err(error) => {
                    let case = format!("{}, {point} {case:?}: {error:#}", operation.label());
                    eprintln!("fault_walk: {place:?}: {case}");
                    wrong.push(case);
                    world = World::new(context)?;
                }
            }
        }
    }
    println!("{table}");
    ensure!(wrong.is_empty(), "REDIRECT_FAULTS_SEED={seed}: {} cases: {wrong:#?}", wrong.len());
    Ok(())
}

/// The operations in `REDIRECT_FAULTS`, by comma-separated labels; by default the fast ones, or all.
fn operations() -> impl Iterator<Item = Operation> {
    let chosen = env::var("REDIRECT_FAULTS").ok();
    Operation::ALL.into_iter().filter(move |operation| match &chosen {
        Some(chosen) => chosen.split(',').any(|label| label == operation.label()),
        None => is_full() || matches!(operation, Operation::Add | Operation::Del),
    })
}

/// Whether a point has one of the prefixes in `REDIRECT_FAULT_POINTS`, if any are set.
fn is_chosen(point: &Point) -> bool {
    let chosen = env::var("REDIRECT_FAULT_POINTS").ok();
    chosen.is_none_or(|chosen| chosen.split(',').any(|start| point.starts_with(start)))
}

/// The test cases in random order: every point fails at its first call, its last, and some in between; and hangs once. A request
/// to the API server fails in every way.
fn cases(points: &BTreeMap<Point, usize>, random: &mut Rng) -> Vec<(Point, Case)> {
    let mut cases = Vec::new();
    for (point, &count) in points {
        if point.starts_with(API) {
            cases.extend(ANSWERS.map(|answer| (point.clone(), Case::Request(answer))));
            continue;
        }
        let mut occurrences = BTreeSet::from([1, count]);
        for _ in 0..OCCURRENCES.saturating_sub(2) {
            occurrences.insert(random.usize(1..=count));
        }
        let fails = |occurrence| (point.clone(), Case::Call(occurrence, Fault::Fails));
        cases.extend(occurrences.into_iter().map(fails));
        cases.push((point.clone(), Case::Call(random.usize(1..=count), Fault::Hangs)));
    }
    random.shuffle(&mut cases);
    cases
}

/// A node with two pods: one is added and deleted, the other stays enrolled and must not notice.
struct World {
    cluster: Cluster,
    node: Arc<Node>,
    pod: Pod,
    stays: Pod,
    /// Never enrolled; it has the server.
    other: Pod,
    /// How often [`Self::stir`] has run.
    stirred: AtomicU32,
    servers: Vec<(Stack, Server)>,
    /// The footprint of the pods without enrollment.
    clean: Footprint,
    clean_stays: Footprint,
}

impl World {
    fn new(context: &Context) -> Result<Self> {
        let options = NodeOptions { faults: true, ..NodeOptions::default() };
        let cluster = Cluster::without_agent_on(&context.session()?, options)?;
        cluster.start_agent(&arguments(&[]))?;
        let node = Arc::clone(cluster.node());
        node.start_proxy()?;
        let [pod, stays, other] = ["pod", "stays", "other"].map(|name| node.plain(name, Families::Dual));
        let (pod, stays, other) = (pod?, stays?, other?);
        let servers = Stack::ALL.map(|stack| anyhow::Ok((stack, other.listen(stack)?)));
        let servers = servers.into_iter().collect::<Result<_>>()?;
        let (clean, clean_stays) = (Footprint::of(pod.netns())?, Footprint::of(stays.netns())?);
        [&pod, &stays].into_iter().for_each(|pod| cluster.announce(pod, &[]));
        let stirred = AtomicU32::new(0);
        let world = Self { cluster, node, pod, stays, other, stirred, servers, clean, clean_stays };
        world.stays.enroll()?;
        Ok(world)
    }

    fn faults(&self) -> Result<&Faults> {
        self.node.faults()
    }

    /// The points that an operation reaches.
    fn points(&self, operation: Operation) -> Result<BTreeMap<Point, usize>> {
        self.prepare(operation)?;
        self.faults()?.arm(None);
        let done = self.act(operation);
        let mut points = self.faults()?.reached();
        done?;
        self.verify(operation, None, false)?;
        points.extend(self.requests(operation)?);
        Ok(points)
    }

    fn api(&self) -> &ApiServer {
        self.cluster.api()
    }

    /// The kinds of requests that the agent makes of the API server during an operation.
    fn requests(&self, operation: Operation) -> Result<BTreeMap<Point, usize>> {
        if operation == Operation::Uninstall {
            return Ok(BTreeMap::new());
        }
        self.prepare(operation)?;
        let before = self.api().kinds();
        self.stir(operation, || ());
        self.act(operation)?;
        self.is_told(operation)?;
        let made = self.api().kinds().into_iter().filter_map(|(kind, count)| {
            let made = count - before.get(&kind).unwrap_or(&0);
            (made > 0).then(|| (format!("{API}{kind}"), made))
        });
        let mut made: BTreeMap<Point, usize> = made.collect();
        if operation == Operation::Add {
            // It requests a single pod if the list takes too long.
            made.insert(GET_POD.into(), 1);
        }
        self.verify(operation, None, false)?;
        Ok(made)
    }

    /// Makes the agent list and watch again, and update the pods' annotations. Calls `arm` before the agent can send a
    /// request.
    fn stir(&self, operation: Operation, arm: impl FnOnce()) {
        let stirred = self.stirred.fetch_add(1, Ordering::Relaxed) + 1;
        let identity = self.pod.identity();
        if operation == Operation::Add {
            self.api().delete_pod(&identity.namespace, &identity.name);
        }
        arm();
        self.api().compact();
        self.api().cut_watches();
        // Without its annotation, which the agent restores.
        self.cluster.announce(&self.stays, &[]);
        self.cluster.announce(&self.other, &[(PORTS, &bad_port(stirred))]);
        self.cluster.announce(&self.pod, &[]);
    }

    /// Waits until the agent has made the updates after [`Self::stir`].
    fn is_told(&self, operation: Operation) -> Result<()> {
        let bad = bad_port(self.stirred.load(Ordering::Relaxed));
        let pods = [&self.stays, &self.pod];
        let enrolled = if operation == Operation::Add { &pods[..] } else { &pods[..1] };
        for pod in enrolled {
            wait::until_true("annotation", 6 * wait::SOON, || {
                Ok(self.cluster.redirection(pod).as_deref() == Some("enabled"))
            })
            .with_context(|| format!("{}: {:?}", pod.identity(), self.cluster.redirection(pod)))?;
        }
        wait::until_true("event", 6 * wait::SOON, || {
            Ok(self.cluster.events(&self.other).iter().any(|note| note.contains(&bad)))
        })
        .with_context(|| format!("{:?}", self.cluster.events(&self.other).last()))
    }

    /// The API server answers the first request of a kind badly, or not at all.
    fn with_answer(&self, operation: Operation, point: &Point, answer: &Answer) -> Result<Outcome> {
        self.prepare(operation)?;
        let kind = point.trim_start_matches(API);
        self.stir(operation, || {
            if point == GET_POD {
                self.api().fail_next("list pods: ", Answer::Stall);
            }
            self.api().fail_next(&format!("{kind}: "), answer.clone());
        });
        let done = self.act(operation);
        let happened = wait::until_true("request", 2 * wait::SOON, || Ok(self.api().faults_left() == 0));
        self.api().clear_faults();
        self.is_captured(&self.stays).context("while the API server fails")?;
        // Continues a request that hangs.
        self.api().cut_watches();
        let outcome = match (&done, happened) {
            (_, Err(_)) => Outcome::Missed,
            (Ok(()), Ok(())) if matches!(answer, Answer::Stall) => Outcome::Waited,
            (Ok(()), Ok(())) => Outcome::Borne,
            (Err(error), Ok(())) => {
                let text = format!("{error:#}");
                ensure!(text.contains("API server"), "the cause is not named: {text}");
                Outcome::Named
            }
        };
        if done.is_ok() {
            self.is_told(operation)?;
        }
        self.verify(operation, done.err(), false)?;
        Ok(outcome)
    }

    fn with_fault(
        &self,
        operation: Operation,
        point: &Point,
        occurrence: usize,
        fault: Fault,
    ) -> Result<Outcome> {
        self.prepare(operation)?;
        let faults = self.faults()?;
        faults.arm(Some((point, occurrence, fault)));
        let (done, hung) = thread::scope(|scope| {
            let acting = scope.spawn(|| self.act(operation));
            let mut hung = Ok(false);
            while !acting.is_finished() {
                if faults.is_hanging() {
                    // During removal, some connections are captured and others held.
                    hung = match operation {
                        Operation::Uninstall => Ok(true),
                        _ => self.is_captured(&self.stays).context("while the call hangs").map(|()| true),
                    };
                    faults.release();
                }
                thread::sleep(Duration::from_millis(5));
            }
            (acting.join().map_err(|_| anyhow!("the operation panicked")), hung)
        });
        let happened = faults.happened();
        faults.arm(None);
        faults.release();
        let (done, hung) = (done?, hung?);
        let outcome = match (&done, hung) {
            (Ok(()), false) if !happened => Outcome::Missed,
            (Ok(()), true) => Outcome::Waited,
            (Ok(()), false) => Outcome::Borne,
            (Err(error), _) => {
                let text = format!("{error:#}");
                let is_named = text.contains(CAUSE) || TRIED.contains(&point.as_str());
                ensure!(fault == Fault::Fails && is_named, "the cause is not named: {text}");
                Outcome::Named
            }
        };
        let mut error = done.err();
        if operation == Operation::Add && error.is_some() && point.starts_with("plugin") {
            // The agent may have completed the request without its answer arriving. The runtime deletes what it could not add.
            self.names_pod(error.take().as_ref())?;
            self.pod.unenroll().context("DEL after ADD failed")?;
            self.is_clean().context("after ADD failed")?;
            self.pod.enroll_alone().context("the next ADD")?;
        }
        self.verify(operation, error, point.contains("checkpoint"))?;
        Ok(outcome)
    }

    /// Establishes the operation's initial state.
    fn prepare(&self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Add => Ok(()),
            Operation::Del => self.pod.enroll(),
            Operation::Restart | Operation::Upgrade => self.node.kill_agent(),
            Operation::Uninstall => self.node.end_agent(),
        }
        .context("prepare")
    }

    fn act(&self, operation: Operation) -> Result<()> {
        match operation {
            Operation::Add => self.pod.enroll_alone(),
            Operation::Del => self.pod.unenroll(),
            Operation::Restart => self.start_agent(&[]),
            // Other capacities mean another layout of the maps.
            Operation::Upgrade => self.start_agent(&["--max-pods", "77"]),
            Operation::Uninstall => {
                let output = self.node.uninstall(&[])?;
                let said =
                    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
                ensure!(output.status.success(), "{}: {}", output.status, said.join("\n"));
                Ok(())
            }
        }
    }

    fn start_agent(&self, more: &[&str]) -> Result<()> {
        self.cluster.begin_agent(&arguments(more))?;
        self.node.with_agent(Agent::wait_until_ready)?;
        self.node.wait_for_proxy()
    }

    /// Nothing is left, nothing bypasses the proxy, and the next attempt succeeds. Faults of checkpoints show when the agent is
    /// replaced.
    fn verify(&self, operation: Operation, error: Option<anyhow::Error>, recorded: bool) -> Result<()> {
        self.no_panic()?;
        match operation {
            Operation::Add => {
                if error.is_some() {
                    self.names_pod(error.as_ref())?;
                    self.is_clean().context("after ADD failed")?;
                    self.pod.enroll_alone().context("the next ADD")?;
                }
                self.is_captured(&self.pod).context("after ADD")?;
                if recorded {
                    self.node.kill_agent()?;
                    self.start_agent(&[])?;
                    self.is_captured(&self.pod).context("with another agent")?;
                }
                self.pod.unenroll()?;
                self.is_clean().context("after DEL")?;
            }
            Operation::Del => {
                if error.is_some() {
                    self.pod.unenroll().context("the next DEL")?;
                }
                self.is_clean().context("after DEL")?;
                if recorded {
                    self.node.kill_agent()?;
                    self.start_agent(&[])?;
                    self.is_clean().context("with another agent")?;
                }
            }
            Operation::Restart | Operation::Upgrade => {
                if error.is_some() {
                    self.is_captured(&self.stays).context("without an agent")?;
                    self.start_agent(&[]).context("the next agent")?;
                }
                ensure!(self.node.report(&self.stays)?.is_some(), "the agent does not know the pod");
                wait::until_true("pod as it should be", wait::SOON, || Ok(self.stays.check().is_ok()))
                    .with_context(|| format!("{:?}", self.stays.check()))?;
                self.is_clean()?;
            }
            Operation::Uninstall => {
                if error.is_some() {
                    self.act(operation).context("the next uninstall")?;
                }
                let left = [self.node.pin_dir(), self.node.state_dir()];
                ensure!(left.iter().all(|directory| !directory.exists()), "one of {left:?} is left");
                let footprint = Footprint::of(self.stays.netns())?;
                let left = footprint.difference(&self.clean_stays);
                ensure!(left.is_empty(), "the pod is not as before: {left:#?}");
                self.start_agent(&[]).context("after uninstall")?;
                self.stays.enroll()?;
            }
        }
        self.is_captured(&self.stays)
    }

    fn names_pod(&self, error: Option<&anyhow::Error>) -> Result<()> {
        let text = error.map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(text.contains(&self.pod.identity().to_string()), "the pod is not named: {text}");
        Ok(())
    }

    fn no_panic(&self) -> Result<()> {
        let log = fs::read_to_string(self.node.dir().join("agent.log"))?;
        match log.lines().find(|line| line.contains("panicked")) {
            Some(line) => bail!("{line}"),
            None => Ok(()),
        }
    }

    /// Checks that nothing of the added and deleted pod is left anywhere.
    fn is_clean(&self) -> Result<()> {
        let footprint = Footprint::of(self.pod.netns())?;
        let left = footprint.difference(&self.clean);
        ensure!(left.is_empty(), "the pod is not as before: {left:#?}");
        let cookie = self.pod.netns().run(redirect_linux::netns::current_cookie)??;
        let status = self.node.status()?;
        let left = status.maps.iter().filter(|map| PODS.contains(&map.name.as_str()) && map.entries > 1);
        let left: Vec<_> = left.map(|map| format!("{} entries of {}", map.entries, map.name)).collect();
        ensure!(left.is_empty(), "{left:?}");
        ensure!(self.node.report(&self.pod)?.is_none(), "the agent knows the pod");
        for directory in [self.node.state_dir().join("pods"), self.node.pin_dir().join("links")] {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                let is_of_pod = path.file_stem().is_some_and(|name| {
                    name.to_string_lossy().split('-').any(|part| part == cookie.to_string())
                });
                ensure!(!is_of_pod, "{} is left", path.display());
            }
        }
        Ok(())
    }

    /// Whether the proxy has the connections of a pod.
    fn is_captured(&self, pod: &Pod) -> Result<()> {
        for (stack, server) in &self.servers {
            let connection = pod.connect(*stack, self.other.endpoint(stack.family(), server.port())?)?;
            ensure!(!connection.is_direct(), "past the proxy: {:?}", connection.heard);
        }
        Ok(())
    }
}

/// The agent requests a pod that is being added if the API server's list lacks it.
const GET_POD: &str = "API get pods";

/// An annotation whose value the agent refuses, with an event.
const PORTS: &str = "ambient-redirect.io/exclude-outbound-ports";

fn bad_port(number: u32) -> String {
    format!("http{number}-")
}

/// The maps with entries of pods.
const PODS: [&str; 3] = ["PODS", "POD_IPV4", "POD_IPV6"];

fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
    ["--on-exit", "keep"].iter().chain(more).copied().collect()
}

/// Points × operations.
#[derive(Debug, Default)]
struct Table(BTreeMap<Point, BTreeMap<Operation, Cell>>);

#[derive(Debug, Default)]
struct Cell {
    /// How often the point is reached.
    reached: usize,
    outcomes: BTreeMap<Outcome, usize>,
}

impl Table {
    fn cell(&mut self, point: &Point, operation: Operation) -> &mut Cell {
        self.0.entry(point.clone()).or_default().entry(operation).or_default()
    }

    fn reached(&mut self, point: &Point, operation: Operation, times: usize) {
        self.cell(point, operation).reached = times;
    }

    fn outcome(&mut self, point: &Point, operation: Operation, outcome: Outcome) {
        *self.cell(point, operation).outcomes.entry(outcome).or_default() += 1;
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        let labels = Operation::ALL.map(|operation| operation.label().to_owned());
        table.set_header(std::iter::once("point (calls)".to_owned()).chain(labels));
        for (point, cells) in &self.0 {
            let cell = |operation| match cells.get(&operation) {
                None => "-".to_owned(),
                Some(Cell { reached, outcomes }) => {
                    let outcomes =
                        outcomes.iter().map(|(outcome, times)| format!("{times} {}", outcome.label()));
                    format!("({reached}) {}", outcomes.collect::<Vec<_>>().join(", "))
                }
            };
            table.add_row(std::iter::once(point.clone()).chain(Operation::ALL.map(cell)));
        }
        write!(f, "{table}")
    }
}
