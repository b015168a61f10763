//! One captured connection, from its acceptance to its end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use redirect_ebpf::constants::{MARK_DELIVERY, MARK_PROXY, PROXY_PORTS};
use socket2::{Domain, SockRef, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::access_log::{ConnectionLine, End, Event, Line};
use super::context::Context;
use super::quotas::Asker;
use super::relay::{Connection, Counters, RelayError, failure_of, relay};
use super::{Direction, OriginalDestination, sockets};
use redirect_protocol::placement::Placement;

/// How long the destination may take to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How many source ports are tried for a delivery.
const ATTEMPTS: usize = 8;

/// Why a connection ended otherwise than by both ends' leave.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    /// It would come back to the proxy.
    #[error("loop")]
    Loop,
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("connect: no answer within {CONNECT_TIMEOUT:?}")]
    ConnectTimeout,
    /// Others of the pod wait for their destinations.
    #[error("connect: too many connections of the pod wait for an answer")]
    TooMany,
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// Where a connection comes from and where it was to go.
#[derive(Clone, Copy, Debug)]
struct Route {
    direction: Direction,
    source: SocketAddr,
    /// What the client dialled.
    destination: SocketAddr,
}

impl Route {
    fn of(context: &Context, stream: &TcpStream, peer: SocketAddr, direction: Direction) -> io::Result<Self> {
        let remembered = match context.shared.original_destination {
            OriginalDestination::Socket => None,
            OriginalDestination::Conntrack => sockets::original_destination(SockRef::from(stream)),
        };
        let destination = remembered.map_or_else(|| stream.local_addr(), Ok)?;
        Ok(Self { direction, source: canonical(peer), destination: canonical(destination) })
    }

    /// The pod's end, as far as the proxy of a node knows whose connection it is.
    fn pod(&self) -> SocketAddr {
        match self.direction {
            Direction::Outbound => self.source,
            Direction::Inbound => self.destination,
        }
    }

    fn family(&self) -> &'static str {
        if self.destination.is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// Whether to connect on would come back to one of the proxy's own listeners in this pod.
    ///
    /// Inbound destinations are always the pod's own. Outbound ones are if the pod dials itself, by whatever address,
    /// which is also what a connection straight to 15001 looks like the second time round.
    fn is_loop_in_pod(&self) -> bool {
        let to_self = self.direction == Direction::Inbound || self.source.ip() == self.destination.ip();
        to_self && PROXY_PORTS.contains(&self.destination.port())
    }

    /// Whether the client dialled one of the proxy's own listeners, in placement `node`.
    fn is_loop_on_node(&self) -> bool {
        // Nobody can be bound to another's address without being transparent.
        let of_host = || std::net::UdpSocket::bind((self.destination.ip(), 0)).is_ok();
        PROXY_PORTS.contains(&self.destination.port()) && of_host()
    }

    /// The mark of the connection to the destination. In placement `pod` the kernel side marks deliveries itself; on the node
    /// it cannot tell them from what the proxy connects for another pod.
    fn mark(&self, placement: Placement) -> u32 {
        match (placement, self.direction) {
            (Placement::Node, Direction::Inbound) => MARK_DELIVERY,
            (Placement::Node, Direction::Outbound) | (Placement::Pod, _) => MARK_PROXY,
        }
    }

    /// The client's address where the proxy has to borrow it, so that the application sees its client; on the node, where
    /// no address is the pod's, the same holds for the pod's own connections.
    fn borrowed(&self, placement: Placement) -> Option<SocketAddr> {
        let link_local = match self.source.ip() {
            IpAddr::V4(_) => false,
            // Means something together with an interface only, and on `lo` it is another one's.
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        // The pod's own address needs no borrowing: the kernel picks it as the source by itself.
        let own = self.source.ip() == self.destination.ip();
        let others = self.direction == Direction::Inbound || placement == Placement::Node;
        (others && !link_local && !own).then_some(self.source)
    }
}

/// An IPv4 address as such, even if it comes from an IPv6 socket.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        // As it is: link-local addresses need their scope.
        IpAddr::V6(_) => address,
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
    }
}

