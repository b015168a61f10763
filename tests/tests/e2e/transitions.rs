//! Running pods join and leave the mesh: clients, servers and probes notice nothing, except on connections that the proxy has
//! when a pod leaves.

use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::PROXY_PORTS;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::PodState;
use redirect_tests::load::{self, Tally, Target};
use redirect_tests::{Caller, Cluster, Connection, Families, Netns, Pod, Server, Stack, wait};
use socket2::{Protocol, Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::inspect::{explain, listeners};
use crate::load::is_full;
use crate::running_pods::{AMBIENT, Running, becomes};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "transitions::install_agent_first", |context, stack| {
        install(context, stack, First::Agent)
    });
    trials.extend(for_every_stack(context, "transitions::install_proxy_first", |context, stack| {
        install(context, stack, First::Proxy)
    }));
    for (name, flipped) in
        [("client", Flipped::CLIENT), ("server", Flipped::SERVER), ("client_and_server", Flipped::BOTH)]
    {
        let group = format!("transitions::enrolled_under_load_{name}");
        trials.extend(for_every_stack(context, &group, move |context, stack| {
            under_load(context, stack, flipped)
        }));
    }
    for (name, end) in [
        ("agent", End { adopted: false, by: By::Agent }),
        ("agent_of_running_pods", End { adopted: true, by: By::Agent }),
        ("command", End { adopted: false, by: By::Command }),
    ] {
        let group = format!("transitions::uninstalled_by_{name}");
        trials.extend(for_every_stack(context, &group, move |context, stack| uninstall(context, stack, end)));
    }
    for (name, said) in [("by_option", SaidBy::Option), ("by_annotation", SaidBy::Annotation)] {
        let group = format!("transitions::un_enrolled_with_grace_{name}");
        trials.extend(for_every_stack(context, &group, move |context, stack| grace(context, stack, said)));
    }
    trials.extend(for_every_stack(context, "transitions::half_open_outbound", half_open_outbound));
    trials.extend(for_every_stack(context, "transitions::half_open_inbound", half_open_inbound));
    trials.extend(for_every_stack(context, "transitions::captured_after_the_adoption", captured_after));
    trials
}

const NONE: [(&str, &str); 1] = [("istio.io/dataplane-mode", "none")];

/// Longer than any attempt may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The kernel sends a lost SYN again after this long. Other delays on a busy machine may be as long.
const RETRANSMISSION: Duration = Duration::from_secs(1);

/// The number of SYNs sent again in these namespaces so far.
fn retransmitted<'a>(places: impl Iterator<Item = &'a Netns>) -> Result<u64> {
    places.map(|netns| netns.statistic("netstat", "TcpExt", "TCPSynRetrans")).sum()
}

/// The pause between events.
const A_WHILE: Duration = Duration::from_millis(300);

/// The component that starts first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Agent,
    Proxy,
}

