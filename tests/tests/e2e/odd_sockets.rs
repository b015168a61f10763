//! Sockets that connect in an unusual way. None of them may reach its destination past the proxy without being counted.
//!
//! The behavior of Istio's iptables rules (OUTPUT and PREROUTING of the pod's `nat` table) is noted for comparison.

mod marks;
pub(crate) mod nested;
mod others;
mod ways;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::{Direction as Way, Reason, Verdict};
use redirect_tests::stack::canonical;
use redirect_tests::wait::SOON;
use redirect_tests::{Connection, Direction, Families, Netns, Node, Pod, Server, Stack, wait};
use socket2::{Protocol, Socket, Type};

use crate::context::Context;
pub(crate) use ways::drop_capabilities;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    [ways::trials(context), marks::trials(context), others::trials(context), nested::trials(context)]
        .into_iter()
        .flatten()
        .collect()
}

/// How long to wait for something that must not happen: longer than the first retransmission of a SYN takes.
pub(crate) const LONG_ENOUGH: Duration = Duration::from_millis(1500);

/// An enrolled client, and a server outside the mesh that it may reach through the proxy only.
pub(crate) struct Scene {
    stack: Stack,
    pub(crate) client: Pod,
    pub(crate) server: Pod,
    pub(crate) listening: Server,
    pub(crate) to: SocketAddr,
    /// The number of segments that the server's namespace had received before.
    segments: u64,
}

impl Scene {
    /// On the shared node.
    fn on_shared(context: &Context, stack: Stack) -> Result<Self> {
        let node = context.node()?;
        let client = node.enrolled("client", Families::Dual)?;
        Self::with(client, &node, stack)
    }

    /// On a node of its own, for tests that count, or that stop the proxy.
    pub(crate) fn alone(context: &Context, stack: Stack) -> Result<Self> {
        let node = Node::start(&context.session()?)?;
        let client = node.enrolled("client", Families::Dual)?;
        Self::with(client, &node, stack)
    }

    fn with(client: Pod, node: &Arc<Node>, stack: Stack) -> Result<Self> {
        let server = node.plain("server", Families::Dual)?;
        let listening = server.listen(stack)?;
        let to = server.endpoint(stack.family(), listening.port())?;
        let segments = segments_received(server.netns())?;
        Ok(Self { stack, client, server, listening, to, segments })
    }

    /// The destination as the client's socket spells it.
    pub(crate) fn destination(&self) -> SocketAddr {
        self.stack.spell(self.to)
    }

    /// A socket of the client's.
    pub(crate) fn socket(&self) -> Result<Socket> {
        socket_in(self.client.netns(), self.stack)
    }

    /// Checks that the connection reached the server once, through the proxy.
    fn is_captured(&self, mut connection: Connection) -> Result<()> {
        connection.exchange("hello")?;
        ensure!(connection.peer_name == self.destination(), "getpeername says {}", connection.peer_name);
        let source = canonical(connection.local_name);
        let entries = self.client.proxied(Direction::Outbound, self.to)?;
        let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
        ensure!(entry.source == source, "{source} is not the source of {entry:#?}");
        self.came_by_the_proxy(&[connection])
    }

    /// Checks that exactly these connections reached the server, none of them from the client itself.
    pub(crate) fn came_by_the_proxy(&self, connections: &[Connection]) -> Result<()> {
        let accepted = self.listening.accepted();
        ensure!(accepted.len() == connections.len(), "the server accepted {accepted:?}");
        for connection in connections {
            ensure!(accepted.contains(&connection.heard), "{:?} is not in {accepted:?}", connection.heard);
            ensure!(connection.heard.peer != canonical(connection.local_name), "the client came itself");
        }
        self.were_proxied(connections.len())
    }

