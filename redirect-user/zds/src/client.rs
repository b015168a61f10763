//! The proxy's side: asks the agent which pods to serve, and goes on asking for as long as the process lives.
//!
//! The agent's requests are carried out one at a time and each is answered before the next is read, so that an
//! acknowledgement means "done". A lost connection changes nothing for the pods that are served: only the snapshot of
//! the next connection tells which of them are gone.

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

/// What a proxy does with the agent's requests.
pub trait Workloads: Send {
    /// Serves a pod, or says why not. A pod that is served already, in the same namespace, stays as it is.
    fn add(
        &mut self,
        uid: String,
        info: WorkloadInfo,
        netns: NetNs,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Stops serving a pod and cuts its connections. An unknown pod is no error.
    fn remove(&mut self, uid: &str) -> impl Future<Output = ()> + Send;

    /// Stops serving all other pods.
    fn retain(&mut self, uids: &BTreeSet<String>) -> impl Future<Output = ()> + Send;
}

/// How long to wait before another attempt to reach the agent; doubled after each failure.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// After the first failure, and after a connection that got as far as the end of its snapshot.
    pub first: Duration,
    /// At most.
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

/// Follows the agent for ever. Cancelled by dropping it, which leaves the pods as they are.
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

/// What one connection has told so far.
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
                    // The agent's log is where its operator looks first.
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

    /// The outer error ends the connection, the inner one is what the agent is told about this one request.
    async fn carry_out(
        &mut self,
        received: Received<WorkloadRequest>,
        workloads: &mut impl Workloads,
    ) -> Result<Result<(), String>, ClientError> {
        let Received { message, mut descriptors } = received;
        let Some(request) = message.payload else {
            // A request of a newer protocol: to say no is all that is safe.
            return Ok(Err("unknown request; run versions of agent and proxy that match".into()));
        };
        if !descriptors.is_empty() && !matches!(request, Request::Add(_)) {
            return Err(ClientError::Protocol("a file descriptor came without Add"));
        }
        match request {
            Request::Add(add) => {
                // Mentioned even if it fails below: the agent knows this pod, so that it must not be dropped.
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

/// Room that an answer's text leaves for its protobuf frame.
const FRAME: usize = 16;

async fn answer(socket: &UnixSeqpacket, outcome: Result<(), String>) -> Result<(), PacketError> {
    let mut error = outcome.err().unwrap_or_default();
    error.truncate(error.floor_char_boundary(super::MAX_PACKET - FRAME));
    let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error })) };
    packet::send(socket, &response, None).await
}
