//! Reconciles the enrolled pods with those that Kubernetes wants enrolled, and their annotations with the kernel.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use futures::StreamExt as _;
use kube::Client;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use super::admission::Admission;
use super::api::{PodView, REDIRECTION};
use super::informer::{self, Patience, pause};
use super::labels::Rules;
use super::queue::Queue;
use super::rules::{Decision, Reason, decide};
use super::sandboxes::Sandboxes;
use super::status::{Redirection, StatusWriter};
use super::store::{Known, Store};
use super::timing::Timing;
use crate::metrics::events::events;
use crate::pods::{Error, Pods, Standing, Wanted};
use crate::repairs::Repair;
use redirect_datapath::datapath::Datapath;
use redirect_protocol::pod::PodSettings;
use redirect_zds::server::PodProxyState;

/// How many pods are reconciled at once.
const WORKERS: usize = 8;

/// The API server's deadline for an annotation or an event.
const API: Duration = Duration::from_secs(10);

/// The state that is kept for a pod between reconciliations.
#[derive(Clone, Debug, Default)]
struct Memory {
    failures: u32,
    /// The last reported problem.
    complaint: Option<String>,
    /// Whether the event for it is still to be sent.
    untold: bool,
    events: Backoff,
    annotations: Backoff,
    /// The annotation that was last written. The informer shows it a little later.
    told: Option<(Option<Redirection>, Instant)>,
}

/// When to query the API server again after a failure. Other causes may reconcile the pod before.
#[derive(Clone, Copy, Debug, Default)]
struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    fn left(&self) -> Option<Duration> {
        self.until?.checked_duration_since(Instant::now())
    }

    fn failed(&mut self, patience: Patience) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let pause = pause(self.failures, patience);
        self.until = Some(Instant::now() + pause);
        pause
    }

    /// Whether to log it: the first failure and every tenth.
    fn is_worth_a_word(&self) -> bool {
        self.failures % 10 == 1
    }
}

/// See the module's documentation.
pub(crate) struct Controller<D> {
    client: Client,
    node: String,
    rules: Rules,
    timing: Timing,
    pods: Arc<Pods<D>>,
    store: Arc<Store>,
    queue: Arc<Queue>,
    sandboxes: Arc<Sandboxes>,
    status: StatusWriter,
    memory: Mutex<HashMap<String, Memory>>,
}

