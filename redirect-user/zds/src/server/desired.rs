//! The wanted pods, what each proxy has been sent, and the difference. Pure, apart from holding descriptors.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::peer::Peer;
use super::workload::{Namespace, pod_name};
use crate::messages::WorkloadInfo;

/// A version of a pod's identity and namespace. A pod that was replaced, or removed and added again, has a newer one.
pub(super) type Generation = u64;

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) generation: Generation,
    pub(super) info: WorkloadInfo,
    pub(super) namespace: Option<Namespace>,
}

/// The state of a pod that was sent to a proxy.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Status {
    /// The request is being sent or not answered yet.
    InFlight,
    /// The proxy serves the pod.
    Acknowledged,
    /// The proxy keeps the pod if it served it before.
    Kept,
    /// The proxy refused the pod, see [`Told::refusal`].
    Refused {
        /// The state's version at the time of the answer.
        version: u64,
        /// When to send it again.
        retry_at: Instant,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) generation: Generation,
    pub(super) name: String,
    pub(super) status: Status,
    /// Why the proxy last refused the pod; kept during the retry.
    pub(super) refusal: Option<String>,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: Peer,
    /// The newest generation in the snapshot. Later pods are sent after it, so that a busy node cannot delay its end.
    /// `None` until the agent is ready for this proxy.
    pub(super) snapshot: Option<Generation>,
    /// The proxy acknowledged the snapshot.
    pub(super) synced: bool,
    pub(super) told: BTreeMap<String, Told>,
}

/// One request to a proxy.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Add { uid: String, info: WorkloadInfo, namespace: Namespace },
    Keep { uid: String, name: String },
    Del { uid: String, name: String },
    SnapshotSent,
}

/// The next step of a connection's task.
#[derive(Debug)]
pub(super) enum Next {
    Send(Step),
    /// Wait for a change, or until a retry is due.
    Wait(Option<Instant>),
}

#[derive(Debug, Default)]
pub(super) struct Desired {
    /// Increases with every change.
    pub(super) version: u64,
    generation: Generation,
    pub(super) pods: BTreeMap<String, Entry>,
    /// Oldest first.
    pub(super) connections: Vec<Connection>,
}

impl Desired {
    /// Adds a wanted pod. The same pod in the same namespace keeps its generation, and is not sent again; any other
    /// change makes a new one, which proxies get as `Del` and `Add`.
    pub(super) fn put(
        &mut self,
        uid: String,
        info: WorkloadInfo,
        namespace: Option<Namespace>,
    ) -> Generation {
        self.version += 1;
        if let Some(entry) = self.pods.get_mut(&uid)
            && entry.info == info
        {
            match (&entry.namespace, namespace) {
                (_, None) => return entry.generation,
                (Some(known), Some(given)) if *known == given => return entry.generation,
                // The namespace of a kept pod is known now.
                (None, Some(given)) => {
                    entry.namespace = Some(given);
                    return entry.generation;
                }
                (Some(_), Some(given)) => return self.insert(uid, info, Some(given)),
            }
        }
        let known = self.pods.get(&uid).and_then(|entry| entry.namespace.clone());
        self.insert(uid, info, namespace.or(known))
    }

    fn insert(&mut self, uid: String, info: WorkloadInfo, namespace: Option<Namespace>) -> Generation {
        self.generation += 1;
        self.pods.insert(uid, Entry { generation: self.generation, info, namespace });
        self.generation
    }

    /// Retries a refused pod at once.
    pub(super) fn retry_now(&mut self, uid: &str, now: Instant) {
        for connection in &mut self.connections {
            if let Some(Told { status: Status::Refused { retry_at, .. }, .. }) = connection.told.get_mut(uid)
            {
                *retry_at = now;
            }
        }
    }

    /// Removes a wanted pod. Returns the newest generation that proxies may still serve.
    pub(super) fn withdraw(&mut self, uid: &str) -> Generation {
        self.version += 1;
        self.pods.remove(uid);
        self.generation
    }

    /// The proxies that may still serve this pod in this generation or an older one.
    pub(super) fn holders(&self, uid: &str, generation: Generation) -> Vec<Peer> {
        let holds = |connection: &&Connection| {
            connection.told.get(uid).is_some_and(|told| told.generation <= generation)
        };
        self.connections.iter().filter(holds).map(|connection| connection.peer.clone()).collect()
    }

    pub(super) fn connect(&mut self, peer: Peer) {
        self.version += 1;
        // The newest is the one that connected last, whatever the order of the hellos.
        let place = self.connections.partition_point(|connection| connection.peer.id < peer.id);
        let connection = Connection { peer, snapshot: None, synced: false, told: BTreeMap::new() };
        self.connections.insert(place, connection);
    }

    /// The agent is ready for this proxy: it gets the snapshot, and live updates if it is the newest.
    pub(super) fn ready(&mut self, id: u64) {
        self.version += 1;
        let generation = self.generation;
        if let Some(connection) = self.connection(id) {
            connection.snapshot = Some(generation);
        }
    }

    pub(super) fn disconnect(&mut self, id: u64) {
        self.version += 1;
        self.connections.retain(|connection| connection.peer.id != id);
    }

