//! The client against a scripted agent. Plain files stand in for network namespaces.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacketListener;

use super::*;
use crate::messages::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent};

const LONG: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Add(String, String),
    Remove(String),
    Retain(Vec<String>),
}

/// Records requests. Refuses the pod with the UID `refused`.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Event>>>);

impl Recorder {
    fn note(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Workloads for Recorder {
    async fn add(&mut self, uid: String, info: WorkloadInfo, _: NetNs) -> Result<(), String> {
        self.note(Event::Add(uid.clone(), info.name));
        if uid == "refused" { Err("é".repeat(1000)) } else { Ok(()) }
    }

    async fn remove(&mut self, uid: &str) {
        self.note(Event::Remove(uid.into()));
    }

    async fn retain(&mut self, uids: &BTreeSet<String>) {
        self.note(Event::Retain(uids.iter().cloned().collect()));
    }
}

/// The agent's socket, and a client that connects to it.
struct Fixture {
    _directory: TempDir,
    listener: UnixSeqpacketListener,
    recorder: Recorder,
    client: JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.client.abort();
    }
}

fn start_client(path: &Path, recorder: &Recorder) -> JoinHandle<()> {
    let (path, mut recorder) = (path.to_owned(), recorder.clone());
    let backoff = Backoff { first: Duration::from_millis(5), most: Duration::from_millis(20) };
    tokio::spawn(async move { follow(&path, &mut recorder, backoff).await })
}

impl Fixture {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zds.sock");
        let listener = UnixSeqpacketListener::bind(&path).unwrap();
        let recorder = Recorder::default();
        let client = start_client(&path, &recorder);
        Self { _directory: directory, listener, recorder, client }
    }

    async fn accept(&mut self) -> Agent {
        accept(&mut self.listener).await
    }
}

async fn accept(listener: &mut UnixSeqpacketListener) -> Agent {
    let socket = timeout(LONG, listener.accept()).await.expect("the client connects").unwrap();
    let hello = timeout(LONG, packet::receive_plain::<Hello>(&socket)).await.expect("the client says hello");
    assert_eq!(hello.unwrap(), Some(Hello { version: 1 }));
    Agent { socket }
}

/// One connection, from the agent's side.
struct Agent {
    socket: UnixSeqpacket,
}

impl Agent {
    /// Sends a request with this many descriptors and returns the answer's text: empty is an acknowledgement.
    async fn ask(&self, request: Request, descriptors: usize) -> String {
        let packet = packet::encode(&WorkloadRequest { payload: Some(request) }).unwrap();
        let file = File::open("/dev/null").unwrap();
        let mut buffer = [0; 64];
        let mut ancillary = tokio_seqpacket::ancillary::AncillaryMessageWriter::new(&mut buffer);
        ancillary.add_fds(vec![file.as_fd(); descriptors]).unwrap();
        self.socket.send_with_ancillary(&packet, &mut ancillary).await.unwrap();
        self.answer().await
    }

    async fn answer(&self) -> String {
        let answer = timeout(LONG, packet::receive_plain::<WorkloadResponse>(&self.socket)).await;
        match answer.expect("the client answers").unwrap().expect("the client stays").payload {
            Some(Response::Ack(ack)) => ack.error,
            None => panic!("an empty answer"),
        }
    }

    async fn expect_end(&self) {
        let end = timeout(LONG, packet::receive_plain::<WorkloadResponse>(&self.socket)).await;
        assert_eq!(end.expect("the client leaves").unwrap(), None);
    }
}

fn add(uid: &str) -> Request {
    let info = WorkloadInfo { name: format!("name-{uid}"), namespace: "ns".into(), ..Default::default() };
    Request::Add(AddWorkload { uid: uid.into(), workload_info: Some(info) })
}

fn keep(uid: &str) -> Request {
    Request::Keep(KeepWorkload { uid: uid.into() })
}

fn snapshot_sent() -> Request {
    Request::SnapshotSent(SnapshotSent {})
}

fn added(uid: &str) -> Event {
    Event::Add(uid.into(), format!("name-{uid}"))
}

fn retained(uids: &[&str]) -> Event {
    Event::Retain(uids.iter().map(|&uid| uid.into()).collect())
}