/// Serves one accepted connection. When the future is dropped, both sides are reset.
pub(super) async fn serve(context: Arc<Context>, stream: TcpStream, peer: SocketAddr, direction: Direction) {
    let client = Connection::new(stream);
    let route = match Route::of(&context, client.stream(), peer, direction) {
        Ok(route) => route,
        Err(error) => return tracing::debug!("pod {}: getsockname: {error}", context.identity.name),
    };
    let mut journal = Journal::open(&context, route);
    let outcome = converse(&context, route, client, &mut journal).await;
    journal.result = match outcome {
        Ok(()) => "ok".into(),
        Err(error) => error.to_string(),
    };
}

async fn converse(
    context: &Context,
    route: Route,
    client: Connection,
    journal: &mut Journal<'_>,
) -> Result<(), ConnectionError> {
    let is_loop = match context.shared.placement {
        Placement::Pod => route.is_loop_in_pod(),
        Placement::Node => route.is_loop_on_node(),
    };
    if is_loop {
        return Err(ConnectionError::Loop);
    }
    let borrows = route.borrowed(context.shared.placement).is_some();
    let _present = borrows.then(|| context.clients.enter(route.source, route.destination));
    let asker = Asker::of(context.shared.placement, route.pod());
    let waits = context.unanswered.take(asker).ok_or(ConnectionError::TooMany)?;
    let upstream = tokio::select! {
        connected = timeout(CONNECT_TIMEOUT, connect(context, route)) => {
            connected.map_err(|_| ConnectionError::ConnectTimeout)?.map_err(ConnectionError::Connect)?
        }
        // It does not wait for the answer any more.
        error = failure_of(client.stream()) => return Err(RelayError::Client(error).into()),
    };
    drop(waits);
    let upstream = Connection::new(upstream);
    journal.upstream_local = upstream.stream().local_addr().ok();
    for stream in [client.stream(), upstream.stream()] {
        if let Err(error) = sockets::tune(SockRef::from(stream)) {
            tracing::debug!("pod {}: socket options: {error}", context.identity.name);
        }
    }
    relay(client.stream(), upstream.stream(), &journal.counters).await?;
    client.finish();
    upstream.finish();
    Ok(())
}

/// Connects on, in the family of the destination.
async fn connect(context: &Context, route: Route) -> io::Result<TcpStream> {
    let placement = context.shared.placement;
    let borrowed = route.borrowed(placement);
    let mut attempts_left = ATTEMPTS;
    loop {
        attempts_left -= 1;
        let domain = Domain::for_address(route.destination);
        let socket = context.shared.namespaces.socket(&context.netns, domain, Type::STREAM).await?;
        socket.set_mark(route.mark(placement))?;
        if let Some(client) = borrowed {
            let port = sockets::borrow_address(&socket, client)?;
            let source = SocketAddr::new(client.ip(), port);
            if context.clients.contains(source, route.destination) && attempts_left > 0 {
                continue;
            }
        }
        match TcpSocket::from_std_stream(socket.into()).connect(route.destination).await {
            // The port that bind() picked is taken after all, towards this destination. Another one may be free.
            Err(error) if borrowed.is_some() && is_port_conflict(&error) && attempts_left > 0 => {}
            result => return result,
        }
    }
}

fn is_port_conflict(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// The connection's lines in the access log: one at the beginning, one however it ends.
struct Journal<'a> {
    context: &'a Context,
    route: Route,
    began: Instant,
    upstream_local: Option<SocketAddr>,
    counters: Counters,
    result: String,
}

impl<'a> Journal<'a> {
    fn open(context: &'a Context, route: Route) -> Self {
        let journal = Self {
            context,
            route,
            began: Instant::now(),
            upstream_local: None,
            counters: Counters::default(),
            // What remains if the connection's task is cancelled.
            result: "cut".into(),
        };
        journal.write(Event::Open, None);
        journal
    }

    fn write(&self, event: Event, end: Option<End>) {
        let Some(log) = &self.context.shared.access_log else { return };
        log.write(Line::Connection(ConnectionLine {
            event,
            pod: self.context.pod(self.route.pod()),
            uid: Arc::clone(&self.context.identity.uid),
            direction: self.route.direction,
            family: self.route.family(),
            source: self.route.source,
            original_destination: self.route.destination,
            upstream_local: self.upstream_local,
            end,
        }));
    }
}

impl Drop for Journal<'_> {
    fn drop(&mut self) {
        let end = End {
            bytes_sent: self.counters.sent.load(Ordering::Relaxed),
            bytes_received: self.counters.received.load(Ordering::Relaxed),
            duration_ms: self.began.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
            result: std::mem::take(&mut self.result),
        };
        self.write(Event::Close, Some(end));
    }
}
