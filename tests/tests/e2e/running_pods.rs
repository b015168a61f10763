//! Running pods: found by their processes, enrolled by their labels, with everything that can go wrong.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::cgroup::Cgroup;
use redirect_tests::process::Process;
use redirect_tests::server::listen;
use redirect_tests::{Cluster, Connection, Families, Pod, Server, Stack, wait};

use crate::context::{Context, for_every_kind, for_every_stack, for_every_stack_in_pods};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "running_pods::follow_their_labels", labels);
    trials.extend(for_every_stack_in_pods(
        context,
        "running_pods::refused_by_the_proxy",
        "the proxy listens on the host: no application of a pod is in its way",
        refused,
    ));
    trials.extend(for_every_stack(context, "running_pods::known_without_the_api_server", without_api_server));
    trials
}

/// Their own labels.
pub(crate) const AMBIENT: [(&str, &str); 1] = [("istio.io/dataplane-mode", "ambient")];
const NONE: [(&str, &str); 1] = [("istio.io/dataplane-mode", "none")];

/// Longer than the retry intervals of proxy and agent.
const RETRIED: Duration = Duration::from_secs(20);

/// A pod that was created without our plugin, and a process in it, as a container runtime starts it.
pub(crate) struct Running {
    // In this order: the process ends before its cgroups do.
    _process: Process,
    _container: Cgroup,
    _cgroup: Cgroup,
    pub(crate) pod: Pod,
}

impl Running {
    pub(crate) fn new(cluster: &Cluster, families: Families) -> Result<Self> {
        let pod = cluster.node().plain("pod", families)?;
        let session = cluster.node().session();
        let cgroup = session.cgroup().child(&format!("pod{}", pod.identity().uid))?;
        let container = cgroup.child(&"c".repeat(64))?;
        let mut command = Command::new("sleep");
        command.arg("600");
        let log = cluster.node().dir().join(format!("{}.log", pod.identity().name));
        let process = Process::spawn("process of a pod", command, pod.netns(), &container, &log)?;
        Ok(Self { _process: process, _container: container, _cgroup: cgroup, pod })
    }
}

pub(crate) fn becomes(cluster: &Cluster, pod: &Pod, state: Option<&str>) -> Result<()> {
    let what = format!("annotation {state:?}");
    let waited = wait::until_true(&what, RETRIED, || Ok(cluster.redirection(pod).as_deref() == state));
    waited.with_context(|| format!("it is {:?}; events: {:?}", cluster.redirection(pod), cluster.events(pod)))
}

fn labels(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, families)?;
    cluster.announce_running(pod, &NONE);
    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    for _ in 0..2 {
        ensure!(pod.connect(stack, to)?.is_direct(), "enrolled, although it opts out");
        cluster.announce_running(pod, &AMBIENT);
        becomes(&cluster, pod, Some("enabled"))?;
        outbound::passes_the_proxy_once(pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
        cluster.announce_running(pod, &NONE);
        becomes(&cluster, pod, None)?;
        // A connection during the change may fail.
        wait::until_true("pod that is captured no longer", RETRIED, || {
            let attempt = Connection::open_within(pod.netns(), stack, to, Duration::from_secs(1));
            Ok(attempt.is_ok_and(|connection| connection.is_direct()))
        })?;
    }
    Ok(())
}

/// An application already has one of the proxy's ports: the pod continues as before, and is captured when the port is
/// free.
fn refused(context: &Context, stack: Stack) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let other = cluster.node().plain("other", Families::Dual)?;
    let mut squatted = Vec::new();
    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        let running = Running::new(&cluster, Families::Dual)?;
        let address = stack.spell(running.pod.endpoint(stack.family(), port)?);
        let squatter = running.pod.netns().run(|| listen(stack, address))??;
        cluster.announce_running(&running.pod, &AMBIENT);
        squatted.push((port, running, squatter));
    }
    for (port, Running { pod, .. }, _) in &squatted {
        becomes(&cluster, pod, Some("pending"))?;
        wait::until_true("refusal in the report", wait::SOON, || {
            let report = cluster.node().report(pod)?;
            let refusal = report.and_then(|report| report.proxy.err()).unwrap_or_default();
            Ok(refusal.contains(&port.to_string()))
        })?;
        let listening = Server::start(other.netns(), stack, 0, "other")?;
        let to = other.endpoint(stack.family(), listening.port())?;
        ensure!(pod.connect(stack, to)?.is_direct(), "captured, although nobody serves it");
    }
    // Other pods are unaffected.
    let bystander = Running::new(&cluster, Families::Dual)?;
    cluster.announce_running(&bystander.pod, &AMBIENT);
    becomes(&cluster, &bystander.pod, Some("enabled"))?;
    outbound::passes_the_proxy_once(&bystander.pod, &other, stack)?;

    let freed: Vec<Running> = squatted.into_iter().map(|(_, running, _)| running).collect();
    for Running { pod, .. } in &freed {
        becomes(&cluster, pod, Some("enabled"))?;
        outbound::passes_the_proxy_once(pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

/// The agent restarts while the API server is away: the pods of its checkpoints are in the proxy's snapshot, and stay.
fn without_api_server(context: &Context, stack: Stack) -> Result<()> {
    let keep = ["--on-exit", "keep", "--initial-wait", "1"];
    let cluster = Cluster::start(&context.session()?, &keep)?;
    let node = cluster.node();
    let other = node.plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, Families::Dual)?;
    cluster.announce_running(pod, &AMBIENT);
    becomes(&cluster, pod, Some("enabled"))?;
    let listening = other.listen(stack)?;
    let mut open = pod.connect(stack, other.endpoint(stack.family(), listening.port())?)?;
    cluster.api().set_away(true);
    node.end_agent()?;
    cluster.start_agent(&keep)?;
    node.wait_for_proxy()?;
    // The proxy resets the connections of pods that are not in its snapshot.
    open.exchange("still there")?;
    open.finish()?;
    ensure!(
        node.report(pod)?.is_some_and(|report| report.proxy.is_ok()),
        "the agent, or the proxy, forgot the pod"
    );
    outbound::passes_the_proxy_once(pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    cluster.api().set_away(false);
    // Changes are followed again once it is back.
    cluster.announce_running(pod, &NONE);
    becomes(&cluster, pod, None)
}