#[tokio::test]
async fn the_snapshot_of_the_next_connection_tells_which_pods_remain() {
    let mut fixture = Fixture::start();
    let agent = fixture.accept().await;
    for uid in ["a", "b", "c"] {
        assert_eq!(agent.ask(add(uid), 1).await, "");
    }
    assert_eq!(agent.ask(snapshot_sent(), 0).await, "");
    assert_eq!(fixture.recorder.take(), [added("a"), added("b"), added("c"), retained(&["a", "b", "c"])]);
    drop(agent);

    let agent = fixture.accept().await;
    assert_eq!(fixture.recorder.take(), [], "a lost connection changes nothing");
    assert_eq!(agent.ask(keep("a"), 0).await, "");
    assert_eq!(agent.ask(add("d"), 1).await, "");
    assert_eq!(fixture.recorder.take(), [added("d")], "nothing is dropped before the snapshot is complete");
    assert_eq!(agent.ask(snapshot_sent(), 0).await, "");
    assert_eq!(agent.ask(Request::Del(DelWorkload { uid: "d".into() }), 0).await, "");
    assert_eq!(fixture.recorder.take(), [retained(&["a", "d"]), Event::Remove("d".into())]);
}

#[tokio::test]
async fn an_interrupted_snapshot_drops_nothing_and_does_not_count_later() {
    let mut fixture = Fixture::start();
    let agent = fixture.accept().await;
    assert_eq!(agent.ask(keep("a"), 0).await, "");
    drop(agent);
    let agent = fixture.accept().await;
    assert_eq!(agent.ask(keep("b"), 0).await, "");
    assert_eq!(agent.ask(snapshot_sent(), 0).await, "");
    assert_eq!(fixture.recorder.take(), [retained(&["b"])]);
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_and_the_connection_goes_on() {
    let mut fixture = Fixture::start();
    let agent = fixture.accept().await;
    let nothing = agent.ask(add("a"), 0).await;
    assert!(nothing.contains("pod ns/name-a") && nothing.contains("0 file descriptors"), "{nothing}");
    let two = agent.ask(add("b"), 2).await;
    assert!(two.contains("2 file descriptors"), "{two}");
    let nobody = agent.ask(Request::Add(AddWorkload { uid: "c".into(), workload_info: None }), 1).await;
    assert!(nobody.contains("pod c: Add without workload_info"), "{nobody}");
    assert_eq!(fixture.recorder.take(), []);

    let long = agent.ask(add("refused"), 1).await;
    assert!(long.starts_with("éé") && long.len() < crate::MAX_PACKET, "cut to fit: {long}");
    assert_eq!(agent.ask(snapshot_sent(), 0).await, "");
    // The agent knows them, so none of them may be dropped if it was served before.
    assert_eq!(fixture.recorder.take(), [added("refused"), retained(&["a", "b", "c", "refused"])]);
}

#[tokio::test]
async fn a_breach_of_the_protocol_is_named_and_ends_the_connection() {
    let mut fixture = Fixture::start();
    for (breach, descriptors, named) in [
        (keep("a"), 0, "Keep after the snapshot"),
        (snapshot_sent(), 0, "a second SnapshotSent"),
        (Request::Del(DelWorkload { uid: "a".into() }), 1, "descriptor came without Add"),
    ] {
        let agent = fixture.accept().await;
        assert_eq!(agent.ask(snapshot_sent(), 0).await, "");
        let answer = agent.ask(breach, descriptors).await;
        assert!(answer.contains(named), "{answer}");
        agent.expect_end().await;
    }
    fixture.accept().await;
}

#[tokio::test]
async fn garbage_is_answered_and_followed_by_a_new_connection() {
    let mut fixture = Fixture::start();
    for garbage in [vec![0xff; 40], vec![0x0a, 0x7f, 1], vec![0; crate::MAX_PACKET + 1]] {
        let agent = fixture.accept().await;
        agent.socket.send(&garbage).await.unwrap();
        assert!(!agent.answer().await.is_empty());
        agent.expect_end().await;
    }
    // A field of a newer protocol is a different case: the client can parse the packet, but does not know the
    // request.
    let agent = fixture.accept().await;
    agent.socket.send(&[0x4a, 0]).await.unwrap();
    assert!(agent.answer().await.contains("unknown request"));
    assert_eq!(agent.ask(add("a"), 1).await, "");
    assert_eq!(fixture.recorder.take(), [added("a")]);
}

#[tokio::test]
async fn the_client_waits_for_an_agent_that_comes_later() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("zds.sock");
    let client = start_client(&path, &Recorder::default());
    sleep(Duration::from_millis(30)).await;
    let mut listener = UnixSeqpacketListener::bind(&path).unwrap();
    accept(&mut listener).await;
    client.abort();
}