/// Installs the mesh on a node full of running pods, where none of its components has run before.
fn install(context: &Context, stack: Stack, first: First) -> Result<()> {
    let pods = if is_full() { 100 } else { 20 };
    let session = context.session()?;
    let cluster = Cluster::without_agent(&session)?;
    let node = cluster.node();
    let name = format!("kubelet-of-{}", node.netns().name());
    let kubelet = Caller::new(&session, &name)?;
    let other = node.plain("other", Families::Dual)?;
    let outside = other.listen(stack)?;
    let outward = other.endpoint(stack.family(), outside.port())?;
    let pods = (0..pods)
        .map(|_| {
            let running = Running::new(&cluster, Families::Dual)?;
            let server = running.pod.listen(stack)?;
            let inward = running.pod.endpoint(stack.family(), server.port())?;
            cluster.announce_running(&running.pod, &AMBIENT);
            Ok((running, server, inward))
        })
        .collect::<Result<Vec<_>>>()?;
    let targets: Vec<_> = pods
        .iter()
        .flat_map(|(running, _, inward)| {
            let from = running.pod.netns();
            [Target { from, stack, to: outward }, Target { from: other.netns(), stack, to: *inward }]
        })
        .collect();
    let inward: Vec<_> = pods.iter().map(|(_, _, inward)| stack.spell(*inward)).collect();
    let probes = kubelet.probe(node.netns(), stack, &inward, &node.dir().join("probes.log"))?;
    // A few hundred connections per second in total, because this is no test of throughput.
    let pause = Duration::from_millis(200);
    let undisturbed = load::paced(&targets, LIMIT, pause, || {
        thread::sleep(4 * A_WHILE);
        Ok(())
    })?;
    let places = || targets.iter().map(|target| target.from).chain([node.netns()]);
    let before = retransmitted(places())?;
    let tally = load::paced(&targets, LIMIT, pause, || {
        thread::sleep(A_WHILE);
        let agent = || cluster.start_agent(&["--probe-cgroups", &name]);
        match first {
            First::Agent => {
                agent()?;
                thread::sleep(2 * A_WHILE);
                node.start_proxy()?;
            }
            First::Proxy => {
                node.begin_proxy()?;
                agent()?;
            }
        }
        pods.iter().try_for_each(|(running, ..)| becomes(&cluster, &running.pod, Some("enabled")))?;
        thread::sleep(A_WHILE);
        Ok(())
    })?;
    let probes = probes.end()?;
    let again = retransmitted(places())? - before;
    let failed: Vec<_> = probes.iter().filter(|probe| probe.error.is_some()).collect();
    let slowest =
        probes.iter().map(|probe| Duration::from_micros(probe.microseconds)).max().unwrap_or_default();
    println!(
        "installed onto {} running pods, {first:?} first, {stack}: {tally}; undisturbed {:?}; {} probes, {} failed, slowest \
         {slowest:?}; {again} SYNs sent again",
        pods.len(),
        undisturbed.slowest,
        probes.len(),
        failed.len(),
    );
    ensure!(tally.failed.is_empty() && failed.is_empty(), "{tally}: {:#?}, {failed:#?}", tally.failed);
    let waited = tally.slowest.max(slowest) >= RETRANSMISSION;
    ensure!(again == 0 || !waited, "{again} SYNs sent again: {tally}; slowest probe {slowest:?}");
    ensure!(tally.succeeded() > 10 * pods.len() && probes.len() > pods.len(), "hardly any load: {tally}");
    for (Running { pod, .. }, ..) in &pods {
        outbound::passes_the_proxy_once(pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

/// Which end of a connection gets the label.
#[derive(Clone, Copy, Debug)]
struct Flipped {
    client: bool,
    server: bool,
}

impl Flipped {
    const CLIENT: Self = Self { client: true, server: false };
    const SERVER: Self = Self { client: false, server: true };
    const BOTH: Self = Self { client: true, server: true };
}

/// The label is set while clients connect as fast as they can.
fn under_load(context: &Context, stack: Stack, flipped: Flipped) -> Result<()> {
    let flips = if is_full() { 112 } else { 3 };
    let cluster = Cluster::start(&context.session()?, &[])?;
    let client = Running::new(&cluster, Families::Dual)?;
    let server = Running::new(&cluster, Families::Dual)?;
    let listening = server.pod.listen(stack)?;
    let to = server.pod.endpoint(stack.family(), listening.port())?;
    let ends = [(flipped.client, &client.pod), (flipped.server, &server.pod)];
    let flipped: Vec<&Pod> = ends.into_iter().filter_map(|(flipped, pod)| flipped.then_some(pod)).collect();
    let enroll = || {
        flipped.iter().for_each(|pod| cluster.announce_running(pod, &AMBIENT));
        flipped.iter().try_for_each(|pod| becomes(&cluster, pod, Some("enabled")))
    };
    let un_enroll = || {
        flipped.iter().for_each(|pod| cluster.announce_running(pod, &NONE));
        flipped.iter().try_for_each(|pod| {
            wait::until_true("end of the enrollment", wait::SOON, || {
                Ok(cluster.node().report(pod)?.is_none())
            })
        })
    };
    let targets = [Target { from: client.pod.netns(), stack, to }; 2];
    let places = || [client.pod.netns(), server.pod.netns()].into_iter();
    let mut again = 0;
    let (mut undisturbed, mut tally) = (Tally::default(), Tally::default());
    for _ in 0..flips {
        undisturbed += load::during(&targets, LIMIT, || {
            thread::sleep(A_WHILE);
            Ok(())
        })?;
        let before = retransmitted(places())?;
        tally += load::during(&targets, LIMIT, || {
            thread::sleep(A_WHILE / 3);
            enroll()?;
            thread::sleep(A_WHILE / 3);
            Ok(())
        })?;
        again += retransmitted(places())? - before;
        let captured = Connection::open_within(client.pod.netns(), stack, to, LIMIT)?;
        ensure!(!captured.is_direct(), "past the proxy: {:?}", captured.heard);
        un_enroll()?;
    }
    println!(
        "enrolled {} times, {:?}, {stack}: {tally}; {again} SYNs sent again; undisturbed {undisturbed}",
        flips,
        ends.map(|(flipped, _)| flipped)
    );
    ensure!(tally.failed.is_empty(), "{tally}: {:#?}", tally.failed);
    let waited = tally.slowest >= undisturbed.slowest + RETRANSMISSION / 2;
    ensure!(again == 0 || !waited, "{again} SYNs sent again: {tally}; undisturbed {undisturbed}");
    ensure!(tally.tried > 50 * flips, "hardly any load: {tally}");
    Ok(())
}

/// How a node's pods leave the mesh together.
#[derive(Clone, Copy, Debug)]
struct End {
    /// Whether they ran before they were enrolled.
    adopted: bool,
    by: By,
}

/// The component that un-enrolls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// An agent that removes everything when it stops.
    Agent,
    /// `redirect uninstall`, without an agent.
    Command,
}

/// A node full of pods leaves the mesh at once: only the connections that the proxy has at that moment break.
fn uninstall(context: &Context, stack: Stack, end: End) -> Result<()> {
    let count = if is_full() { 100 } else { 12 };
    let cluster = Cluster::start(&context.session()?, &[])?;
    let node = cluster.node();
    let other = node.plain("other", Families::Dual)?;
    let outside = other.listen(stack)?;
    let outward = other.endpoint(stack.family(), outside.port())?;
    let mut running = Vec::new();
    let mut added = Vec::new();
    for _ in 0..count {
        if end.adopted {
            let pod = Running::new(&cluster, Families::Dual)?;
            cluster.announce_running(&pod.pod, &AMBIENT);
            running.push(pod);
        } else {
            let pod = node.plain("pod", Families::Dual)?;
            cluster.announce(&pod, &[]);
            pod.enroll()?;
            added.push(pod);
        }
    }
    running.iter().try_for_each(|running| becomes(&cluster, &running.pod, Some("enabled")))?;
    let pods: Vec<&Pod> = running.iter().map(|running| &running.pod).chain(&added).collect();
    let servers = pods.iter().map(|pod| pod.listen(stack)).collect::<Result<Vec<_>>>()?;
    let mut targets = Vec::new();
    for (pod, server) in pods.iter().zip(&servers) {
        let inward = pod.endpoint(stack.family(), server.port())?;
        targets.push(Target { from: pod.netns(), stack, to: outward });
        targets.push(Target { from: other.netns(), stack, to: inward });
    }
    let mut held = pods.iter().map(|pod| pod.connect(stack, outward)).collect::<Result<Vec<_>>>()?;
    ensure!(held.iter().all(|held| !held.is_direct()), "past the proxy");
    if end.by == By::Command {
        node.kill_agent()?;
    }
    let places = || targets.iter().map(|target| target.from);
    let before = retransmitted(places())?;
    let pause = Duration::from_millis(100);
    let mut span = None;
    let tally = load::paced(&targets, LIMIT, pause, || {
        thread::sleep(2 * A_WHILE);
        let began = Instant::now();
        match end.by {
            By::Agent => node.stop_agent()?,
            By::Command => {
                let output = node.uninstall(&[])?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
        }
        span = Some((began, Instant::now()));
        thread::sleep(2 * A_WHILE);
        Ok(())
    })?;
    let (began, ended) = span.context("uninstall")?;
    let again = retransmitted(places())? - before;
    println!(
        "{count} pods, {end:?}, {stack}: {tally}; uninstalled in {:?}; {again} SYNs sent again",
        ended - began
    );
    // Each client has one connection at a time, which the proxy may still get for a moment after the removal begins.
    let late: Vec<_> = tally.failed.iter().filter(|failure| failure.start > ended).collect();
    ensure!(late.is_empty() && tally.failed.len() <= 2 * targets.len(), "{tally}: {:#?}", tally.failed);
    // The kernel drops packets that a pod sends at the moment when its device loses the filters' qdisc.
    let limit = if end.adopted { RETRANSMISSION } else { 2 * RETRANSMISSION };
    ensure!(again == 0 || tally.slowest < limit, "{again} SYNs sent again: {tally}");
    ensure!(tally.succeeded() > 4 * targets.len(), "hardly any load: {tally}");
    for (from, to) in targets.iter().map(|target| (target.from, target.to)) {
        ensure!(Connection::open(from, stack, to)?.is_direct(), "still captured");
    }
    if end.by == By::Agent && context.placement() == Placement::Pod {
        let hangs = |failure: &load::Failure| {
            ["timed out", "temporarily unavailable"].iter().any(|error| failure.error.contains(error))
        };
        ensure!(!tally.failed.iter().any(hangs), "they hang: {:#?}", tally.failed);
        for held in &mut held {
            ensure!(held.is_cut_within(RETRANSMISSION)?, "a connection of the proxy's hangs");
        }
        node.proxy_pid()?;
        for pod in &pods {
            let left = listeners(pod)?;
            ensure!(
                !left.iter().any(|(_, port)| PROXY_PORTS.contains(port)),
                "the proxy still listens: {left:?}"
            );
        }
    }
    Ok(())
}

/// Where the grace period is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SaidBy {
    Option,
    Annotation,
}

/// A pod leaves with a grace period: its new connections go directly at once, and those at the proxy continue for that period,
/// even if the agent is replaced. The pod may return in the meantime. The plugin added one of the pods; the agent adopted the
/// other.
fn grace(context: &Context, stack: Stack, said: SaidBy) -> Result<()> {
    const GRACE: Duration = Duration::from_secs(4);
    const ANNOTATION: &str = "ambient-redirect.io/unenroll-grace";
    // Longer on a slow machine.
    let seconds = wait::patient(GRACE).as_secs().to_string();
    let (option, annotations) = match said {
        SaidBy::Option => (&*seconds, &[][..]),
        SaidBy::Annotation => ("0", &[(ANNOTATION, &*seconds)][..]),
    };
    let arguments = ["--unenroll-grace", option];
    let cluster = Cluster::start(&context.session()?, &arguments)?;
    let node = cluster.node();
    let other = node.plain("other", Families::Dual)?;
    let (running, added);
    let pod = match said {
        SaidBy::Option => {
            added = node.plain("pod", Families::Dual)?;
            cluster.announce(&added, &[]);
            added.enroll()?;
            &added
        }
        SaidBy::Annotation => {
            running = Running::new(&cluster, Families::Dual)?;
            &running.pod
        }
    };
    let (inside, outside) = (pod.listen(stack)?, other.listen(stack)?);
    let inward = pod.endpoint(stack.family(), inside.port())?;
    let outward = other.endpoint(stack.family(), outside.port())?;
    let connect = || -> Result<[Connection; 2]> {
        Ok([pod.connect(stack, outward)?, Connection::open(other.netns(), stack, inward)?])
    };
    let enroll = || cluster.announce_annotated(pod, &AMBIENT, annotations);
    let leave = || cluster.announce_annotated(pod, &NONE, annotations);
    let state = || Ok::<_, anyhow::Error>(node.report(pod)?.map(|report| report.state));
    let reaches = |wanted: Option<PodState>| {
        wait::until_true(&format!("pod that is {wanted:?}"), wait::SOON, || Ok(state()? == wanted))
    };
    enroll();
    becomes(&cluster, pod, Some("enabled"))?;
    let mut held = connect()?;
    ensure!(held.iter().all(|held| !held.is_direct()), "past the proxy");

    leave();
    reaches(Some(PodState::Leaving))?;
    let mut direct = connect()?;
    ensure!(direct.iter().all(Connection::is_direct), "still captured");
    held.iter_mut().chain(&mut direct).try_for_each(|held| held.exchange("in between"))?;
    becomes(&cluster, pod, None)?;
    let (explanation, _) = explain(node, pod, &stack.spell(outward).to_string())?;
    ensure!(!explanation.captured && explanation.wrong.is_empty(), "{explanation:#?}");

    enroll();
    becomes(&cluster, pod, Some("enabled"))?;
    reaches(Some(PodState::Captured))?;
    ensure!(connect()?.iter().all(|captured| !captured.is_direct()), "past the proxy");

    leave();
    reaches(Some(PodState::Leaving))?;
    node.kill_agent()?;
    let began = Instant::now();
    cluster.start_agent(&arguments)?;
    ensure!(connect()?.iter().all(Connection::is_direct), "captured again by the next agent");
    reaches(Some(PodState::Leaving))?;
    held.iter_mut().chain(&mut direct).try_for_each(|held| held.exchange("before the end"))?;
    wait::until_true("end of the enrollment", GRACE + wait::SOON, || Ok(state()?.is_none()))?;
    ensure!(began.elapsed() >= wait::patient(GRACE), "only {:?}", began.elapsed());
    direct.iter_mut().try_for_each(|direct| direct.exchange("afterwards"))?;
    ensure!(connect()?.iter().all(Connection::is_direct), "still captured");
    if context.placement() == Placement::Pod {
        for held in &mut held {
            ensure!(held.is_cut_within(RETRANSMISSION)?, "a connection of the proxy's hangs");
        }
    }
    Ok(())
}

/// A namespace that drops incoming packets: answers to its connections, or packets that open connections to it.
pub(crate) struct Deaf<'a>(&'a Netns);

impl<'a> Deaf<'a> {
    pub(crate) fn new(netns: &'a Netns, flags: &str) -> Result<Self> {
        let deaf = Self(netns);
        deaf.nft(&format!(
            "table inet deaf {{ chain input {{ type filter hook input priority 0; tcp flags & (syn|ack) == {flags} counter drop\n }}\n }}\n"
        ))?;
        Ok(deaf)
    }

    fn nft(&self, rules: &str) -> Result<String> {
        let mut command = Command::new("nft");
        command.arg("-f").arg("-");
        Ok(String::from_utf8(self.0.output(command, rules.as_bytes())?)?)
    }

    /// Waits until it has dropped a packet.
    fn has_dropped(&self) -> Result<()> {
        wait::until_true("dropped packet", wait::SOON, || {
            let mut command = Command::new("nft");
            command.args(["list", "table", "inet", "deaf"]);
            let listed = String::from_utf8(self.0.output(command, b"")?)?;
            Ok(!listed.contains("counter packets 0 "))
        })
    }

    fn hears_again(self) -> Result<()> {
        self.nft("delete table inet deaf").map(drop)
    }
}

/// Enrolls a pod while a connection is half open. The connection completes as it began.
fn half_open(
    cluster: &Cluster,
    enrolled: &Pod,
    (from, listening): (&Pod, &Server),
    stack: Stack,
    deaf: Deaf<'_>,
    to: std::net::SocketAddr,
) -> Result<()> {
    let mut connection = thread::scope(|scope| {
        let attempt = scope.spawn(|| Connection::open_within(from.netns(), stack, to, 2 * LIMIT));
        deaf.has_dropped()?;
        cluster.announce_running(enrolled, &AMBIENT);
        becomes(cluster, enrolled, Some("enabled"))?;
        ensure!(!attempt.is_finished(), "an answer: {:?}", attempt.join());
        deaf.hears_again()?;
        attempt.join().map_err(|_| anyhow!("the client panicked"))?
    })?;
    connection.exchange("half a handshake later")?;
    ensure!(connection.transfer(&[1; 100_000])? == [1; 100_000]);
    ensure!(listening.accepted().len() == 1, "{:?}", listening.accepted());
    let direct = connection.is_direct();
    connection.finish()?;
    ensure!(direct || cluster.node().session().placement() == Placement::Node);
    Ok(())
}

/// The pod has sent a SYN, and sends it again after its enrollment.
fn half_open_outbound(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, Families::Dual)?;
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let deaf = Deaf::new(other.netns(), "syn")?;
    half_open(&cluster, pod, (pod, &listening), stack, deaf, to)?;
    outbound::passes_the_proxy_once(pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), pod, stack)
}