impl<D: Datapath + Send + 'static> Controller<D> {
    pub(crate) fn new(
        client: Client,
        node: String,
        rules: Rules,
        host_proc: PathBuf,
        pods: Arc<Pods<D>>,
        timing: Timing,
    ) -> Arc<Self> {
        let queue = Arc::new(Queue::default());
        Arc::new(Self {
            status: StatusWriter::new(client.clone(), &node),
            client,
            node,
            rules,
            timing,
            pods,
            store: Arc::new(Store::new(Arc::clone(&queue))),
            queue,
            sandboxes: Arc::new(Sandboxes::new(host_proc)),
            memory: Mutex::default(),
        })
    }

    /// The admission of pods from the CNI plugin.
    pub(crate) fn admission(&self) -> Admission {
        Admission {
            client: self.client.clone(),
            store: Arc::clone(&self.store),
            queue: Arc::clone(&self.queue),
            rules: self.rules.clone(),
            timing: self.timing,
        }
    }

    /// Runs until `stop` is true, and then completes the work in progress.
    pub(crate) async fn run(self: Arc<Self>, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
        let mut background = JoinSet::new();
        let patience = self.timing.api;
        let (client, rules, store) = (&self.client, &self.rules, &self.store);
        background.spawn(informer::pods(
            client.clone(),
            self.node.clone(),
            rules.clone(),
            Arc::clone(store),
            patience,
        ));
        background.spawn(informer::namespaces(client.clone(), rules.clone(), Arc::clone(store), patience));
        background.spawn(Arc::clone(&self).resync());
        background.spawn(Arc::clone(&self).follow_proxies());
        background.spawn(Arc::clone(&self).capture_served());
        background.spawn(Arc::clone(&self).tell_repairs());
        let mut workers = JoinSet::new();
        for _ in 0..WORKERS {
            workers.spawn(Arc::clone(&self).work(stop.clone()));
        }
        loop {
            tokio::select! {
                worker = workers.join_next() => match worker {
                    Some(ended) => ended.context("a worker")?,
                    None if *stop.borrow() => return Ok(()),
                    None => anyhow::bail!("all workers ended"),
                },
                Some(ended) = background.join_next(), if !*stop.borrow() => {
                    ended.context("a background task")?;
                    anyhow::bail!("a background task ended");
                }
            }
        }
    }

    /// Waits until the API server's lists are complete and everything possible has been reconciled.
    pub(crate) async fn caught_up(&self) {
        let mut changes = self.store.changes();
        while !self.store.is_synced() {
            if changes.changed().await.is_err() {
                return;
            }
        }
        // The queue may not have received all pods yet. And pods that the previous agent captured may not be wanted any
        // more.
        for uid in self.store.uids().into_iter().chain(self.pods.uids().await) {
            self.queue.add(&uid);
        }
        self.queue.idle().await;
    }

    /// Removes the pods' annotations, after [`Self::run`] has ended and nothing is captured. The permissions for that
    /// may already be gone.
    pub(crate) async fn retract(&self) {
        let annotated = |uid: String| {
            let Known { pod, .. } = self.store.pod(&uid)?;
            let told = self.memory().get(&uid).and_then(|memory| memory.told);
            let shown = told.map_or(pod.redirection.is_some(), |(state, _)| state.is_some());
            (shown && !self.rules.excluded.contains(&pod.namespace)).then_some(pod)
        };
        let pods: Vec<PodView> = self.store.uids().into_iter().filter_map(annotated).collect();
        let mut calls = futures::stream::iter(&pods)
            .map(|pod| async move { (pod, self.status.annotate(pod, None).await) })
            .buffer_unordered(WORKERS);
        let told = timeout(API, async {
            while let Some((pod, outcome)) = calls.next().await {
                outcome.with_context(|| format!("pod {}", pod.identity()))?;
            }
            anyhow::Ok(())
        });
        let error = match told.await {
            Ok(Ok(())) => {
                tracing::info!(pods = pods.len(), "removed the annotation from the node's pods");
                return;
            }
            Ok(Err(error)) => error,
            Err(_) => anyhow!("the API server did not answer within {API:?}"),
        };
        tracing::warn!(
            "pods that are no longer enrolled keep the annotation {REDIRECTION}: {error:#}; to remove it: \
             kubectl annotate pods --all --all-namespaces {REDIRECTION}-"
        );
    }

    /// The number of known pods on this node.
    pub(crate) fn known(&self) -> usize {
        self.store.uids().len()
    }

    async fn work(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            let uid = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                uid = self.queue.next() => uid,
            };
            let again = self.reconcile(&uid, &stop).await;
            self.queue.done(&uid);
            if let Some(delay) = again {
                self.queue.add_later(&uid, delay);
            }
        }
    }

    /// Reconciles everything periodically, because the kernel does not report every change by other software.
    async fn resync(self: Arc<Self>) {
        let mut ticks = interval(self.timing.resync);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            for uid in self.pods.uids().await {
                self.pods.resync(&uid).await;
                self.queue.add(&uid);
            }
            for uid in self.store.uids() {
                self.queue.add(&uid);
            }
        }
    }

    async fn follow_proxies(self: Arc<Self>) {
        let mut connections = self.pods.connections();
        while connections.changed().await.is_ok() {
            for uid in self.pods.uids().await {
                self.queue.add(&uid);
            }
        }
    }

    /// Captures running pods as soon as a proxy serves them.
    async fn capture_served(self: Arc<Self>) {
        let mut changes = self.pods.proxy_changes();
        while changes.changed().await.is_ok() {
            for uid in self.pods.served() {
                self.queue.add(&uid);
            }
        }
    }

    /// Reports repairs as events on the pods, because other software interferes with them.
    async fn tell_repairs(self: Arc<Self>) {
        let mut repairs = self.pods.repairs().subscribe();
        let mut ticks = interval(self.timing.events);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let Repair { pod, what } = tokio::select! {
                repair = repairs.recv() => match repair {
                    Ok(repair) => repair,
                    Err(RecvError::Lagged(_)) => continue,
                    Err(RecvError::Closed) => return,
                },
                _ = ticks.tick() => {
                    self.status.count_repeated().await;
                    continue;
                }
            };
            let Some(Known { pod, .. }) = self.store.pod(&pod.uid) else { continue };
            let message = format!("repaired after changes by other software on the node: {what}");
            match timeout(API, self.status.warn(&pod, "Repaired", &message)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(pod = %pod.identity(), %error, "cannot create event"),
                Err(_) => tracing::warn!(pod = %pod.identity(), "creating the event timed out"),
            }
        }
    }

    /// Reconciles one pod. Returns when to reconcile it again, if nothing happens before.
    async fn reconcile(&self, uid: &str, stop: &watch::Receiver<bool>) -> Option<Duration> {
        let Some(Known { pod, namespace }) = self.store.pod(uid) else {
            let mut memory = self.memory().remove(uid).unwrap_or_default();
            // Before that, an absent pod may not have been listed yet.
            if self.store.is_synced()
                && let Err(again) = self.forget(uid, &mut memory).await
            {
                self.memory().insert(uid.into(), memory);
                return Some(again);
            }
            return None;
        };
        let mut memory = self.memory().get(uid).cloned().unwrap_or_default();
        let decision = decide(&pod, namespace.as_ref(), &self.rules);
        let again = match decision {
            Decision::No(Reason::NamespaceUnknown) => None,
            Decision::No(reason) => self.unenroll(&pod, reason, &mut memory, stop).await,
            Decision::Refuse(bad) => {
                // The pod stays as it is, captured or not.
                let told = self.complain(&pod, "BadAnnotation", &bad.to_string(), &mut memory, stop).await;
                let shown = self.show(&pod, None, &mut memory, stop).await;
                [told, shown].into_iter().flatten().min()
            }
            Decision::Enroll(settings) => self.enroll(&pod, settings, &mut memory, stop).await,
        };
        self.memory().insert(uid.into(), memory);
        again
    }

    /// Un-enrolls a pod that Kubernetes knows, after the grace period of its connections at the proxy. Returns when to check
    /// again.
    async fn unenroll(
        &self,
        pod: &PodView,
        reason: Reason,
        memory: &mut Memory,
        stop: &watch::Receiver<bool>,
    ) -> Option<Duration> {
        if let Some(left) = self.pods.leave(&pod.uid, reason.grace(pod, &self.rules)).await {
            // Removes the annotation before the pod has left, because its peers have to know.
            let again = self.annotate(pod, None, memory, stop).await;
            return [again, Some(left)].into_iter().flatten().min();
        }
        match self.forget(&pod.uid, memory).await {
            Ok(was_enrolled) => {
                if was_enrolled {
                    tracing::info!(pod = %pod.identity(), uid = pod.uid, %reason, "pod was un-enrolled");
                }
                let Memory { told, annotations, .. } = std::mem::take(memory);
                *memory = Memory { told, annotations, ..Memory::default() };
                // The agent changes nothing in an excluded namespace.
                if reason == Reason::Excluded { None } else { self.annotate(pod, None, memory, stop).await }
            }
            Err(again) => Some(again),
        }
    }

    /// Un-enrolls a pod. Returns whether it was enrolled, or when to try again.
    async fn forget(&self, uid: &str, memory: &mut Memory) -> Result<bool, Duration> {
        self.pods.forget(uid).await.map_err(|error| {
            memory.failures = memory.failures.saturating_add(1);
            if memory.failures % 10 == 1 {
                tracing::error!(uid, %error, "pod that is no longer wanted is not un-enrolled");
            }
            pause(memory.failures, self.timing.api)
        })
    }

    async fn enroll(
        &self,
        pod: &PodView,
        settings: PodSettings,
        memory: &mut Memory,
        stop: &watch::Receiver<bool>,
    ) -> Option<Duration> {
        match self.capture(pod, settings).await {
            Ok(false) => None,
            Ok(true) => {
                memory.failures = 0;
                memory.complaint = None;
                self.show(pod, Some(Redirection::Pending), memory, stop).await
            }
            // Its sandbox ends before Kubernetes deletes it.
            Err(Error::TakenDown(_)) => None,
            Err(Error::NoNamespace(_)) if pod.terminating => None,
            Err(error) => {
                memory.failures = memory.failures.saturating_add(1);
                let reason = match &error {
                    Error::ForeignAddress { .. } => "ForeignAddress",
                    _ => "NotEnrolled",
                };
                // A pod that is being set up or torn down does not warrant a warning.
                let passing = matches!(error, Error::NoNamespace(_)) && memory.failures < 3;
                if !passing {
                    let _ = self.complain(pod, reason, &error.to_string(), memory, stop).await;
                }
                let _ = self.show(pod, Some(Redirection::Pending), memory, stop).await;
                Some(pause(memory.failures, self.timing.api))
            }
        }
    }

    /// Captures a pod, unless it is captured. Returns whether it is captured now; if not, it is too early.
    async fn capture(&self, pod: &PodView, settings: PodSettings) -> Result<bool, Error> {
        let wanted = Wanted { identity: pod.identity(), addresses: pod.addresses.clone(), settings };
        if self.pods.update(&wanted).await? {
            return Ok(true);
        }
        if pod.addresses.is_empty() {
            // Its sandbox does not exist yet. The plugin will add it.
            return Ok(false);
        }
        let (sandboxes, uids) = (Arc::clone(&self.sandboxes), pod.node_uids());
        let found = tokio::task::spawn_blocking(move || sandboxes.find(&uids)).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!(pod = %pod.identity(), %error, "cannot scan the node's processes");
                Vec::new()
            }
            Err(error) => {
                tracing::error!(pod = %pod.identity(), %error, "scanning the node's processes failed");
                Vec::new()
            }
        };
        self.pods.adopt(wanted, found).await.map(|()| true)
    }

    /// Sets the annotation to the pod's state; `otherwise` if it is not captured.
    async fn show(
        &self,
        pod: &PodView,
        otherwise: Option<Redirection>,
        memory: &mut Memory,
        stop: &watch::Receiver<bool>,
    ) -> Option<Duration> {
        let standing = self.pods.standing(&pod.uid).await;
        let unacknowledged = standing.as_ref().is_some_and(|standing| {
            standing.captured && !matches!(standing.proxy, PodProxyState::Acknowledged | PodProxyState::Kept)
        });
        let awaiting = standing.as_ref().is_some_and(|standing| standing.awaiting);
        // The informer is a little behind the last write.
        let shown = match memory.told {
            Some((told, _)) => told == Some(Redirection::Enabled),
            None => pod.redirection.as_deref() == Some(Redirection::Enabled.value()),
        };
        let state = match standing {
            None => otherwise,
            Some(
                Standing { captured: false, .. }
                | Standing { awaiting: true, .. }
                | Standing { proxy: PodProxyState::Refused(_), .. },
            ) => Some(Redirection::Pending),
            // A captured pod stays enabled while its proxy is away: by this annotation the mesh's control plane tells every
            // other proxy whether to encrypt traffic to the pod, and a node has hundreds of pods.
            Some(_) if shown || !unacknowledged => Some(Redirection::Enabled),
            Some(_) => Some(Redirection::Pending),
        };
        let again = self.annotate(pod, state, memory, stop).await;
        let poll = (unacknowledged || awaiting).then_some(self.timing.poll);
        [again, poll].into_iter().flatten().min()
    }

    /// Writes the annotation unless it is right. Returns when to retry.
    async fn annotate(
        &self,
        pod: &PodView,
        state: Option<Redirection>,
        memory: &mut Memory,
        stop: &watch::Receiver<bool>,
    ) -> Option<Duration> {
        if pod.redirection.as_deref() == state.map(Redirection::value) {
            memory.told = None;
            return None;
        }
        if let Some((told, at)) = memory.told
            && told == state
            && at.elapsed() < self.timing.poll
        {
            return Some(self.timing.poll);
        }
        if let Some(left) = memory.annotations.left() {
            return Some(left);
        }
        match self.call(self.status.annotate(pod, state), stop).await? {
            Ok(()) => {
                memory.told = Some((state, Instant::now()));
                memory.annotations = Backoff::default();
                None
            }
            Err(error) => {
                let pause = memory.annotations.failed(self.timing.api);
                events().patch_failed();
                if memory.annotations.is_worth_a_word() {
                    tracing::warn!(pod = %pod.identity(), uid = pod.uid, error, "cannot write the pod's \
                         annotation");
                }
                Some(pause)
            }
        }
    }

    /// Reports a pod's problem once, in the log and in Kubernetes. Returns when to retry.
    async fn complain(
        &self,
        pod: &PodView,
        reason: &str,
        message: &str,
        memory: &mut Memory,
        stop: &watch::Receiver<bool>,
    ) -> Option<Duration> {
        if memory.complaint.as_deref() != Some(message) {
            memory.complaint = Some(message.into());
            memory.untold = true;
            events().pod_refused(reason);
            tracing::warn!(pod = %pod.identity(), uid = pod.uid, reason, error = message, "cannot enroll pod");
        }
        if !memory.untold {
            return None;
        }
        if let Some(left) = memory.events.left() {
            return Some(left);
        }
        match self.call(self.status.warn(pod, reason, message), stop).await? {
            Ok(()) => {
                memory.untold = false;
                memory.events = Backoff::default();
                None
            }
            Err(error) => {
                let pause = memory.events.failed(self.timing.api);
                if memory.events.is_worth_a_word() {
                    tracing::warn!(pod = %pod.identity(), error, "cannot create event");
                }
                Some(pause)
            }
        }
    }

    /// Calls the API server; `None` if the agent stops meanwhile.
    async fn call(
        &self,
        call: impl Future<Output = Result<(), kube::Error>>,
        stop: &watch::Receiver<bool>,
    ) -> Option<Result<(), String>> {
        let mut stop = stop.clone();
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => None,
            called = timeout(API, call) => Some(match called {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("the API server did not answer within {API:?}")),
            }),
        }
    }

    fn memory(&self) -> MutexGuard<'_, HashMap<String, Memory>> {
        self.memory.lock()
    }
}
