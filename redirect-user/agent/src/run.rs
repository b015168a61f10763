//! Assembles the agent, and shuts it down.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use redirect_ebpf::flow::FlowLimits;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch as signal_watch;

use super::checkpoints::{self, Checkpoints, Found, Phase};
use super::enrollment::{Enrollment, Everybody};
use super::flows::Flows;
use super::health::{self, Examined};
use super::node_proxies::NodeProxies;
use super::options::{LinkLocal, OnExit, Options, WithoutProxy};
use super::pods::{Defaults, Pods, Restored};
use super::probes;
use super::ready;
use super::service::Service;
use super::supervisor::{Stop, Supervisor};
use super::watch::Watch;
use super::{drift, placement_change, uninstall, upkeep};
use crate::kube::{self, Controller, OwnDaemonSet, Timing};
use crate::metrics::events::events;
use crate::metrics::server::Purpose;
use crate::{install, metrics};
use redirect_datapath::bpf_log;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::{Capacities, Linux, NotedBy, Pins, Settings};
use redirect_linux::netns::NetNs;
use redirect_linux::probe::{self, Requirements};
use redirect_linux::{cgroup, descriptors, privileges};
use redirect_protocol::placement::Placement;
use redirect_protocol::wire;
use redirect_protocol::wire::FeatureReport;
use redirect_zds as zds;

/// How long blocking calls may continue after everything else has ended.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// How long the agent captures nothing new while it searches for the kubelet's cgroup.
const PROBERS: Duration = Duration::from_secs(2);

/// The service for node proxies, which stops last.
const NODE_PROXIES: &str = "service for node proxies";

/// The service that keeps the plugin in the CNI chain, which stops first.
const CNI_CHAIN: &str = "CNI chain";

/// Runs until SIGTERM or SIGINT. `--on-exit` decides what happens to the pods then.
pub fn run(options: Options) -> anyhow::Result<()> {
    let found =
        probe::require(&Requirements { cgroup: options.cgroup.clone(), pin_dir: options.pin_dir.clone() })?;
    let features =
        found.into_iter().map(|check| FeatureReport { name: check.check, found: check.detail }).collect();
    privileges::keep(privileges::AGENT)?;
    descriptors::raise_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let outcome = runtime.block_on(serve(options, features));
    // A disk or process that does not respond must not delay the exit.
    runtime.shutdown_timeout(LAST_CALLS);
    outcome
}

