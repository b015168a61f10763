//! One proxy's connection, from its hello to its end.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;

use super::desired::{Next, Step};
use super::options::{AdmitError, Event, Options};
use super::peer::{self, Peer};
use super::shared::Shared;
use super::workload::{add_request, pod_name};
use crate::messages::{
    DelWorkload, Hello, KeepWorkload, Request, Response, SnapshotSent, Version, WorkloadRequest,
    WorkloadResponse,
};
use crate::packet::{self, PacketError};
use redirect_linux::peer_process::PeerError;

/// Why the agent closes a connection.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("its process runs as user {0}: run the node proxy as root or as the agent's user")]
    NotPermitted(u32),
    #[error("its credentials cannot be read: {0}")]
    Credentials(std::io::Error),
    #[error("{0}")]
    Process(#[from] PeerError),
    #[error("it could not be examined: {0}")]
    Examination(tokio::task::JoinError),
    #[error("it said no hello within {0:?}: is it a node proxy?")]
    NoHello(Duration),
    #[error("it speaks version {0} of the protocol, the agent speaks 1: run versions that match")]
    Version(i32),
    #[error("the agent rejected it: {0}")]
    Admit(AdmitError),
    #[error("the agent did not admit it within {0:?}")]
    AdmitDeadline(Duration),
    #[error("it did not answer within {within:?} to {request}: see its log and its load")]
    Deadline { request: String, within: Duration },
    #[error("it refused the end of the snapshot: {0}")]
    SnapshotRefused(String),
    #[error("it sent an answer without a request")]
    Unasked,
    #[error("its answer to {0} is empty")]
    EmptyAnswer(String),
    #[error("{0}")]
    Packet(#[from] PacketError),
}

impl ConnectionError {
    /// The label in metrics.
    const fn label(&self) -> &'static str {
        match self {
            Self::NotPermitted(_) | Self::Credentials(_) | Self::Process(_) | Self::Examination(_) => {
                "denied"
            }
            Self::NoHello(_) | Self::AdmitDeadline(_) | Self::Deadline { .. } => "timeout",
            Self::Version(_) => "version",
            Self::Admit(_) => "admission",
            Self::SnapshotRefused(_) => "refused",
            Self::Unasked | Self::EmptyAnswer(_) | Self::Packet(_) => "malformed",
        }
    }
}

/// The connection's entry in the shared state; removed however the task ends.
struct Registration<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.shared.update(|desired| desired.disconnect(self.id));
    }
}

/// Serves a connection to its end.
pub(super) async fn serve(id: u64, socket: UnixSeqpacket, shared: Arc<Shared>, options: Arc<Options>) {
    let socket = Arc::new(socket);
    match converse(id, &socket, &shared, &options).await {
        Ok(()) => tracing::info!(connection = id, "node proxy disconnected"),
        Err(error) => {
            options.record(Event::Closed { reason: error.label() });
            tracing::warn!(connection = id, %error, "closed the node proxy's connection");
            tokio::time::sleep(options.penalty).await;
        }
    }
}

async fn converse(
    id: u64,
    socket: &Arc<UnixSeqpacket>,
    shared: &Shared,
    options: &Options,
) -> Result<(), ConnectionError> {
    let credentials = socket.peer_cred().map_err(ConnectionError::Credentials)?;
    if !peer::permitted(credentials.uid()) {
        return Err(ConnectionError::NotPermitted(credentials.uid()));
    }
    let hello = timeout(options.hello_deadline, packet::receive_plain::<Hello>(socket))
        .await
        .map_err(|_| ConnectionError::NoHello(options.hello_deadline))??;
    match hello {
        None => return Ok(()),
        Some(Hello { version }) if version == i32::from(Version::V1) => {}
        Some(Hello { version }) => return Err(ConnectionError::Version(version)),
    }
    options.record(Event::Connected);
    let peer = examine(id, credentials.pid(), socket).await?;
    shared.update(|desired| desired.connect(peer.clone()));
    let _registration = Registration { shared, id };
    if let Some(on_connect) = &options.on_connect {
        timeout(options.hello_deadline, on_connect(peer.clone()))
            .await
            .map_err(|_| ConnectionError::AdmitDeadline(options.hello_deadline))?
            .map_err(ConnectionError::Admit)?;
    }
    shared.update(|desired| desired.ready(id));
    tracing::info!(connection = id, %peer, cgroup = ?peer.cgroup_path, "node proxy connected");
    keep_in_step(id, socket, shared, options).await
}

async fn examine(id: u64, pid: Option<i32>, socket: &Arc<UnixSeqpacket>) -> Result<Peer, ConnectionError> {
    let clone = Arc::clone(socket);
    let examined = tokio::task::spawn_blocking(move || peer::examine(id, pid, &clone)).await;
    Ok(examined.map_err(ConnectionError::Examination)??)
}