    fn connection(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|connection| connection.peer.id == id)
    }

    /// The proxy that gets new pods.
    pub(super) fn newest(&self) -> Option<&Connection> {
        self.connections.iter().rev().find(|connection| connection.snapshot.is_some())
    }

    /// The next request for this proxy. It counts as sent from now on, because the proxy may receive it.
    pub(super) fn next(&mut self, id: u64, now: Instant) -> Next {
        let newest = self.newest().is_some_and(|connection| connection.peer.id == id);
        let pods = &self.pods;
        let Some(connection) = self.connections.iter_mut().find(|connection| connection.peer.id == id) else {
            return Next::Wait(None);
        };
        let Some(snapshot) = connection.snapshot else { return Next::Wait(None) };
        let next = if !connection.synced {
            Next::Send(snapshot_step(pods, connection, snapshot))
        } else if let Some(removal) = removal(pods, connection) {
            Next::Send(removal)
        } else if newest {
            addition(pods, connection, now)
        } else {
            Next::Wait(None)
        };
        if let Next::Send(Step::Add { uid, .. } | Step::Keep { uid, .. }) = &next
            && let Some(entry) = pods.get(uid)
        {
            tell(connection, uid, entry);
        }
        next
    }

    /// Processes the proxy's answer; `error` is empty on success. Returns whether the answer is news: a refusal,
    /// unless it equals the last one, or the end of a refusal.
    pub(super) fn answered(
        &mut self,
        id: u64,
        step: &Step,
        error: &str,
        now: Instant,
        retry: Duration,
    ) -> bool {
        self.version += 1;
        let version = self.version;
        let Some(connection) = self.connection(id) else { return false };
        match step {
            Step::SnapshotSent => connection.synced = true,
            // Repeating a removal does not help a proxy that can't remove the pod.
            Step::Del { uid, .. } => {
                connection.told.remove(uid);
            }
            Step::Add { uid, .. } | Step::Keep { uid, .. } => {
                let Some(told) = connection.told.get_mut(uid) else { return false };
                told.status = match step {
                    _ if !error.is_empty() => Status::Refused { version, retry_at: now + retry },
                    Step::Keep { .. } => Status::Kept,
                    _ => Status::Acknowledged,
                };
                let refusal = (!error.is_empty()).then(|| error.to_owned());
                let before = std::mem::replace(&mut told.refusal, refusal);
                return told.refusal != before;
            }
        }
        !error.is_empty()
    }
}

fn tell(connection: &mut Connection, uid: &str, entry: &Entry) {
    let refusal = connection.told.get(uid).and_then(|told| told.refusal.clone());
    let name = pod_name(uid, &entry.info);
    let told = Told { generation: entry.generation, name, status: Status::InFlight, refusal };
    connection.told.insert(uid.to_owned(), told);
}

fn add(uid: &str, entry: &Entry, namespace: &Namespace) -> Step {
    Step::Add { uid: uid.to_owned(), info: entry.info.clone(), namespace: namespace.clone() }
}

/// Before the end of the snapshot, only pods that are new to the proxy are sent. Everything else, removals included,
/// follows after it.
fn snapshot_step(pods: &BTreeMap<String, Entry>, connection: &Connection, snapshot: Generation) -> Step {
    let oldest = pods
        .iter()
        .filter(|(uid, entry)| entry.generation <= snapshot && !connection.told.contains_key(*uid))
        .min_by_key(|(_, entry)| entry.generation);
    match oldest {
        None => Step::SnapshotSent,
        Some((uid, Entry { info, namespace: None, .. })) => {
            Step::Keep { uid: uid.clone(), name: pod_name(uid, info) }
        }
        Some((uid, entry @ Entry { namespace: Some(namespace), .. })) => add(uid, entry, namespace),
    }
}

/// A pod that was sent to the proxy and has been removed or replaced.
fn removal(pods: &BTreeMap<String, Entry>, connection: &Connection) -> Option<Step> {
    let (uid, told) = connection
        .told
        .iter()
        .find(|(uid, told)| pods.get(*uid).is_none_or(|entry| entry.generation != told.generation))?;
    Some(Step::Del { uid: uid.clone(), name: told.name.clone() })
}

/// A pod that the proxy lacks: oldest first, and refused ones last.
fn addition(pods: &BTreeMap<String, Entry>, connection: &Connection, now: Instant) -> Next {
    let lacking = pods.iter().filter_map(|(uid, entry)| {
        let namespace = entry.namespace.as_ref()?;
        let due = match connection.told.get(uid).map(|told| &told.status) {
            None | Some(Status::Kept) => None,
            Some(Status::Refused { retry_at, .. }) => Some(*retry_at),
            Some(Status::InFlight | Status::Acknowledged) => return None,
        };
        Some((due, entry.generation, uid, entry, namespace))
    });
    match lacking.min_by_key(|(due, generation, ..)| (*due, *generation)) {
        None => Next::Wait(None),
        Some((Some(due), ..)) if due > now => Next::Wait(Some(due)),
        Some((_, _, uid, entry, namespace)) => Next::Send(add(uid, entry, namespace)),
    }
}
