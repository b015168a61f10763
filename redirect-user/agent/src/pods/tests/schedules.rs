//! ADDs, DELs, adoptions, repairs and readers of the same few pods run concurrently, in an order that a seed chooses. A task
//! yields wherever it waits, and before it takes a lock of [`Slots`]. So one thread reproduces, repeatably, the races of two
//! threads between locks.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, Wake, Waker};

use fastrand::Rng;
use futures::task::AtomicWaker;
use tokio::task::unconstrained;

use super::super::slots::scheduled::IN_SCHEDULE;
use super::*;

/// The number of schedules to try within [`TIME`]. `REDIRECT_SCHEDULES` sets a number without a time limit.
const SCHEDULES: u64 = 200;
const TIME: Duration = Duration::from_secs(10);

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Polls the tasks in an order that a seed chooses.
struct Schedule<'a> {
    tasks: Vec<(Option<Task>, Arc<Woken>)>,
    random: Rng,
    outside: Arc<AtomicWaker>,
    after_step: &'a mut dyn FnMut(),
}

struct Woken {
    is: AtomicBool,
    outside: Arc<AtomicWaker>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.is.store(true, Ordering::Release);
        self.outside.wake();
    }
}

impl<'a> Schedule<'a> {
    fn new(tasks: Vec<Task>, random: Rng, after_step: &'a mut dyn FnMut()) -> Self {
        let outside = Arc::<AtomicWaker>::default();
        let woken = || Arc::new(Woken { is: AtomicBool::new(true), outside: Arc::clone(&outside) });
        let tasks = tasks.into_iter().map(|task| (Some(task), woken())).collect();
        Self { tasks, random, outside: Arc::clone(&outside), after_step }
    }
}

impl Future for Schedule<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.outside.register(context.waker());
        loop {
            // The service for node proxies, and the proxy, are tasks of the runtime.
            if this.random.u8(..4) == 0 {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let left: Vec<usize> = (0..this.tasks.len()).filter(|i| this.tasks[*i].0.is_some()).collect();
            if left.is_empty() {
                return Poll::Ready(());
            }
            let ready = left.into_iter().filter(|i| this.tasks[*i].1.is.load(Ordering::Acquire));
            let Some(chosen) = this.random.choice(ready.collect::<Vec<_>>()) else { return Poll::Pending };
            let (task, woken) = &mut this.tasks[chosen];
            woken.is.store(false, Ordering::Release);
            let waker = Waker::from(Arc::clone(woken));
            IN_SCHEDULE.set(true);
            let polled = task.as_mut().unwrap().as_mut().poll(&mut Context::from_waker(&waker));
            IN_SCHEDULE.set(false);
            if polled.is_ready() {
                *task = None;
            }
            (this.after_step)();
        }
    }
}

