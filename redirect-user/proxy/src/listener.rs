//! One pod's listeners, and its connections until the pod is removed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Direction;
use super::connection;
use super::context::Context;
use super::resolver::Resolver;
use super::sockets::{self, OpenError};

/// How long accepting pauses when the process is out of descriptors.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// The phase of a pod's task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Accept and relay.
    Serve,
    /// Stop accepting, and end with the last connection.
    Drain,
    /// Reset all connections and end.
    Cut,
}

/// The listeners of a pod.
#[derive(Debug)]
pub(super) struct Listeners {
    outbound: TcpListener,
    inbound: TcpListener,
    resolver: Option<Resolver>,
}

impl Listeners {
    /// Opens the listeners in the pod's namespace.
    pub(super) async fn open(context: &Context) -> Result<Self, OpenError> {
        let namespaces = &context.shared.namespaces;
        let has_ipv6 = namespaces.has_ipv6(&context.netns).await.map_err(OpenError::Namespace)?;
        let ipv6 = context.shared.ipv6 && has_ipv6;
        let outbound = open(context, Direction::Outbound, ipv6).await?;
        let inbound = open(context, Direction::Inbound, ipv6).await?;
        let resolver = Resolver::open(context, ipv6).await?;
        Ok(Self { resolver: Some(resolver), ..Self::new(outbound, inbound) })
    }

    /// Without a resolver.
    pub(super) fn new(outbound: TcpListener, inbound: TcpListener) -> Self {
        Self { outbound, inbound, resolver: None }
    }

    /// Accepts and relays until the phase changes.
    pub(super) async fn serve(mut self, context: Arc<Context>, mut phase: watch::Receiver<Phase>) {
        let mut resolvers = JoinSet::new();
        if let Some(resolver) = self.resolver.take() {
            resolvers.spawn(resolver.serve(Arc::clone(&context)));
        }
        let mut connections = JoinSet::new();
        loop {
            let (accepted, direction) = tokio::select! {
                // The sender lives as long as the pod.
                _ = phase.wait_for(|phase| *phase != Phase::Serve) => break,
                accepted = self.outbound.accept() => (accepted, Direction::Outbound),
                accepted = self.inbound.accept() => (accepted, Direction::Inbound),
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((stream, peer)) => spawn(&mut connections, &context, stream, peer, direction),
                Err(error) => pause_after(&error).await,
            }
        }
        drop(self);
        resolvers.shutdown().await;
        tokio::select! {
            _ = phase.wait_for(|phase| *phase == Phase::Cut) => {}
            () = async { while connections.join_next().await.is_some() {} } => {}
        }
        // Waits until every task has ended and closed its sockets; the caller relies on that.
        connections.shutdown().await;
    }
}

async fn open(context: &Context, direction: Direction, ipv6: bool) -> Result<TcpListener, OpenError> {
    let port = direction.port();
    let failed = |error| OpenError::of(port, error);
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket =
        context.shared.namespaces.socket(&context.netns, domain, Type::STREAM).await.map_err(failed)?;
    sockets::listen(&socket, sockets::listen_address(ipv6, port)).map_err(failed)?;
    TcpListener::from_std(socket.into()).map_err(failed)
}

fn spawn(
    connections: &mut JoinSet<()>,
    context: &Arc<Context>,
    stream: TcpStream,
    peer: SocketAddr,
    direction: Direction,
) {
    connections.spawn(connection::serve(Arc::clone(context), stream, peer, direction));
}

/// A connection that failed in the backlog is no fault of the listener. Without descriptors, an immediate retry would
/// only spin.
async fn pause_after(error: &io::Error) {
    let exhausted = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    if error.raw_os_error().is_some_and(|code| exhausted.contains(&code)) {
        warn_once_per_second(error);
        sleep(EXHAUSTED_PAUSE).await;
    }
}

/// All pods run out of descriptors together, so one warning is enough.
fn warn_once_per_second(error: &io::Error) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let now = START.get_or_init(Instant::now).elapsed().as_secs();
    if NEXT.fetch_max(now + 1, Ordering::Relaxed) <= now {
        tracing::warn!("accept: {error}; connections wait. Raise the open file limit of the process");
    }
}
