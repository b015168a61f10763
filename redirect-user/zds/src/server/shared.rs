//! The state behind a lock, its change signal, and queries for it.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::desired::{Connection, Desired, Status};
use super::peer::Peer;

/// A connected proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyState {
    /// Its process.
    pub peer: Peer,
    /// Whether it acknowledged the end of its snapshot.
    pub synced: bool,
    /// The number of pods that it acknowledged.
    pub acknowledged: usize,
    /// The pods that it refused: UID and error.
    pub refused: Vec<(String, String)>,
}

/// The state of a pod at the newest proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodProxyState {
    /// The agent does not want the pod served.
    Unknown,
    /// No proxy is connected.
    NoProxy,
    /// It was not sent yet, or not answered.
    Pending,
    /// The proxy was asked to keep it, because the agent does not have its namespace yet. Whether the proxy serves
    /// it is unknown.
    Kept,
    /// The proxy serves it.
    Acknowledged,
    /// The proxy refused it when it was last sent, for this reason. It will be sent again.
    Refused(String),
}

#[derive(Debug)]
pub(super) struct Shared {
    desired: Mutex<Desired>,
    changed: watch::Sender<u64>,
    peers: watch::Sender<Vec<Peer>>,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            desired: Mutex::default(),
            changed: watch::Sender::new(0),
            peers: watch::Sender::new(Vec::new()),
        })
    }

    /// Locks the state for reading.
    pub(super) fn read(&self) -> MutexGuard<'_, Desired> {
        self.desired.lock()
    }

    /// Changes the state, and wakes every task that may be affected.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut Desired) -> T) -> T {
        let mut desired = self.read();
        let result = change(&mut desired);
        // Under the lock, so that versions and peer lists are published in order.
        self.changed.send_replace(desired.version);
        self.peers.send_if_modified(|peers| {
            let now: Vec<Peer> =
                desired.connections.iter().rev().map(|connection| connection.peer.clone()).collect();
            let modified = *peers != now;
            *peers = now;
            modified
        });
        result
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn peers(&self) -> watch::Receiver<Vec<Peer>> {
        self.peers.subscribe()
    }
}

impl Desired {
    /// The connected proxies, newest first.
    pub(super) fn proxies(&self) -> Vec<ProxyState> {
        self.connections.iter().rev().map(Connection::state).collect()
    }

    /// The pod's state at the newest proxy.
    pub(super) fn pod(&self, uid: &str) -> PodProxyState {
        let Some(entry) = self.pods.get(uid) else { return PodProxyState::Unknown };
        let Some(newest) = self.newest() else { return PodProxyState::NoProxy };
        match newest.told.get(uid) {
            Some(told) if told.generation == entry.generation => match (&told.status, &told.refusal) {
                (Status::Acknowledged, _) => PodProxyState::Acknowledged,
                (_, Some(refusal)) => PodProxyState::Refused(refusal.clone()),
                (Status::Kept, None) => PodProxyState::Kept,
                (Status::InFlight | Status::Refused { .. }, None) => PodProxyState::Pending,
            },
            _ => PodProxyState::Pending,
        }
    }
}

impl Connection {
    fn state(&self) -> ProxyState {
        let acknowledged = self.told.values().filter(|told| told.status == Status::Acknowledged).count();
        let refused = self
            .told
            .iter()
            .filter_map(|(uid, told)| told.refusal.clone().map(|refusal| (uid.clone(), refusal)))
            .collect();
        ProxyState { peer: self.peer.clone(), synced: self.synced, acknowledged, refused }
    }
}
