//! The agent's interface to the server: sets the wanted pods, and reads their state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout_at;

use super::desired::{Desired, Generation, Status};
use super::peer::Peer;
use super::shared::{PodProxyState, ProxyState, Shared};
use super::workload::{InvalidWorkload, Workload, pod_name};

/// Why no proxy is known to serve a pod. The pod stays wanted until the caller removes it.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// No proxy is connected.
    #[error(
        "pod {pod} waits for a node proxy, none is connected to {}: is ztunnel running on this node?",
        socket.display()
    )]
    NotConnected {
        /// The pod.
        pod: String,
        /// The socket for proxies.
        socket: PathBuf,
    },
    /// The proxy refused the pod.
    #[error("the node proxy could not serve pod {pod}, retrying; see its log: {error}")]
    Nack {
        /// The pod.
        pod: String,
        /// The proxy's error.
        error: String,
    },
    /// A proxy is connected and did not answer for this pod in time.
    #[error("the node proxy did not acknowledge pod {pod} within {within:?}: see its log and its load")]
    Timeout {
        /// The pod.
        pod: String,
        /// The deadline.
        within: Duration,
    },
    /// The pod was removed or replaced meanwhile.
    #[error("pod {pod} was removed or replaced while it was announced to the node proxy: nothing to do")]
    Withdrawn {
        /// The pod.
        pod: String,
    },
    /// The pod cannot be sent.
    #[error(transparent)]
    Invalid(#[from] InvalidWorkload),
}

/// The outcome of a removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoveOutcome {
    /// No connected proxy serves the pod.
    Done,
    /// These proxies have not acknowledged it yet; they will, or their connections will be closed.
    Pending(Vec<Peer>),
}

/// Used by the agent; cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) socket: Arc<Path>,
}

/// A pod that is being sent to proxies.
#[derive(Debug)]
#[must_use]
pub struct Announcement {
    shared: Arc<Shared>,
    socket: Arc<Path>,
    changes: watch::Receiver<u64>,
    pod: String,
    uid: String,
    generation: Generation,
    since: u64,
}

impl Announcement {
    /// Returns when the newest proxy has acknowledged the pod; a pod without its namespace is acknowledged once that is known.
    /// On an error, and if the future is dropped, the pod stays wanted.
    pub async fn acknowledged(mut self, within: Duration) -> Result<(), AddError> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let progress = progress(&self.shared.read(), &self.uid, self.generation, self.since);
            let pod = self.pod.clone();
            let connected = match progress {
                Progress::Acknowledged => return Ok(()),
                Progress::Refused(error) => return Err(AddError::Nack { pod, error }),
                Progress::Withdrawn => return Err(AddError::Withdrawn { pod }),
                Progress::Waiting { connected } => connected,
            };
            if timeout_at(deadline, self.changes.changed()).await.is_err() {
                return Err(if connected {
                    AddError::Timeout { pod, within }
                } else {
                    AddError::NotConnected { pod, socket: self.socket.to_path_buf() }
                });
            }
        }
    }
}

enum Progress {
    Acknowledged,
    Refused(String),
    Withdrawn,
    Waiting { connected: bool },
}

impl Handle {
    /// Adds a wanted pod, and returns when the newest proxy has acknowledged it, see
    /// [`Announcement::acknowledged`].
    pub async fn add(&self, workload: Workload, within: Duration) -> Result<(), AddError> {
        self.announce(workload)?.acknowledged(within).await
    }

    /// Adds a wanted pod. A pod that was refused is retried at once.
    pub fn announce(&self, workload: Workload) -> Result<Announcement, InvalidWorkload> {
        let (pod, uid) = (pod_name(&workload.uid, &workload.info), workload.uid.clone());
        let changes = self.shared.changes();
        let (generation, since) = self.put(workload)?;
        let (shared, socket) = (Arc::clone(&self.shared), Arc::clone(&self.socket));
        Ok(Announcement { shared, socket, changes, pod, uid, generation, since })
    }

    /// Adds a wanted pod, without waiting.
    pub fn set(&self, workload: Workload) -> Result<(), InvalidWorkload> {
        self.put(workload).map(|_| ())
    }

    /// Removes a wanted pod, without waiting.
    pub fn unset(&self, uid: &str) {
        self.shared.update(|desired| desired.withdraw(uid));
    }

    /// Removes a wanted pod, and returns when no connected proxy serves it. Adding it again meanwhile does not prolong
    /// the wait.
    pub async fn remove(&self, uid: &str, within: Duration) -> RemoveOutcome {
        let deadline = tokio::time::Instant::now() + within;
        let mut changes = self.shared.changes();
        let generation = self.shared.update(|desired| desired.withdraw(uid));
        loop {
            let holders = self.shared.read().holders(uid, generation);
            if holders.is_empty() {
                return RemoveOutcome::Done;
            }
            if timeout_at(deadline, changes.changed()).await.is_err() {
                return RemoveOutcome::Pending(holders);
            }
        }
    }

    /// Changes whenever the results of [`Self::proxies`] and [`Self::pod`] may change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes()
    }

    /// The connected proxies, newest first.
    #[must_use]
    pub fn proxies(&self) -> Vec<ProxyState> {
        self.shared.read().proxies()
    }

    /// The pod's state at the newest proxy.
    #[must_use]
    pub fn pod(&self, uid: &str) -> PodProxyState {
        self.shared.read().pod(uid)
    }

    /// The connected proxies, newest first, as they come and go. A proxy appears here before any pod is sent to it;
    /// for work that has to come first, see [`Options::on_connect`](super::Options::on_connect).
    #[must_use]
    pub fn connections(&self) -> watch::Receiver<Vec<Peer>> {
        self.shared.peers()
    }

    /// Returns the pod's generation, and the state's version before which refusals do not concern this
    /// request.
    fn put(&self, workload: Workload) -> Result<(Generation, u64), InvalidWorkload> {
        let (uid, info, namespace) = workload.check()?;
        Ok(self.shared.update(|desired| {
            let generation = desired.put(uid.clone(), info, namespace);
            desired.retry_now(&uid, Instant::now());
            (generation, desired.version)
        }))
    }
}

fn progress(desired: &Desired, uid: &str, generation: Generation, since: u64) -> Progress {
    if desired.pods.get(uid).is_none_or(|entry| entry.generation != generation) {
        return Progress::Withdrawn;
    }
    let Some(newest) = desired.newest() else { return Progress::Waiting { connected: false } };
    match newest.told.get(uid) {
        Some(told) if told.generation == generation => match (&told.status, &told.refusal) {
            (Status::Acknowledged, _) => Progress::Acknowledged,
            (Status::Refused { version, .. }, Some(refusal)) if *version > since => {
                Progress::Refused(refusal.clone())
            }
            _ => Progress::Waiting { connected: true },
        },
        _ => Progress::Waiting { connected: true },
    }
}
