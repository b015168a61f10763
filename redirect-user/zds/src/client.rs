//! The proxy's side: asks the agent which pods to serve, for as long as the process lives.
//!
//! The client executes the agent's requests one at a time and answers each one before it reads the next, so that an
//! acknowledgement means "done". A lost connection does not affect the pods that are served: only the snapshot of the
//! next connection tells which of them are gone.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;
use tokio_seqpacket::UnixSeqpacket;

use super::messages::{
    Ack, Hello, Request, Response, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse,
};
use super::packet::{self, PacketError, Received};
use redirect_linux::netns::NetNs;

#[cfg(test)]
mod tests;

/// Executes the agent's requests.
pub trait Workloads: Send {
    /// Serves a pod, or returns why it can't. A pod that is already served in the same namespace stays as it
    /// is.
    fn add(
        &mut self,
        uid: String,
        info: WorkloadInfo,
        netns: NetNs,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Stops serving a pod and resets its connections. An unknown pod is no error.
    fn remove(&mut self, uid: &str) -> impl Future<Output = ()> + Send;

    /// Stops serving all other pods.
    fn retain(&mut self, uids: &BTreeSet<String>) -> impl Future<Output = ()> + Send;
}

/// The pause before another attempt to reach the agent; doubled after each failure.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After the first failure, and after a connection that completed its snapshot.
    pub first: Duration,
    /// The maximum.
    pub most: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(100), most: Duration::from_secs(5) }
    }
}

/// Why a connection to the agent ended.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error("cannot connect: {0}; is the agent running, and is its socket mounted here?")]
    Connect(io::Error),
    #[error("the agent closed the connection")]
    Closed,
    #[error("the agent broke the protocol: {0}; run versions that match")]
    Protocol(&'static str),
    #[error("{0}")]
    Packet(#[from] PacketError),
}

/// Follows the agent forever. Dropping the future cancels it, and leaves the pods as they are.
pub async fn follow(path: &Path, workloads: &mut impl Workloads, backoff: Backoff) {
    let mut pause = backoff.first;
    loop {
        let mut session = Session::default();
        let error = match session.run(path, workloads).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if session.synced {
            pause = backoff.first;
        }
        tracing::warn!("agent at {}: {error}; next attempt in {pause:?}", path.display());
        sleep(pause).await;
        pause = (pause * 2).min(backoff.most);
    }
}

/// The state of one connection.
#[derive(Default)]
struct Session {
    mentioned: BTreeSet<String>,
    synced: bool,
}

impl Session {
    async fn run(
        &mut self,
        path: &Path,
        workloads: &mut impl Workloads,
    ) -> Result<std::convert::Infallible, ClientError> {
        let socket = UnixSeqpacket::connect(path).await.map_err(ClientError::Connect)?;
        packet::send(&socket, &Hello { version: Version::V1.into() }, None).await?;
        tracing::info!("connected to the agent at {}", path.display());
        loop {
            let received = match packet::receive::<WorkloadRequest>(&socket).await {
                Ok(Some(received)) => received,
                Ok(None) => return Err(ClientError::Closed),
                Err(error) => {
                    // Reported to the agent as well, whose log the operator reads first.
                    let _ = answer(&socket, Err(error.to_string())).await;
                    return Err(error.into());
                }
            };
            match self.carry_out(received, workloads).await {
                Ok(outcome) => answer(&socket, outcome).await?,
                Err(error) => {
                    let _ = answer(&socket, Err(error.to_string())).await;
                    return Err(error);
                }
            }
        }
    }

    /// The outer error ends the connection; the inner one is the answer to this one request.
    async fn carry_out(
        &mut self,
        received: Received<WorkloadRequest>,
        workloads: &mut impl Workloads,
    ) -> Result<Result<(), String>, ClientError> {
        let Received { message, mut descriptors } = received;
        let Some(request) = message.payload else {
            // A request of a newer protocol: refusing it is the only safe answer.
            return Ok(Err("unknown request; run versions of agent and proxy that match".into()));
        };
        if !descriptors.is_empty() && !matches!(request, Request::Add(_)) {
            return Err(ClientError::Protocol("a file descriptor came without Add"));
        }
        match request {
            Request::Add(add) => {
                // Recorded even if the request fails below: the agent knows this pod, so it must not be
                // dropped.
                self.mentioned.insert(add.uid.clone());
                let Some(info) = add.workload_info else {
                    return Ok(Err(format!("pod {}: Add without workload_info", add.uid)));
                };
                match the_one(&mut descriptors) {
                    Some(netns) => Ok(workloads.add(add.uid, info, NetNs::from_fd(netns)).await),
                    None => Ok(Err(format!(
                        "pod {}/{}: Add carries {} file descriptors instead of its network namespace",
                        info.namespace,
                        info.name,
                        descriptors.len()
                    ))),
                }
            }
            Request::Keep(_) if self.synced => Err(ClientError::Protocol("Keep after the snapshot")),
            Request::Keep(keep) => {
                self.mentioned.insert(keep.uid);
                Ok(Ok(()))
            }
            Request::Del(del) => {
                self.mentioned.remove(&del.uid);
                workloads.remove(&del.uid).await;
                Ok(Ok(()))
            }
            Request::SnapshotSent(_) if self.synced => Err(ClientError::Protocol("a second SnapshotSent")),
            Request::SnapshotSent(_) => {
                self.synced = true;
                workloads.retain(&std::mem::take(&mut self.mentioned)).await;
                Ok(Ok(()))
            }
        }
    }
}

fn the_one(descriptors: &mut Vec<OwnedFd>) -> Option<OwnedFd> {
    if descriptors.len() == 1 { descriptors.pop() } else { None }
}

/// Space in an answer's packet for the protobuf frame around its text.
const FRAME: usize = 16;

async fn answer(socket: &UnixSeqpacket, outcome: Result<(), String>) -> Result<(), PacketError> {
    let mut error = outcome.err().unwrap_or_default();
    error.truncate(error.floor_char_boundary(super::MAX_PACKET - FRAME));
    let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error })) };
    packet::send(socket, &response, None).await
}
