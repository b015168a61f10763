//! One captured connection, from accept to close.

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

/// The deadline for connecting to the destination.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How many source ports to try for a delivery.
const ATTEMPTS: usize = 8;

/// Why a connection ended, other than by both ends closing it.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    /// It would loop back to the proxy.
    #[error("loop")]
    Loop,
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("connect: no answer within {CONNECT_TIMEOUT:?}")]
    ConnectTimeout,
    /// The pod has too many connections that wait for their destinations.
    #[error("connect: too many connections of the pod wait for an answer")]
    TooMany,
    #[error(transparent)]
    Relay(#[from] RelayError),
}

/// Source and destination of a connection.
#[derive(Clone, Copy, Debug)]
struct Route {
    direction: Direction,
    source: SocketAddr,
    /// The address that the client dialed.
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

    /// The pod's end, if the proxy of a node can tell whose connection it is.
    fn pod(&self) -> SocketAddr {
        match self.direction {
            Direction::Outbound => self.source,
            Direction::Inbound => self.destination,
        }
    }

    fn family(&self) -> &'static str {
        if self.destination.is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// Whether the upstream connection would come back to one of the proxy's own listeners in this pod.
    ///
    /// Inbound destinations are always the pod's own. Outbound ones are if the pod dials itself, by any of its
    /// addresses. A connection straight to 15001 also looks like that when it comes back.
    fn is_loop_in_pod(&self) -> bool {
        let to_self = self.direction == Direction::Inbound || self.source.ip() == self.destination.ip();
        to_self && PROXY_PORTS.contains(&self.destination.port())
    }

    /// Whether the client dialed one of the proxy's own listeners, in placement `node`.
    fn is_loop_on_node(&self) -> bool {
        // Binding to an address of another host requires a transparent socket.
        let of_host = || std::net::UdpSocket::bind((self.destination.ip(), 0)).is_ok();
        PROXY_PORTS.contains(&self.destination.port()) && of_host()
    }

    /// The mark of the upstream connection. In placement `pod` the kernel side marks deliveries itself; in placement `node`
    /// it can't distinguish them from the proxy's connections for another pod.
    fn mark(&self, placement: Placement) -> u32 {
        match (placement, self.direction) {
            (Placement::Node, Direction::Inbound) => MARK_DELIVERY,
            (Placement::Node, Direction::Outbound) | (Placement::Pod, _) => MARK_PROXY,
        }
    }

    /// The client's address, if the proxy has to borrow it so that the application sees its client. In placement `node`,
    /// where no address is the pod's own, outbound connections borrow the pod's address as well.
    fn borrowed(&self, placement: Placement) -> Option<SocketAddr> {
        let link_local = match self.source.ip() {
            IpAddr::V4(_) => false,
            // A link-local address is valid together with an interface only, and `lo` is another one.
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        // The pod's own address needs no borrowing: the kernel chooses it as the source.
        let own = self.source.ip() == self.destination.ip();
        let others = self.direction == Direction::Inbound || placement == Placement::Node;
        (others && !link_local && !own).then_some(self.source)
    }
}

/// Converts a v4-mapped address to IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        // Unchanged: link-local addresses need their scope.
        IpAddr::V6(_) => address,
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
    }
}

/// Serves one accepted connection. Dropping the future resets both sides.
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
        // The connection no longer waits for its destination.
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

/// Opens the upstream connection, in the family of the destination.
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
            // The port that bind() chose is in use for this destination. Another one may be free.
            Err(error) if borrowed.is_some() && is_port_conflict(&error) && attempts_left > 0 => {}
            result => return result,
        }
    }
}

fn is_port_conflict(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// The connection's lines in the access log: one when it opens, one when it ends.
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
            // The result if the connection's task is cancelled.
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