/// Operations on pods `a` and `b`, which claim each other's addresses.
#[derive(Clone, Debug)]
enum Act {
    Add { container: usize, addresses: &'static [&'static str], netns: usize },
    Del { container: usize },
    Adopt { container: usize, addresses: &'static [&'static str], netns: usize },
    Update { uid: &'static str, addresses: &'static [&'static str] },
    Forget { uid: &'static str },
    Reconcile { uid: &'static str },
    Resync { uid: &'static str },
    LookAfter { uid: &'static str },
    Check { container: usize },
    Collect { valid: Vec<usize> },
    Report,
}

const CONTAINERS: [(&str, &str); 4] = [("a0", "a"), ("a1", "a"), ("b0", "b"), ("b1", "b")];
const ADDRESSES: [&[&str]; 4] = [&["10.0.0.2", "fd00::2"], &["10.0.0.2"], &["fd00::2"], &["fd00::3"]];
const STAYS: &[&str] = &["10.0.0.9", "fd00::9"];
/// Its namespace.
const STAYING: usize = 4;

fn any_act(random: &mut Rng) -> Act {
    let container = random.usize(..CONTAINERS.len());
    let uid = CONTAINERS[container].1;
    // Sandboxes follow each other, each with a namespace of its own.
    let netns = container / 2 * 2 + random.usize(..2);
    let addresses = ADDRESSES[random.usize(..ADDRESSES.len())];
    match random.u8(..16) {
        0..5 => Act::Add { container, addresses, netns },
        5..8 => Act::Del { container },
        8 => Act::Adopt { container, addresses, netns },
        9 => Act::Update { uid, addresses },
        10 => Act::Forget { uid },
        11 => Act::Reconcile { uid },
        12 => Act::Resync { uid },
        13 => Act::LookAfter { uid },
        14 if random.bool() => Act::Check { container },
        14 => Act::Collect { valid: (0..CONTAINERS.len()).filter(|_| random.bool()).collect() },
        _ => Act::Report,
    }
}

/// An operation that has started, and whether it succeeded, if it has ended.
type Begun = (Act, Option<bool>);

/// In the order of the starts.
#[derive(Debug, Default)]
struct History(Vec<Begun>);

struct World {
    _directory: TempDir,
    kernel: Fake,
    thread: DatapathHandle<Fake>,
    pods: Arc<Pods<Fake>>,
    /// Two of each pod, and that of the pod that stays.
    namespaces: Vec<(NetNs, u64)>,
    history: Arc<Mutex<History>>,
}

impl World {
    fn new() -> Self {
        let Node { directory, kernel, pods } = Node::start();
        let path = directory.path().join("acks.sock");
        let (server, proxies) = Server::bind(&path, Options::default()).unwrap();
        tokio::spawn(server.run(std::future::pending()));
        tokio::spawn(acknowledge(path));
        let defaults = defaults(Duration::from_secs(1));
        let pods = Pods { proxies, defaults, ..pods };
        let all: Vec<IpAddr> = ADDRESSES.iter().flat_map(|addresses| parse(addresses)).collect();
        let namespace = |name: &str, addresses: &[IpAddr]| {
            let path = directory.path().join(name);
            std::fs::File::create(&path).unwrap();
            let netns = NetNs::open(&path).unwrap();
            let cookie = netns.inode().unwrap();
            kernel.insert(cookie, addresses);
            (netns, cookie)
        };
        let mut namespaces: Vec<_> = ["a0", "a1", "b0", "b1"].map(|name| namespace(name, &all)).into();
        namespaces.push(namespace("stays", &parse(STAYS)));
        let thread = pods.kernel.clone();
        let history = Arc::default();
        Self { kernel, thread, pods: Arc::new(pods), namespaces, history, _directory: directory }
    }

    /// Waits for the datapath's thread, and for the one that writes files.
    fn settle(&self) {
        let (done, is_done) = mpsc::channel();
        // Works even if the polled task has used its share of the runtime's time.
        let job = std::pin::pin!(unconstrained(self.thread.run({
            let done = done.clone();
            move |_| done.send(()).unwrap()
        })));
        // This submits the job, whose result does not matter.
        let _ = job.poll(&mut Context::from_waker(Waker::noop()));
        tokio::task::spawn_blocking(move || done.send(()).unwrap());
        (0..2).for_each(|_| is_done.recv().unwrap());
    }

    fn stays(&self) {
        let facts = self.kernel.facts(self.namespaces[STAYING].1);
        let has = |fact: &Fact| facts.contains(fact);
        assert!(facts.iter().any(|fact| matches!(fact, Fact::Pod(_))), "the pod that stays is not enrolled");
        assert!(parse(STAYS).into_iter().all(|address| has(&Fact::Address(address))), "nor its addresses");
    }

    /// The acts as a task, one after the other.
    fn task(&self, acts: Vec<Act>) -> Task {
        let (pods, history) = (Arc::clone(&self.pods), Arc::clone(&self.history));
        let namespaces = self.namespaces.clone();
        Box::pin(async move {
            for act in acts {
                let number = {
                    let mut history = history.lock();
                    history.0.push((act.clone(), None));
                    history.0.len() - 1
                };
                let done = perform(&pods, &namespaces, act).await;
                history.lock().0[number].1 = Some(done);
            }
        })
    }

    /// Checks the invariants that hold while no operation runs.
    async fn is_consistent(&self) {
        let pods = &self.pods;
        let (mut containers, mut cookies) = (BTreeSet::new(), BTreeMap::new());
        for uid in pods.uids().await {
            let slot = pods.slots.find(&uid).await.unwrap();
            let known = slot.as_ref().unwrap_or_else(|| panic!("the place of {uid} is empty"));
            assert!(known.adding.is_empty() && known.phase == Phase::Done, "{uid}: an ADD has not ended");
            containers.extend(known.containers().cloned());
            let cookie = known.target.netns_cookie;
            let owner = pods.ownership.owner(cookie).map(|owner| owner.uid);
            if owner.as_deref() == Some(&uid) {
                cookies.insert(cookie, (uid, known.target.adoption == Adoption::Awaited));
            }
        }
        assert_eq!(pods.ownership.containers(), containers);
        let owners: BTreeSet<String> = pods.ownership.pods().into_iter().map(|owner| owner.uid).collect();
        let enrolled: BTreeSet<String> = cookies.values().map(|(uid, _)| uid.clone()).collect();
        assert_eq!(owners, enrolled, "owners of namespaces, and pods");
        let checkpoints = pods.checkpoints.read().unwrap();
        let checkpointed: BTreeMap<u64, String> = checkpoints
            .into_iter()
            .map(|checkpoint| (checkpoint.netns_cookie, checkpoint.identity.uid))
            .collect();
        for (_, cookie) in &self.namespaces {
            let is_captured = self.kernel.facts(*cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)));
            match cookies.get(cookie) {
                None => assert!(!is_captured, "{cookie} is captured, and nobody's"),
                Some((uid, true)) => assert!(!is_captured, "{uid} is captured too early"),
                Some((uid, false)) => {
                    assert!(is_captured, "{uid} is not captured");
                    assert_eq!(checkpointed.get(cookie), Some(uid), "the checkpoint of {uid}");
                }
            }
        }
        let known: BTreeSet<u64> = self.namespaces.iter().map(|(_, cookie)| *cookie).collect();
        assert!(checkpointed.keys().all(|cookie| known.contains(cookie)), "{checkpointed:?}");
        for (container, _) in self.deleted() {
            for uid in pods.uids().await {
                let slot = pods.slots.find(&uid).await.unwrap();
                let known = slot.as_ref().unwrap();
                let has = |attachment: &Attachment| attachment.container_id == container;
                let found = known.attachments.is_empty() && known.containers == [container.to_owned()].into();
                assert!(
                    !known.attachments.keys().any(has) && !found,
                    "{container} was deleted, and {uid} has it"
                );
            }
        }
    }

    /// The containers whose last DEL succeeded, and began after each of their ADDs.
    fn deleted(&self) -> Vec<(&'static str, &'static str)> {
        let history = self.history.lock();
        let is_deleted = |of: &usize| {
            let last = |is: &dyn Fn(&Begun) -> bool| history.0.iter().rposition(is);
            let added = last(&|(act, _)| match act {
                Act::Add { container, .. } | Act::Adopt { container, .. } => container == of,
                _ => false,
            });
            let deleted = last(&|(act, done)| {
                matches!(act, Act::Del { container } if container == of) && *done == Some(true)
            });
            deleted > added
        };
        (0..CONTAINERS.len()).filter(is_deleted).map(|of| CONTAINERS[of]).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let history = self.history.lock();
            history.0.iter().for_each(|(act, done)| eprintln!("{act:?}: {done:?}"));
            for (_, cookie) in &self.namespaces {
                eprintln!("{cookie}: {:?}", self.pods.ownership.owner(*cookie));
            }
        }
    }
}

async fn perform(pods: &Pods<Fake>, namespaces: &[(NetNs, u64)], act: Act) -> bool {
    match act {
        Act::Add { container, addresses, netns } => {
            let (container, uid) = CONTAINERS[container];
            let netns = namespaces[netns].0.clone();
            pods.add(attachment(container), wanted(uid, uid, addresses), netns).await.is_ok()
        }
        Act::Del { container } => pods.del(&attachment(CONTAINERS[container].0)).await.is_ok(),
        Act::Adopt { container, addresses, netns } => {
            let (container, uid) = CONTAINERS[container];
            let netns = namespaces[netns].0.clone();
            let sandbox = Sandbox { netns, containers: [container.to_owned()].into() };
            pods.adopt(wanted(uid, uid, addresses), vec![sandbox]).await.is_ok()
        }
        Act::Update { uid, addresses } => pods.update(&wanted(uid, uid, addresses)).await.is_ok(),
        Act::Forget { uid } => pods.forget(uid).await.unwrap(),
        Act::Reconcile { uid } => {
            pods.reconcile(uid).await;
            true
        }
        Act::Resync { uid } => {
            pods.resync(uid).await;
            true
        }
        Act::LookAfter { uid } => {
            pods.check_drift(uid).await;
            pods.check_drift("stays").await;
            true
        }
        Act::Check { container } => pods.check(&attachment(CONTAINERS[container].0), &[]).await.is_ok(),
        Act::Collect { valid } => {
            let valid = valid.into_iter().map(|container| attachment(CONTAINERS[container].0));
            pods.collect(&valid.chain([attachment("stays")]).collect::<Vec<_>>()).await;
            true
        }
        Act::Report => {
            let report = pods.report().await;
            pods.called("a").await;
            report.iter().any(|report| report.pod.uid == "stays")
        }
    }
}

async fn run(seed: u64) -> Arc<Mutex<History>> {
    let mut random = Rng::with_seed(seed);
    let world = World::new();
    let pods = &world.pods;
    pods.add(attachment("stays"), wanted("stays", "stays", STAYS), world.namespaces[STAYING].0.clone())
        .await
        .unwrap();
    let tasks =
        (0..random.usize(3..8)).map(|_| (0..random.usize(1..4)).map(|_| any_act(&mut random)).collect());
    let tasks: Vec<Vec<Act>> = tasks.collect();
    let tasks = tasks.into_iter().map(|acts| world.task(acts)).collect();
    let mut after_step = || {
        world.settle();
        world.stays();
    };
    Schedule::new(tasks, random, &mut after_step).await;
    // A pod that lost its namespace and got it back is captured again at the next resync.
    for uid in pods.uids().await {
        pods.reconcile(&uid).await;
    }
    world.is_consistent().await;
    for (container, _) in CONTAINERS {
        pods.del(&attachment(container)).await.unwrap();
    }
    for (_, uid) in CONTAINERS {
        pods.forget(uid).await.unwrap();
    }
    world.is_consistent().await;
    assert_eq!(pods.uids().await, ["stays"]);
    assert_eq!(pods.ownership.addresses(), parse(STAYS).into_iter().collect());
    assert!(pods.awaiting.lock().is_empty());
    for (_, cookie) in &world.namespaces[..STAYING] {
        assert_eq!(world.kernel.facts(*cookie), BTreeSet::new());
    }
    Arc::clone(&world.history)
}

#[test]
fn whatever_the_order_nothing_is_lost_or_left() {
    let number = |name| std::env::var(name).ok().map(|text: String| text.parse::<u64>().unwrap());
    let (count, time) = match number("REDIRECT_SCHEDULES") {
        Some(count) => (count, Duration::MAX),
        None => (SCHEDULES, TIME),
    };
    let seeds = match number("REDIRECT_SCHEDULE_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = fastrand::u64(..u64::MAX / 2);
            first..first + count
        }
    };
    let began = Instant::now();
    for seed in seeds.take_while(|_| began.elapsed() < time) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            // One thread writes files in the order of the requests.
            .max_blocking_threads(1)
            .build()
            .unwrap();
        println!("REDIRECT_SCHEDULE_SEED={seed}");
        runtime.block_on(run(seed));
    }
}
