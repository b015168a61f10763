//! The agent's side: accepts connections, one request each, and passes them to a [`Handler`].
//!
//! A misbehaving client (it sends nothing, nonsense or descriptors, or does not read) only loses its own
//! connection: every wait has a deadline, every packet a size limit, and every descriptor an owner that
//! closes it.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use nix::unistd::geteuid;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_seqpacket::ancillary::OwnedAncillaryMessage;
use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use super::packet::{self, PacketError};
use super::parts;
use super::{Error, ErrorKind, FlowFilter, MAX_PACKET, Reply, Request, VERSION};
use redirect_linux::peer_process::PeerProcess;
use redirect_linux::socket_file::{self, SocketFile};

pub use redirect_linux::socket_file::BindError;

/// The deadline for a client to send its request, and to read each reply.
const CLIENT_DEADLINE: Duration = Duration::from_secs(5);

/// The maximum number of concurrent connections. Others wait in the socket's backlog. More than a node has pods, because each may
/// have an ADD that waits for a proxy.
const MAX_CONNECTIONS: usize = 2048;

/// How long requests in progress may continue after the shutdown began.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// The pause after accept() fails: without descriptors it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Handles requests.
pub trait Handler: Send + Sync + 'static {
    /// Whether a process may send requests.
    fn permit(&self, process: &PeerProcess) -> impl Future<Output = Result<(), Error>> + Send;

    /// Answers a request. `netns` is set exactly if [`Request::carries_netns`].
    ///
    /// Runs to completion even if the client disconnects. Several requests run at once. Only the last reply
    /// should be final ([`Reply::is_final`]); [`Reply::pods`] creates such a list.
    fn handle(&self, request: Request, netns: Option<OwnedFd>) -> impl Future<Output = Vec<Reply>> + Send;

    /// Answers [`Request::Monitor`], until the client disconnects or the stream ends with the agent.
    fn monitor(
        &self,
        filter: FlowFilter,
    ) -> impl Future<Output = Result<BoxStream<'static, Reply>, Error>> + Send;
}

/// A bound socket.
#[derive(Debug)]
pub struct Server {
    // Dropped before the listener, so that a successor never finds a file without a listener.
    file: SocketFile,
    listener: UnixSeqpacketListener,
}

impl Server {
    /// Binds and listens with mode 0600, in a directory that is created if necessary. Replaces a file that a dead
    /// agent left. From now on clients can connect; [`Server::serve`] serves them.
    ///
    /// Must be called inside a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = socket_file::listen_at(path)?;
        let listener = UnixSeqpacketListener::try_from(listener)
            .map_err(|source| BindError::Io { path: path.into(), source })?;
        Ok(Self { file, listener })
    }

    /// Serves until `shutdown` completes, then removes the socket's file and lets requests in progress finish.
    pub async fn serve<H: Handler>(mut self, handler: Arc<H>, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(ended) = connections.join_next(), if !connections.is_empty() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "client connection failed");
                    }
                }
                accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok(socket) => {
                        connections.spawn(converse(socket, Arc::clone(&handler)));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept client connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        let Self { file, listener } = self;
        drop(file);
        drop(listener);
        let finished = async { while connections.join_next().await.is_some() {} };
        if timeout(SHUTDOWN_GRACE, finished).await.is_err() {
            tracing::warn!("shutdown aborted pending requests");
        }
    }
}

/// Serves one connection: one request and its replies.
async fn converse<H: Handler>(socket: UnixSeqpacket, handler: Arc<H>) {
    let replies = match timeout(CLIENT_DEADLINE, request(&socket)).await {
        Ok(Ok(Some((request, netns)))) => match permit(&socket, &*handler).await {
            Ok(()) => match request {
                Request::Monitor { filter } => match handler.monitor(filter).await {
                    Ok(replies) => return follow(&socket, replies).await,
                    Err(error) => vec![Reply::Error(error)],
                },
                request => handler.handle(request, netns).await,
            },
            Err(error) => {
                tracing::warn!(%error, "client rejected");
                vec![Reply::Error(error)]
            }
        },
        // No request: a successor checks whether this agent is alive.
        Ok(Ok(None)) => return,
        Ok(Err(error)) => {
            tracing::debug!(%error, "client rejected");
            vec![Reply::Error(error)]
        }
        Err(_elapsed) => {
            let message = format!("no request arrived within {CLIENT_DEADLINE:?}");
            vec![Reply::Error(Error::new(ErrorKind::Malformed, message))]
        }
    };
    for packet in packets(&replies) {
        match timeout(CLIENT_DEADLINE, socket.send(&packet)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return tracing::debug!(%error, "client disconnected before its answer"),
            Err(_elapsed) => return tracing::debug!("client does not read its answer"),
        }
    }
}

/// Sends the stream's replies, and stops when the client disconnects, even between replies, or does not read.
async fn follow(socket: &UnixSeqpacket, replies: BoxStream<'static, Reply>) {
    let mut replies = replies.chain(stream::iter([Reply::Done]));
    let mut nothing = [0; 1];
    loop {
        let reply = tokio::select! {
            // A client sends nothing more.
            _ = socket.recv(&mut nothing) => return,
            reply = replies.next() => reply,
        };
        let Some(reply) = reply else { return };
        let packet = match packet::encode(&reply) {
            Ok(packet) => Some(packet),
            Err(error) => failure(&error.to_string()),
        };
        let Some(packet) = packet else { return };
        match timeout(CLIENT_DEADLINE, socket.send(&packet)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return tracing::debug!(%error, "monitor disconnected"),
            Err(_elapsed) => return tracing::debug!("monitor does not read its events"),
        }
    }
}