async fn serve(options: Options, features: Vec<FeatureReport>) -> anyhow::Result<()> {
    let started = Instant::now();
    if let Err(error) = redirect_linux::proc_sys::make_writable() {
        tracing::warn!(%error, "cannot remount /proc/sys writable: pods cannot be enrolled");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminated = false;
    let cgroup = match &options.cgroup {
        Some(path) => path.clone(),
        None => tokio::task::spawn_blocking(cgroup::mount).await??,
    };
    let host_cookie =
        NetNs::current().and_then(|netns| netns.cookie()).context("cannot identify network namespaces")?;

    let capacities = Capacities {
        pods: options.max_pods,
        addresses: options.max_addresses.unwrap_or(options.max_pods),
        exclusions: options.max_exclusions,
    };
    let checkpoints = Checkpoints::open(&options.state_dir)
        .with_context(|| format!("cannot create the state directory {}", options.state_dir.display()))?;
    let node_proxies = NodeProxies::new(&options, &checkpoints)?;
    let settings = Settings {
        cgroup: cgroup.clone(),
        host_cookie,
        capacities,
        tc: options.tc,
        refuse: options.without_proxy == WithoutProxy::Refuse,
        link_local: options.link_local == LinkLocal::Pass,
        exclusions: options.exclude.exclusions(),
        proxy_identity: node_proxies.identity(options.proxy_identity),
        proxy_cgroups: node_proxies.known().await?,
        placement: options.placement,
        rule_priority: options.rule_priority,
        flows: FlowLimits { one_of: options.flow_sample, rate: options.flow_rate },
        diagnostics: bpf_log::is_wanted(),
        object: options.object,
        noted_by: options.listeners_noted_by.map_or_else(NotedBy::probe, Ok)?,
    };
    let defaults = Defaults {
        proxy_deadline: Duration::from_secs(options.proxy_deadline),
        dns: options.dns,
        any_source: !options.source_ip_verification,
    };
    let (pin_dir, earlier) = (options.pin_dir.clone(), checkpoints.clone());
    let (pins, found) = tokio::task::spawn_blocking(move || {
        // Takes the lock on the pins first, so that no other agent writes checkpoints.
        let pins = Pins::open(&pin_dir)?;
        anyhow::Ok((pins, checkpoints::find(earlier.read().context("cannot read the checkpoints of pods")?)?))
    })
    .await??;
    let captured = found.iter().filter(|found| found.checkpoint.phase == Phase::Done);
    let captured: Vec<_> = captured
        .filter_map(|Found { checkpoint, netns }| Some(defaults.checkpointed(checkpoint, netns.clone()?)))
        .collect();
    let note = checkpoints.early_demux();
    let (kernel, loaded) = DatapathHandle::start(move || Linux::load(&settings, pins, note, &captured))
        .context("datapath thread")?;
    loaded.await.context("the datapath thread ended")??;

    let (admission, admitting) = (kernel.clone(), node_proxies.clone());
    let on_connect: zds::server::OnConnect = Arc::new(move |peer| {
        let (node_proxies, kernel) = (admitting.clone(), admission.clone());
        Box::pin(async move { Ok(node_proxies.admit(&kernel, peer).await?) })
    });
    let (zds_server, proxies) = zds::server::Server::bind(
        &options.zds_socket,
        zds::server::Options {
            on_connect: Some(on_connect),
            recorder: Some(Arc::new(|event| events().zds(event))),
            ..zds::server::Options::default()
        },
    )?;
    let watch =
        Watch::new(options.placement == Placement::Node).context("cannot watch the interfaces of pods")?;
    // Listens before it takes over the pods, so that it misses no change.
    let mut events = Some(watch.listen().context("cannot watch the interfaces of pods")?);
    let pods = Arc::new(Pods::new(
        kernel.clone(),
        proxies.clone(),
        defaults,
        host_cookie,
        Some(Arc::clone(&watch)),
        checkpoints,
    ));
    let mut supervisor = Supervisor::new();
    // The kubelet's probes must be exempt before the agent captures more pods.
    let (looked, mut probers_looked) = signal_watch::channel(false);
    supervisor.restarting("probers", Stop::Cut, {
        let (probers, cgroup, kernel) = (options.probers, cgroup.clone(), kernel.clone());
        move || probes::follow(probers.clone(), cgroup.clone(), kernel.clone(), looked.clone())
    });
    let is_first = found.is_empty();
    let unknown = take_over(&kernel, &pods, found).await?;
    if tokio::time::timeout(PROBERS, probers_looked.wait_for(|looked| *looked)).await.is_err() {
        tracing::warn!(
            "looking for the kubelet's cgroup takes longer than {PROBERS:?}; until it is found, probes go \
             through the node proxy"
        );
    }
    let controller = controller(&options.kubernetes, &pods).await?;
    let daemonset = own_daemonset(&options.kubernetes).await;
    let enrollment: Arc<dyn Enrollment> = match &controller {
        Some(controller) => Arc::new(controller.admission()),
        None => Arc::new(Everybody { accounts: options.service_account.clone() }),
    };
    let (flows, reading) = Flows::start(kernel.clone(), Arc::clone(&pods), supervisor.stopped()).await?;
    let (reconciled_by, reconciled) = signal_watch::channel(controller.is_none());
    let chain = options.install_cni.then_some(options.chain);
    let (found, findings) = health::channel();
    let announced = findings.clone();
    let service = Arc::new(Service {
        pods: Arc::clone(&pods),
        enrollment,
        kernel: kernel.clone(),
        proxies,
        started,
        cgroup: cgroup.display().to_string(),
        features,
        placement: options.placement,
        flows,
        reconciled,
        findings,
        services: supervisor.services(),
    });
    let mut wire_server = Some(wire::server::Server::bind(&options.socket)?);
    forget_deleted(&pods, &options.socket).await;

    supervisor.restarting("service for CNI plugin and command line", Stop::Finishes, {
        let (service, stopped, socket) = (Arc::clone(&service), supervisor.stopped(), options.socket.clone());
        move || {
            let server = wire_server.take().map_or_else(|| wire::server::Server::bind(&socket), Ok);
            let (service, stopped) = (Arc::clone(&service), until_stopped(stopped.clone()));
            async {
                server?.serve(service, stopped).await;
                Ok(())
            }
        }
    });
    for (name, purpose, address) in [
        ("metrics over HTTP", Purpose::Metrics, options.metrics_address),
        ("health over HTTP", Purpose::Health, options.health_address),
    ] {
        let (service, stopped) = (Arc::clone(&service), supervisor.stopped());
        supervisor.restarting(name, Stop::Finishes, move || {
            let (service, stopped) = (Arc::clone(&service), until_stopped(stopped.clone()));
            async move {
                metrics::server::serve(purpose, address, service, stopped).await;
                Ok(())
            }
        });
    }
    supervisor.once("events of connections", Stop::Finishes, reading);
    let examined = Examined { kernel: kernel.clone(), chain: chain.clone() };
    supervisor.restarting("examination of kernel and CNI chain", Stop::Cut, move || {
        health::examine(examined.clone(), found.clone())
    });
    if let Some(controller) = controller.clone() {
        let (running, stopped) = (Arc::clone(&controller), supervisor.stopped());
        supervisor.restarting("Kubernetes controller", Stop::Finishes, move || {
            Arc::clone(&running).run(stopped.clone())
        });
        tokio::spawn(async move {
            controller.caught_up().await;
            tracing::info!(pods = controller.known(), "received the pods of this node");
            reconciled_by.send_replace(true);
        });
    }
    // A proxy drops every pod that its first snapshot does not contain. With checkpoints, it has its pods from an earlier agent
    // of this project, and the checkpoints name them. Otherwise it may have them from the mesh's own agent, and only the API
    // server knows them.
    if let Some(controller) = controller.as_ref().filter(|_| is_first || unknown > 0) {
        tokio::select! {
            () = catch_up(controller, options.kubernetes.initial_wait) => {}
            _ = terminate.recv() => terminated = true,
            _ = interrupt.recv() => terminated = true,
        }
    }
    // This service cannot restart: the agent announces pods through its handle, and a new socket would need a new one. It stops
    // when the proxies have released the pods that the agent leaves without capture.
    let (zds_stop, zds_stopped) = signal_watch::channel(false);
    supervisor.once(NODE_PROXIES, Stop::Finishes, async {
        zds_server.run(until_stopped(zds_stopped)).await;
        Ok(())
    });
    // The plugin must not enter the chain before the agent answers it.
    if let Some(chain) = chain.clone() {
        let stopped = supervisor.stopped();
        supervisor.restarting(CNI_CHAIN, Stop::Finishes, move || {
            let (chain, stopped) = (chain.clone(), stopped.clone());
            async {
                install::keep(chain, stopped).await;
                Ok(())
            }
        });
    }
    node_proxies.serve_node_ack(&mut supervisor, &kernel, &options.zds_socket);
    supervisor.restarting("take-over from the other placement", Stop::Cut, {
        let (kernel, pods) = (kernel.clone(), Arc::clone(&pods));
        move || placement_change::follow(kernel.clone(), Arc::clone(&pods))
    });
    supervisor.restarting("watch of pods' interfaces", Stop::Cut, {
        let (kernel, pods) = (kernel.clone(), Arc::clone(&pods));
        move || drift::follow(events.take(), Arc::clone(&watch), kernel.clone(), Arc::clone(&pods))
    });
    let every = Duration::from_secs(options.check_interval);
    supervisor.restarting("resync with the kernel", Stop::Cut, {
        let (kernel, pods) = (kernel.clone(), Arc::clone(&pods));
        move || upkeep::reconcile_all(every, kernel.clone(), Arc::clone(&pods))
    });
    supervisor.restarting("pods without a sandbox", Stop::Cut, {
        let (proc, pods) = (options.kubernetes.host_proc.clone(), Arc::clone(&pods));
        move || upkeep::leave_abandoned(proc.clone(), Arc::clone(&pods))
    });
    if bpf_log::is_wanted() {
        supervisor.once("log of the kernel side", Stop::Cut, bpf_log::follow(every, kernel));
    }
    let ready_task = tokio::spawn(ready::announce(announced));
    return_memory();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %options.socket.display(),
        zds_socket = %options.zds_socket.display(),
        cgroup = %cgroup.display(),
        milliseconds = started.elapsed().as_millis() as u64,
        "agent is ready"
    );

    if !terminated {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
    let stopping = Instant::now();
    redirect_linux::systemd::stopping();
    ready_task.abort();
    supervisor.stop();
    let last = is_last(daemonset.as_ref()).await;
    if let Some(chain) = chain {
        supervisor.join(CNI_CHAIN).await;
        if last {
            unchain(chain).await;
        }
    }
    supervisor.join_others(NODE_PROXIES).await;
    let remove = match options.on_exit {
        OnExit::Auto => last,
        OnExit::Keep => false,
        OnExit::Remove => true,
    };
    if remove {
        pods.shut_down().await;
    }
    zds_stop.send_replace(true);
    supervisor.join_all().await;
    if remove {
        let (pin_dir, state_dir) = (options.pin_dir, options.state_dir);
        let everything = uninstall::Options { pin_dir, state_dir, force: true, known_only: true };
        tokio::task::spawn_blocking(move || uninstall::uninstall(&everything)).await??;
        if let Some(controller) = controller {
            controller.retract().await;
        }
        tracing::info!(
            milliseconds = stopping.elapsed().as_millis() as u64,
            "agent has removed everything and exits"
        );
    } else {
        tracing::info!(
            milliseconds = stopping.elapsed().as_millis() as u64,
            "agent exits; pods stay enrolled until `redirect uninstall`"
        );
    }
    Ok(())
}

/// Takes over the previous agent's pods, and removes the remains of those that have ended. Returns the number of enrolled
/// namespaces without a checkpoint.
async fn take_over(
    kernel: &DatapathHandle<Linux>,
    pods: &Pods<Linux>,
    found: Vec<Found>,
) -> anyhow::Result<usize> {
    let began = Instant::now();
    let restored = pods.restore(found).await;
    let known = pods.cookies().await;
    let unknown = kernel.run(move |linux| linux.collect(&known)).await??;
    for netns_cookie in &unknown {
        tracing::warn!(
            netns_cookie,
            "network namespace is enrolled but has no checkpoint: it stays enrolled, and the node proxy \
             does not serve it; restart its pod, or run `redirect uninstall`"
        );
    }
    if restored != Restored::default() {
        tracing::info!(
            adopted = restored.adopted,
            undone = restored.undone,
            gone = restored.gone,
            milliseconds = began.elapsed().as_millis() as u64,
            "adopted the pods of the previous agent"
        );
    }
    Ok(unknown.len())
}

/// Removes the pods that the runtime deleted while no agent ran.
async fn forget_deleted(pods: &Pods<Linux>, socket: &Path) {
    let deleted = wire::deletions::read(socket).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read which pods were deleted while no agent ran");
        Vec::new()
    });
    for attachment in deleted {
        if let Err(error) = pods.del(&attachment).await {
            tracing::warn!(?attachment, %error, "cannot un-enroll a pod that was deleted while no agent ran");
        } else if let Err(error) = wire::deletions::take_back(socket, &attachment) {
            tracing::warn!(?attachment, %error, "cannot remove the note of a deletion");
        }
    }
}

