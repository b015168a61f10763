//! The pods that the proxy serves, as requested by the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::context::Context;
use super::listener::{Listeners, Phase};
use super::{Identity, Shared};
use redirect_linux::netns::NetNs;
use redirect_linux::systemd;
use redirect_zds::client::Workloads;
use redirect_zds::messages::WorkloadInfo;

/// The pods, each with a task of its own.
#[derive(Debug)]
pub(super) struct Pods {
    shared: Shared,
    pods: BTreeMap<String, Pod>,
}

#[derive(Debug)]
struct Pod {
    context: Arc<Context>,
    /// Whether the listeners are open. If not, the task retries, and so does the agent's next `Add`.
    serving: Arc<AtomicBool>,
    phase: watch::Sender<Phase>,
    task: JoinHandle<()>,
}

impl Pods {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared, pods: BTreeMap::new() }
    }

    /// The host in place of pods: its listeners serve all of them.
    pub(super) async fn on_node(shared: Shared, host: NetNs) -> Self {
        let identity = Identity { name: "of the node".into(), uid: "".into() };
        let context = Arc::new(Context::new(shared.clone(), identity, host));
        let listeners = match Listeners::open(&context).await {
            Ok(listeners) => {
                systemd::ready("serving the pods of the node");
                Some(listeners)
            }
            Err(error) => {
                tracing::error!("{error}; next attempt in {:?}", shared.retry);
                None
            }
        };
        Self { shared, pods: BTreeMap::from([(String::new(), Pod::start(context, listeners))]) }
    }

    /// Stops accepting, and resets the connections that are still open after this time.
    pub(super) async fn drain(self, time: Duration) {
        let deadline = Instant::now() + time;
        for pod in self.pods.values() {
            pod.phase.send_replace(Phase::Drain);
        }
        for mut pod in self.pods.into_values() {
            if timeout_at(deadline, &mut pod.task).await.is_err() {
                pod.cut().await;
            }
        }
    }
}

impl Workloads for Pods {
    async fn add(&mut self, uid: String, info: WorkloadInfo, netns: NetNs) -> Result<(), String> {
        let name = format!("{}/{}", info.namespace, info.name);
        if let Some(known) = self.pods.get(&uid) {
            if known.serving.load(Ordering::Acquire) && is_same(&known.context.netns, &netns) {
                return Ok(());
            }
            // Its namespace was replaced, or its listeners could not be opened: the agent's new request replaces
            // it.
            self.remove(&uid).await;
        }
        let identity = Identity { name: name.as_str().into(), uid: uid.as_str().into() };
        let context = Arc::new(Context::new(self.shared.clone(), identity, netns));
        let opened = Listeners::open(&context).await;
        let (listeners, outcome) = match opened {
            Ok(listeners) => (Some(listeners), Ok(())),
            Err(error) => (None, Err(format!("pod {name}: {error}"))),
        };
        match &outcome {
            Ok(()) => tracing::info!("pod {name}: served"),
            Err(error) => tracing::warn!("{error}; next attempt in {:?}", self.shared.retry),
        }
        self.pods.insert(uid, Pod::start(context, listeners));
        outcome
    }

    async fn remove(&mut self, uid: &str) {
        if let Some(pod) = self.pods.remove(uid) {
            tracing::info!("pod {}: no longer served", pod.context.identity.name);
            pod.cut().await;
        }
    }

    async fn retain(&mut self, uids: &BTreeSet<String>) {
        let gone: Vec<String> = self.pods.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        for uid in gone {
            self.remove(&uid).await;
        }
        // The agent has sent every pod of the node.
        systemd::ready("serving the pods of the agent");
    }
}

impl Pod {
    fn start(context: Arc<Context>, listeners: Option<Listeners>) -> Self {
        let serving = Arc::new(AtomicBool::new(listeners.is_some()));
        let (phase, told) = watch::channel(Phase::Serve);
        let task = tokio::spawn(run(Arc::clone(&context), listeners, Arc::clone(&serving), told));
        Self { context, serving, phase, task }
    }

    /// Resets the connections and closes the listeners; both are gone on return.
    async fn cut(self) {
        self.phase.send_replace(Phase::Cut);
        if let Err(error) = self.task.await {
            tracing::error!("pod {}: task failed: {error}", self.context.identity.name);
        }
    }
}

/// A pod's task.
async fn run(
    context: Arc<Context>,
    listeners: Option<Listeners>,
    serving: Arc<AtomicBool>,
    mut phase: watch::Receiver<Phase>,
) {
    let listeners = match listeners {
        Some(listeners) => listeners,
        None => tokio::select! {
            _ = phase.wait_for(|phase| *phase != Phase::Serve) => return,
            listeners = retry(&context) => listeners,
        },
    };
    serving.store(true, Ordering::Release);
    listeners.serve(context, phase).await;
}

/// Retries until the listeners are open.
async fn retry(context: &Context) -> Listeners {
    loop {
        sleep(context.shared.retry).await;
        match Listeners::open(context).await {
            Ok(listeners) => {
                tracing::info!("pod {}: served", context.identity.name);
                return listeners;
            }
            Err(error) => tracing::warn!("pod {}: {error}", context.identity.name),
        }
    }
}

/// Whether both are the same namespace. If that is unknown, the new one counts.
fn is_same(one: &NetNs, other: &NetNs) -> bool {
    matches!((one.inode(), other.inode()), (Ok(one), Ok(other)) if one == other)
}