async fn permit<H: Handler>(socket: &UnixSeqpacket, handler: &H) -> Result<(), Error> {
    let peer = socket.peer_cred().map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?;
    let process = PeerProcess::of(socket, peer.pid());
    let process = process.map_err(|error| Error::new(ErrorKind::Denied, error.to_string()))?;
    handler.permit(&process).await
}

/// The buffer for descriptors. Room for two is enough to detect a surplus; the kernel never installs those that do
/// not fit.
#[repr(C, align(8))]
struct Ancillary([u8; 24]);

/// Receives a whole request, which may consist of several packets.
async fn request(socket: &UnixSeqpacket) -> Result<Option<(Request, Option<OwnedFd>)>, Error> {
    let mut parts = parts::Parts::default();
    while let Some((part, netns)) = receive(socket).await? {
        if let Some(whole) = parts.take(part)? {
            return Ok(Some((whole, netns)));
        }
    }
    Ok(None)
}

/// Receives one packet. `None` if the client disconnected without sending any.
async fn receive(socket: &UnixSeqpacket) -> Result<Option<(Request, Option<OwnedFd>)>, Error> {
    let internal = |error: std::io::Error| Error::new(ErrorKind::Internal, error.to_string());
    let mut buffer = vec![0; MAX_PACKET];
    let mut ancillary = Ancillary([0; 24]);
    // Received before the peer is checked: closing a connection with an unread packet would lose our answer.
    let (info, control) =
        socket.recv_with_ancillary(&mut buffer, &mut ancillary.0).await.map_err(internal)?;
    let fds: Vec<OwnedFd> = control
        .into_messages()
        .filter_map(|message| match message {
            OwnedAncillaryMessage::FileDescriptors(fds) => Some(fds),
            OwnedAncillaryMessage::Other(_) => None,
        })
        .flatten()
        .collect();

    let peer = socket.peer_cred().map_err(internal)?;
    if !may_ask(peer.uid(), geteuid().as_raw()) {
        let message = format!("user {} may not ask the agent; run the command as root", peer.uid());
        return Err(Error::new(ErrorKind::Denied, message));
    }
    if info.truncated() {
        let message = format!("the request is larger than {MAX_PACKET} bytes");
        return Err(Error::new(ErrorKind::Malformed, message));
    }
    if info.ancillary_truncated() && fds.len() < 2 {
        let message = "the agent has no file descriptors left; raise its limit (RLIMIT_NOFILE)";
        return Err(Error::new(ErrorKind::TryAgain, message));
    }
    match buffer.get(..info.bytes_read()) {
        None | Some([]) => Ok(None),
        Some(packet) => parse(packet, fds).map(Some),
    }
}

/// Root, and the user that the agent runs as.
fn may_ask(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

/// Parses a request, which must carry exactly the descriptors that it needs.
fn parse(packet: &[u8], mut fds: Vec<OwnedFd>) -> Result<(Request, Option<OwnedFd>), Error> {
    let request: Request = packet::decode(packet).map_err(|error| match error {
        PacketError::Version { theirs } => Error::new(
            ErrorKind::Version,
            format!("the agent speaks version {VERSION} of the protocol, not {theirs}; install the same release of both"),
        ),
        other => Error::new(ErrorKind::Malformed, other.to_string()),
    })?;
    let expected = usize::from(request.carries_netns());
    if fds.len() != expected {
        let found = if fds.len() < 2 { fds.len().to_string() } else { "several".to_owned() };
        let message = format!("the request carries {found} file descriptors instead of {expected}");
        return Err(Error::new(ErrorKind::Malformed, message));
    }
    Ok((request, fds.pop()))
}

/// The replies as packets, up to the first final one. If the handler returned no final one, an error is appended.
fn packets(replies: &[Reply]) -> Vec<Vec<u8>> {
    let end = replies.iter().position(Reply::is_final).map_or(replies.len(), |last| last + 1);
    let replies = replies.get(..end).unwrap_or_default();
    let mut packets = Vec::with_capacity(replies.len());
    for reply in replies {
        match packet::encode(reply) {
            Ok(packet) => packets.push(packet),
            Err(error) => {
                packets.extend(failure(&error.to_string()));
                return packets;
            }
        }
    }
    if !replies.last().is_some_and(Reply::is_final) {
        packets.extend(failure("the agent has no complete answer"));
    }
    packets
}

fn failure(message: &str) -> Option<Vec<u8>> {
    tracing::error!(message, "cannot send answer");
    packet::encode(&Reply::Error(Error::new(ErrorKind::Internal, message))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_agent_s_own_user_may_ask() {
        assert!(may_ask(0, 0) && may_ask(0, 1000) && may_ask(1000, 1000));
        assert!(!may_ask(1000, 0) && !may_ask(1000, 1001));
    }
}
