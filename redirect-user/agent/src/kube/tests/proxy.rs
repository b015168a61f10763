//! A node proxy that serves every pod except those that it shall refuse.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio::task::JoinHandle;
use tokio_seqpacket::UnixSeqpacket;

use redirect_zds::messages::{
    Ack, Hello, Request, Response, WorkloadInfo, WorkloadRequest, WorkloadResponse,
};
use redirect_zds::packet;

#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) served: BTreeSet<String>,
    pub(super) infos: Vec<WorkloadInfo>,
    pub(super) refuse: BTreeSet<String>,
    /// The pods in the snapshot.
    pub(super) snapshot: Option<BTreeSet<String>>,
}

pub(super) struct Proxy {
    pub(super) seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub(super) async fn connect(path: &Path) -> Self {
        Self::connect_refusing(path, BTreeSet::new()).await
    }

    /// Refuses these pods from its first packet on.
    pub(super) async fn connect_refusing(path: &Path, refuse: BTreeSet<String>) -> Self {
        let socket = UnixSeqpacket::connect(path).await.unwrap();
        packet::send(&socket, &Hello { version: 1 }, None).await.unwrap();
        let seen = Arc::new(Mutex::new(Seen { refuse, ..Seen::default() }));
        let task = tokio::spawn(converse(socket, Arc::clone(&seen)));
        Self { seen, task }
    }

    pub(super) fn serves(&self, uid: &str) -> bool {
        self.seen.lock().unwrap().served.contains(uid)
    }
}

async fn converse(socket: UnixSeqpacket, seen: Arc<Mutex<Seen>>) {
    while let Ok(Some(received)) = packet::receive::<WorkloadRequest>(&socket).await {
        let error = seen.lock().unwrap().note(received.message.payload.unwrap());
        let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error })) };
        if packet::send(&socket, &response, None).await.is_err() {
            return;
        }
    }
}

impl Seen {
    fn note(&mut self, request: Request) -> String {
        match request {
            Request::Add(add) if self.refuse.contains(&add.uid) => return "port 15001 is taken".into(),
            Request::Add(add) => {
                self.infos.extend(add.workload_info);
                self.served.insert(add.uid);
            }
            Request::Keep(_) => {}
            Request::Del(del) => {
                self.served.remove(&del.uid);
            }
            Request::SnapshotSent(_) => self.snapshot = Some(self.served.clone()),
        }
        String::new()
    }
}