    /// Checks that the proxy had exactly this many of the client's connections to the server.
    fn were_proxied(&self, wanted: usize) -> Result<()> {
        // The access log may lag a moment.
        let mut proxied = 0;
        let enough = wait::until_true("line in the access log", SOON, || {
            proxied = self.client.proxied_so_far(Direction::Outbound, self.to)?.len();
            Ok(proxied >= wanted)
        });
        enough.with_context(|| format!("{proxied} of {wanted} connections were proxied"))?;
        ensure!(proxied == wanted, "{proxied} connections were proxied instead of {wanted}");
        Ok(())
    }

    /// Checks that not a single segment reached the server, and that drops were counted for this reason.
    pub(crate) fn was_held(&self, way: Way, reason: Reason) -> Result<()> {
        ensure!(self.listening.accepted().is_empty(), "the server accepted {:?}", self.listening.accepted());
        let segments = self.segments_came()?;
        ensure!(segments == 0, "{segments} segments came to the server");
        let dropped = self.dropped(way, reason)?;
        ensure!(dropped > 0, "nothing was counted as {}", reason.label());
        Ok(())
    }

    /// How many segments the server's namespace has received.
    pub(crate) fn segments_came(&self) -> Result<u64> {
        Ok(segments_received(self.server.netns())? - self.segments)
    }

    /// How many packets of the family the node's programs have dropped for this reason.
    pub(crate) fn dropped(&self, way: Way, reason: Reason) -> Result<u64> {
        dropped(self.client.node(), self.stack, way, reason)
    }
}

/// A stream socket of a namespace.
fn socket_in(netns: &Netns, stack: Stack) -> Result<Socket> {
    Ok(netns.run(|| Socket::new(stack.domain(), Type::STREAM, Some(Protocol::TCP)))??)
}

/// How many packets of the family the node's programs have dropped for this reason.
pub(crate) fn dropped(node: &Node, stack: Stack, way: Way, reason: Reason) -> Result<u64> {
    let status = node.status()?;
    let counts = status.counters.iter().filter(|counter| {
        counter.family == stack.family().name()
            && counter.direction == way.label()
            && counter.verdict == Verdict::Dropped.label()
            && counter.reason == reason.label()
    });
    Ok(counts.map(|counter| counter.connections).sum())
}

/// The TCP segments that a namespace has received, of both families.
pub(crate) fn segments_received(netns: &Netns) -> Result<u64> {
    netns.statistic("snmp", "Tcp", "InSegs")
}

/// Starts to connect, without waiting.
fn begin(socket: &Socket, to: SocketAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        result => bail!("connect() of a non-blocking socket: {result:?}"),
    }
}

/// Waits for the connection that [`begin`] started.
fn end(socket: Socket, limit: Duration) -> Result<Connection> {
    let connected = wait::until("connection", limit, || {
        if let Some(error) = socket.take_error()? {
            return Err(error.into());
        }
        Ok(socket.peer_addr().is_ok().then_some(()))
    });
    connected?;
    socket.set_nonblocking(false)?;
    greet(socket)
}

/// Waits for the greeting of the server that the socket is connected to.
fn greet(socket: Socket) -> Result<Connection> {
    socket.set_read_timeout(Some(wait::patient(SOON)))?;
    socket.set_write_timeout(Some(wait::patient(SOON)))?;
    Connection::greeted(socket.into())
}

/// Connects an existing socket within a limit.
fn connect(socket: Socket, to: SocketAddr) -> Result<Connection> {
    socket.connect_timeout(&to.into(), wait::patient(SOON))?;
    greet(socket)
}

/// Checks that an attempt to connect fails.
pub(crate) fn fails(socket: &Socket, to: SocketAddr) -> Result<io::Error> {
    match socket.connect_timeout(&to.into(), LONG_ENOUGH) {
        Ok(()) => bail!("the connection to {to} was made"),
        Err(error) => Ok(error),
    }
}

/// Waits long enough for a SYN's retransmission.
fn let_it_retry() {
    thread::sleep(LONG_ENOUGH);
}