/// The Kubernetes controller, if it is enabled.
async fn controller(
    options: &kube::Options,
    pods: &Arc<Pods<Linux>>,
) -> anyhow::Result<Option<Arc<Controller<Linux>>>> {
    if !options.kubernetes {
        return Ok(None);
    }
    let node = options.node_name.clone().context("--kubernetes needs --node-name, or NODE_NAME")?;
    let client = kube::client(kube::config(options.kubeconfig.as_deref()).await?)?;
    let (rules, proc, pods) = (options.rules(), options.host_proc.clone(), Arc::clone(pods));
    Ok(Some(Controller::new(client, node, rules, proc, pods, Timing::default())))
}

/// Waits for the API server's first answer and the pods in it.
async fn catch_up(controller: &Controller<Linux>, seconds: u64) {
    let limit = if seconds == 0 { Duration::MAX } else { Duration::from_secs(seconds) };
    if tokio::time::timeout(limit, controller.caught_up()).await.is_err() {
        tracing::warn!(
            seconds,
            "no pod list from the API server yet: serving node proxies without the pods that have no checkpoint"
        );
    }
}

async fn own_daemonset(options: &kube::Options) -> Option<OwnDaemonSet> {
    let (name, namespace) = (options.daemonset.as_ref()?, options.pod_namespace.as_ref()?);
    match OwnDaemonSet::watch(options.kubeconfig.as_deref(), namespace, name).await {
        Ok(daemonset) => Some(daemonset),
        Err(error) => {
            tracing::warn!(
                "cannot watch DaemonSet {namespace}/{name}: {error:#}; on exit, pods stay enrolled and the \
                 CNI chain keeps the plugin. If no other agent follows, run `redirect uninstall`"
            );
            None
        }
    }
}