/// Sends the difference between the wanted pods and those already sent, until the proxy disconnects.
async fn keep_in_step(
    id: u64,
    socket: &UnixSeqpacket,
    shared: &Shared,
    options: &Options,
) -> Result<(), ConnectionError> {
    let mut changes = shared.changes();
    loop {
        // Marked as seen before the state is read, so that later changes wake this task.
        changes.borrow_and_update();
        // Not through `update`: a request in progress is of no interest to other tasks.
        let next = shared.read().next(id, Instant::now());
        match next {
            Next::Send(step) => {
                let Some(error) = exchange(socket, &step, options.ack_deadline).await? else {
                    return Ok(());
                };
                conclude(id, &step, &error, shared, options)?;
            }
            Next::Wait(until) => {
                let retry = async {
                    match until {
                        Some(until) => tokio::time::sleep_until(until.into()).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    _ = changes.changed() => {}
                    () = retry => {}
                    received = receive(socket) => {
                        return match received? {
                            None => Ok(()),
                            Some(_) => Err(ConnectionError::Unasked),
                        };
                    }
                }
            }
        }
    }
}

/// Sends one request and returns the error of its answer, which is empty on success; `None` if the proxy disconnected.
async fn exchange(
    socket: &UnixSeqpacket,
    step: &Step,
    within: Duration,
) -> Result<Option<String>, ConnectionError> {
    // An answer that arrived early would be taken for the answer to this request.
    match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Err(Errno::EAGAIN | Errno::EINTR) => {}
        Ok(0) | Err(Errno::ECONNRESET) => return Ok(None),
        Ok(_) => return Err(ConnectionError::Unasked),
        Err(error) => return Err(PacketError::Io(error.into()).into()),
    }
    let descriptor = match step {
        Step::Add { namespace, .. } => Some(namespace.descriptor.as_fd()),
        Step::Keep { .. } | Step::Del { .. } | Step::SnapshotSent => None,
    };
    let answer = async {
        match packet::send(socket, &request(step), descriptor).await {
            Err(PacketError::Io(error)) if is_end(&error) => Ok(None),
            Err(error) => Err(error),
            Ok(()) => receive(socket).await,
        }
    };
    match timeout(within, answer).await {
        Err(_) => Err(ConnectionError::Deadline { request: describe(step), within }),
        Ok(Ok(Some(WorkloadResponse { payload: Some(Response::Ack(ack)) }))) => Ok(Some(ack.error)),
        Ok(Ok(Some(WorkloadResponse { payload: None }))) => Err(ConnectionError::EmptyAnswer(describe(step))),
        Ok(Ok(None)) => Ok(None),
        Ok(Err(error)) => Err(error.into()),
    }
}

/// Receives an answer; `None` if the proxy disconnected, with or without having read everything.
async fn receive(socket: &UnixSeqpacket) -> Result<Option<WorkloadResponse>, PacketError> {
    match packet::receive_plain(socket).await {
        Err(PacketError::Io(error)) if is_end(&error) => Ok(None),
        received => received,
    }
}

fn is_end(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
}

/// Processes an answer.
fn conclude(
    id: u64,
    step: &Step,
    error: &str,
    shared: &Shared,
    options: &Options,
) -> Result<(), ConnectionError> {
    options.record(Event::Answered { acknowledged: error.is_empty() });
    if matches!(step, Step::SnapshotSent) {
        if !error.is_empty() {
            return Err(ConnectionError::SnapshotRefused(error.to_owned()));
        }
        tracing::info!(connection = id, "node proxy is in sync");
    }
    let news = shared.update(|desired| desired.answered(id, step, error, Instant::now(), options.retry));
    let request = describe(step);
    match (news, error.is_empty()) {
        (true, false) => tracing::warn!(connection = id, request, error, "node proxy rejected a request"),
        (true, true) => tracing::info!(connection = id, request, "node proxy accepts requests again"),
        (false, _) => tracing::debug!(connection = id, request, error, "answered"),
    }
    Ok(())
}

fn request(step: &Step) -> WorkloadRequest {
    let payload = match step {
        Step::Add { uid, info, .. } => return add_request(uid, info),
        Step::Keep { uid, .. } => Request::Keep(KeepWorkload { uid: uid.clone() }),
        Step::Del { uid, .. } => Request::Del(DelWorkload { uid: uid.clone() }),
        Step::SnapshotSent => Request::SnapshotSent(SnapshotSent {}),
    };
    WorkloadRequest { payload: Some(payload) }
}

/// A request, for messages.
fn describe(step: &Step) -> String {
    match step {
        Step::Add { uid, info, .. } => format!("adding pod {}", pod_name(uid, info)),
        Step::Keep { name, .. } => format!("keeping pod {name}"),
        Step::Del { name, .. } => format!("removing pod {name}"),
        Step::SnapshotSent => "the end of the snapshot".to_owned(),
    }
}