/// The pod has answered a SYN, and answers again after its enrollment.
fn half_open_inbound(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, Families::Dual)?;
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    let deaf = Deaf::new(other.netns(), "(syn|ack)").context("drop answers")?;
    half_open(&cluster, pod, (&other, &listening), stack, deaf, to)?;
    outbound::passes_the_proxy_once(pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), pod, stack)
}

/// While half-open connections may complete, new connections are captured: also that of a socket from before the enrollment, one
/// whose mark changes after `connect()`, and a subflow of MPTCP.
fn captured_after(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, Families::Dual)?;
    let listening = other.listen(stack)?;
    let to = stack.spell(other.endpoint(stack.family(), listening.port())?);
    let socket = |protocol| pod.netns().run(move || Socket::new(stack.domain(), Type::STREAM, protocol));
    let before = socket(None)??;
    cluster.announce_running(pod, &AMBIENT);
    becomes(&cluster, pod, Some("enabled"))?;
    let connect = |socket: Socket| -> Result<Connection> {
        socket.connect_timeout(&to.into(), wait::patient(wait::SOON))?;
        Connection::greeted(socket.into())
    };
    ensure!(!connect(before)?.is_direct(), "past the proxy: a socket from before");
    if pod.netns().has_sysctl("net.mptcp.enabled")? && pod.netns().sysctl("net.mptcp.enabled")? != "0" {
        ensure!(!connect(socket(Some(Protocol::MPTCP))??)?.is_direct(), "past the proxy: MPTCP");
    }
    // No proxy listens, so the first SYN is dropped. The next ones have another mark.
    cluster.node().kill_proxy()?;
    let accepted = listening.accepted().len();
    let forged = socket(None)??;
    forged.set_nonblocking(true)?;
    let started = forged.connect(&to.into());
    ensure!(started.is_err_and(|error| error.raw_os_error() == Some(libc::EINPROGRESS)));
    for mark in [0, 0x539] {
        forged.set_mark(mark)?;
        thread::sleep(Duration::from_millis(1600));
        ensure!(listening.accepted().len() == accepted, "past the proxy with mark {mark:#x}");
    }
    drop(forged);
    cluster.node().start_proxy()?;
    outbound::passes_the_proxy_once(pod, &other, stack)
}