/// Whether no other agent will follow on this node, because the DaemonSet is gone or being deleted.
async fn is_last(daemonset: Option<&OwnDaemonSet>) -> bool {
    let Some(daemonset) = daemonset else { return false };
    daemonset.is_deleted().await.unwrap_or_else(|error| {
        tracing::warn!(
            "cannot read the agent's DaemonSet, and did not see it deleted: {error:#}; pods stay enrolled, \
             the CNI chain keeps the plugin, and new pods wait for the next agent. If no other agent \
             follows, run `redirect uninstall`"
        );
        false
    })
}

/// Removes the plugin from the CNI chain.
async fn unchain(chain: install::Options) {
    match tokio::task::spawn_blocking(move || install::remove(&chain.directories)).await {
        Ok(Ok(changed)) => {
            let changed: Vec<_> = changed.iter().map(|path| path.display().to_string()).collect();
            tracing::info!(changed = changed.join(" "), "removed the plugin from the CNI chain");
        }
        Ok(Err(error)) => tracing::error!("cannot remove the plugin from the CNI chain: {error}"),
        Err(error) => tracing::error!("cannot remove the plugin from the CNI chain: {error}"),
    }
}

async fn until_stopped(mut stopped: signal_watch::Receiver<bool>) {
    // An error means that the sender is gone, which also means to stop.
    let _ = stopped.wait_for(|stop| *stop).await;
}

/// Returns memory to the system: the allocator would keep 9 MiB that the kernel's BTF and the object needed.
fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions; it works under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
