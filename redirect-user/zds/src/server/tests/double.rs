//! A proxy that answers as ztunnel's client does, or as a test's script says, and records every breach of the
//! protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::socket::{MsgFlags, recv};
use tokio::task::JoinHandle;
use tokio_seqpacket::UnixSeqpacket;

use super::identity;
use crate::messages::{Ack, Hello, Request, Response, WorkloadRequest, WorkloadResponse};
use crate::packet::{self, Received};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Add(String),
    Keep(String),
    Del(String),
    SnapshotSent,
}

/// The double's answer to a request.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Ack,
    AckTwice,
    Nack(String),
    Silence,
    Raw(Vec<u8>),
    Leave,
}

#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) events: Vec<Event>,
    /// The pods that the proxy serves: UID and namespace.
    pub(super) served: BTreeMap<String, (u64, u64)>,
    pub(super) kept: BTreeSet<String>,
    refused: BTreeSet<String>,
    pub(super) synced: bool,
    pub(super) violations: Vec<String>,
    /// The connection ended.
    pub(super) ended: bool,
}

pub(super) struct Proxy {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Connects, sends the hello and acknowledges everything.
    pub(super) async fn start(path: &Path) -> Self {
        Self::scripted(path, |_| Reply::Ack).await
    }

    /// Connects, sends the hello and answers by the script.
    pub(super) async fn scripted(
        path: &Path,
        script: impl FnMut(&Request) -> Reply + Send + 'static,
    ) -> Self {
        let socket = UnixSeqpacket::connect(path).await.unwrap();
        packet::send(&socket, &Hello { version: 1 }, None).await.unwrap();
        let seen = Arc::new(Mutex::default());
        let task = tokio::spawn(converse(socket, Arc::clone(&seen), script));
        Self { seen, task }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    pub(super) fn events(&self) -> Vec<Event> {
        self.seen().events.clone()
    }

    pub(super) fn synced(&self) -> bool {
        self.seen().synced
    }

    pub(super) fn ended(&self) -> bool {
        self.seen().ended
    }

    pub(super) fn check(&self) {
        let violations = &self.seen().violations;
        assert!(violations.is_empty(), "{violations:?}");
    }

    /// Closes the connection.
    pub(super) async fn leave(self) -> Arc<Mutex<Seen>> {
        self.task.abort();
        let _ = self.task.await;
        self.seen
    }
}

async fn converse(socket: UnixSeqpacket, seen: Arc<Mutex<Seen>>, mut script: impl FnMut(&Request) -> Reply) {
    while let Ok(Some(received)) = packet::receive::<WorkloadRequest>(&socket).await {
        let request = received.message.payload.clone().expect("a request has a payload");
        let reply = script(&request);
        seen.lock().unwrap().note(received, &reply);
        // Gives a server that does not wait for the answer a chance to fail the test.
        tokio::task::yield_now().await;
        if recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
            .is_ok_and(|bytes| bytes > 0)
        {
            seen.lock().unwrap().violations.push(format!("another request before the answer to {request:?}"));
        }
        let sent = match reply {
            Reply::Ack => answer(&socket, "").await,
            Reply::AckTwice => answer(&socket, "").await && answer(&socket, "").await,
            Reply::Nack(error) => answer(&socket, &error).await,
            Reply::Raw(bytes) => socket.send(&bytes).await.is_ok(),
            Reply::Silence => true,
            Reply::Leave => false,
        };
        if !sent {
            break;
        }
    }
    seen.lock().unwrap().ended = true;
}

async fn answer(socket: &UnixSeqpacket, error: &str) -> bool {
    let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error: error.into() })) };
    packet::send(socket, &response, None).await.is_ok()
}

impl Seen {
    fn note(&mut self, received: Received<WorkloadRequest>, reply: &Reply) {
        let Received { message, descriptors } = received;
        match message.payload.expect("a request has a payload") {
            Request::Add(add) => {
                self.events.push(Event::Add(add.uid.clone()));
                if add.workload_info.is_none_or(|info| info.name != format!("name-{}", add.uid)) {
                    self.violation("Add without the pod's info", &add.uid);
                }
                let [descriptor] = descriptors.as_slice() else {
                    return self.violation("Add without exactly one descriptor", &add.uid);
                };
                let namespace = identity(descriptor);
                match self.served.get(&add.uid) {
                    Some(known) if *known == namespace => self.violation("Add of a served pod", &add.uid),
                    Some(_) => self.violation("Add of another namespace without Del", &add.uid),
                    None => {}
                }
                if matches!(reply, Reply::Nack(_)) {
                    self.refused.insert(add.uid);
                } else {
                    self.refused.remove(&add.uid);
                    self.kept.remove(&add.uid);
                    self.served.insert(add.uid, namespace);
                }
                return;
            }
            Request::Keep(keep) => {
                self.events.push(Event::Keep(keep.uid.clone()));
                if self.synced {
                    self.violation("Keep after the snapshot", &keep.uid);
                }
                self.kept.insert(keep.uid);
            }
            Request::Del(del) => {
                self.events.push(Event::Del(del.uid.clone()));
                if !self.synced {
                    self.violation("Del before the end of the snapshot", &del.uid);
                }
                let known = [
                    self.served.remove(&del.uid).is_some(),
                    self.refused.remove(&del.uid),
                    self.kept.remove(&del.uid),
                ];
                if !known.contains(&true) {
                    self.violation("Del of a pod that was never sent", &del.uid);
                }
            }
            Request::SnapshotSent(_) => {
                self.events.push(Event::SnapshotSent);
                if std::mem::replace(&mut self.synced, true) {
                    self.violation("a second SnapshotSent", "");
                }
            }
        }
        if !descriptors.is_empty() {
            self.violation("a descriptor without Add", "");
        }
    }

    fn violation(&mut self, what: &str, uid: &str) {
        self.violations.push(format!("{what} {uid}"));
    }
}
