//! Proxies that are replaced, in order or by a crash, while applications connect.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::load::{self, Tally, Target};
use redirect_tests::{Families, Node, NodeOptions, Pod, ProxyOptions, Server, Stack, wait};

use crate::context::{Context, for_every_stack};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "hand_over::two_proxies_at_once", two_at_once);
    trials.extend(for_every_stack(context, "hand_over::rolling_upgrade_fails_no_attempt", rolling_upgrade));
    trials.extend(for_every_stack(context, "hand_over::killed_proxy_holds", |context, stack| {
        killed(context, stack, "hold")
    }));
    trials.extend(for_every_stack(context, "hand_over::killed_proxy_refuses", |context, stack| {
        killed(context, stack, "refuse")
    }));
    trials
}

/// Longer than any attempt may take: a held SYN is retransmitted after 1, 3 and 7 seconds.
const LIMIT: Duration = Duration::from_secs(15);

/// The pause between events.
const A_WHILE: Duration = Duration::from_millis(300);

/// A pod that accepts and opens connections.
struct Scene {
    stack: Stack,
    node: Arc<Node>,
    pod: Pod,
    other: Pod,
    outside: Server,
    inside: Server,
}

impl Scene {
    fn new(context: &Context, stack: Stack, setting: &str) -> Result<Self> {
        let options = NodeOptions {
            proxy: false,
            agent_arguments: vec![format!("--without-proxy={setting}")],
            ..NodeOptions::default()
        };
        let node = Node::with(&context.session()?, options)?;
        node.start_proxy_with(&ProxyOptions { drain: 2, ..ProxyOptions::default() })?;
        let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
        Ok(Self { stack, outside: other.listen(stack)?, inside: pod.listen(stack)?, node, pod, other })
    }

    /// The results of connections in both directions while something happens.
    fn during(&self, act: impl FnOnce() -> Result<()>) -> Result<Tally> {
        let outward = self.other.endpoint(self.stack.family(), self.outside.port())?;
        let inward = self.pod.endpoint(self.stack.family(), self.inside.port())?;
        let targets = [
            Target { from: self.pod.netns(), stack: self.stack, to: outward },
            Target { from: self.other.netns(), stack: self.stack, to: inward },
        ];
        let tally = load::during(&targets, LIMIT, act)?;
        ensure!(tally.bypassed == 0, "past the proxy: {tally}");
        ensure!(self.accepted() >= tally.succeeded(), "{} accepted: {tally}", self.accepted());
        Ok(tally)
    }

    fn accepted(&self) -> usize {
        self.outside.accepted().len() + self.inside.accepted().len()
    }

    fn works(&self) -> Result<()> {
        outbound::passes_the_proxy_once(&self.pod, &self.other, self.stack)?;
        inbound::passes_the_proxy_once(self.other.netns(), &self.pod, self.stack)
    }
}

/// The new proxy gets the pods while the old one serves them, then the old one drains and ends.
fn rolling_upgrade(context: &Context, stack: Stack) -> Result<()> {
    let session = context.session()?;
    // They outlive the node, and with it the last proxy.
    let cgroup = |number: u32| session.cgroup().child(&format!("upgraded-{number}-{}", stack.label()));
    let cgroups = [cgroup(1)?, cgroup(2)?];
    let scene = Scene::new(context, stack, "hold")?;
    let tally = scene.during(|| {
        thread::sleep(A_WHILE);
        for cgroup in &cgroups {
            let before = scene.node.proxy_pid()?;
            let options = ProxyOptions { cgroup: Some(cgroup), drain: 2, ..ProxyOptions::default() };
            scene.node.start_proxy_with(&options)?;
            ensure!(scene.node.proxy_pid()? != before);
            thread::sleep(A_WHILE);
        }
        Ok(())
    })?;
    println!("rolling upgrade, {stack}: {tally}");
    ensure!(tally.failed.is_empty(), "{tally}: {:#?}", tally.failed);
    ensure!(tally.tried > 100, "hardly any load: {tally}");
    wait::until_true("entry in the access logs for each connection", wait::SOON, || {
        Ok(scene.pod.proxied_at_all()?.len() >= tally.tried)
    })?;
    ensure!(scene.pod.proxied_at_all()?.len() == scene.accepted());
    scene.works()
}

/// New pods go to the newest proxy; removals go to both.
fn two_at_once(context: &Context, stack: Stack) -> Result<()> {
    let session = context.session()?;
    let cgroup = session.cgroup().child(&format!("second-{}", stack.label()))?;
    let node = Node::start(&session)?;
    let (old, other) = (node.enrolled("old", Families::Dual)?, node.plain("other", Families::Dual)?);
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let mut connection = old.connect(stack, to)?;
    let first = node.proxy_pid()?;
    let options = ProxyOptions { cgroup: Some(&cgroup), ..ProxyOptions::default() };
    let _first = node.start_another_proxy(&options)?;
    let new = node.enrolled("new", Families::Dual)?;
    outbound::passes_the_proxy_once(&new, &other, stack)?;
    let second = node.proxy_pid()?;
    let acknowledged = || -> Result<_> {
        let proxies = node.status()?.proxies;
        Ok([first, second].map(|pid| Some(proxies.iter().find(|proxy| proxy.pid == pid)?.acknowledged)))
    };
    ensure!(acknowledged()? == [Some(1), Some(2)], "{:#?}", node.status()?.proxies);

    connection.exchange("through the old one").context("while both run")?;
    old.unenroll()?;
    ensure!(connection.is_cut_within(Duration::from_secs(3))?, "the old proxy was not told");
    ensure!(old.connect(stack, to)?.is_direct(), "a proxy was not told");
    ensure!(acknowledged()? == [Some(0), Some(1)], "{:#?}", node.status()?.proxies);
    inbound::passes_the_proxy_once(other.netns(), &new, stack)
}

/// Connections of the killed proxy are reset. From then on they are held or refused until there is another
/// proxy.
fn killed(context: &Context, stack: Stack, setting: &str) -> Result<()> {
    let scene = Scene::new(context, stack, setting)?;
    let mut dead = None;
    let tally = scene.during(|| {
        thread::sleep(A_WHILE);
        let killed = Instant::now();
        scene.node.kill_proxy()?;
        dead = Some((killed, Instant::now()));
        thread::sleep(A_WHILE);
        scene.node.start_proxy()?;
        thread::sleep(A_WHILE);
        Ok(())
    })?;
    println!("killed proxy, {setting}, {stack}: {tally}");
    let Some((killed, noticed)) = dead else { anyhow::bail!("nobody was killed") };
    for failure in &tally.failed {
        ensure!(failure.end > killed, "failed before the proxy did: {failure:?}");
        let refused = setting == "refuse" && failure.error.contains("Connection refused");
        ensure!(failure.start < noticed || refused, "neither held nor refused: {failure:?}");
    }
    let late = tally.failed.iter().any(|failure| failure.start > noticed);
    ensure!(late == (setting == "refuse"), "{tally}");
    scene.works()
}
