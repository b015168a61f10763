//! Sockets that live in a pod's network namespace.
//!
//! A socket belongs for ever to the namespace of the thread that called `socket(2)`; bind, listen and connect work
//! from any thread. So one thread does nothing but `setns(2)` and `socket(2)`, and everything else happens on the
//! runtime's threads.
//!
//! One thread for all pods rather than one per pod: a pod then costs no thread, and a thread that stayed in a pod's
//! namespace would keep it alive after the pod. `setns(2)` costs about as much as `socket(2)`, so that one thread makes
//! more than a hundred thousand sockets per second; it enters a namespace only if the last request was for another one, and
//! returns to the host's once the queue is empty, which under load is rare.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use redirect_ebpf::constants::MARK_PROXY;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::sync::{mpsc, oneshot};

use redirect_linux::netns::NetNs;

/// How many requests may wait for the thread.
const QUEUE: usize = 1024;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// When a silent peer is asked for a sign of life, how often, how many times.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(180))
    .with_interval(Duration::from_secs(30))
    .with_retries(5);

/// Why a pod's listeners cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(
        "its network namespace cannot be entered: {0}; the proxy needs CAP_SYS_ADMIN, and the pod to exist"
    )]
    Namespace(io::Error),
    #[error("port {0}: another process listens on it in the pod; move that process to another port")]
    InUse(u16),
    #[error("port {port}: {error}; the proxy needs CAP_NET_ADMIN in the pod's network namespace")]
    Listen { port: u16, error: io::Error },
}

impl OpenError {
    pub(super) fn of(port: u16, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(port),
            _ => Self::Listen { port, error },
        }
    }
}

type Work = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Hands work to the thread that visits namespaces. The thread ends with the last handle.
#[derive(Clone, Debug)]
pub(super) struct Namespaces {
    jobs: mpsc::Sender<(NetNs, Work)>,
}

impl Namespaces {
    pub(super) fn start() -> io::Result<Self> {
        let home = NetNs::current()?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        thread::Builder::new().name("netns".into()).spawn(move || visit(&home, queue))?;
        Ok(Self { jobs })
    }

    /// Makes a socket, TCP or UDP, of this domain in the namespace.
    pub(super) async fn socket(&self, netns: &NetNs, domain: Domain, kind: Type) -> io::Result<Socket> {
        self.within(netns, move || new_socket(domain, kind)).await
    }

    /// Whether the namespace has IPv6.
    pub(super) async fn has_ipv6(&self, netns: &NetNs) -> io::Result<bool> {
        self.within(netns, || Ok(ipv6_is_enabled_here())).await
    }

    async fn within<T: Send + 'static>(
        &self,
        netns: &NetNs,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (done, result) = oneshot::channel();
        let work: Work = Box::new(move |entered| {
            let _ = done.send(entered.and_then(|()| work()));
        });
        let gone =
            || io::Error::other("the thread that enters network namespaces has ended; restart the proxy");
        self.jobs.send((netns.clone(), work)).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

fn visit(home: &NetNs, mut queue: mpsc::Receiver<(NetNs, Work)>) {
    while let Some(first) = queue.blocking_recv() {
        let mut job = Some(first);
        // The namespace is held here, so that its inode cannot be another one's within the batch.
        let mut here: Option<(NetNs, u64)> = None;
        while let Some((netns, work)) = job {
            work(enter(netns, &mut here));
            job = queue.try_recv().ok();
        }
        drop(here);
        if let Err(error) = home.enter() {
            // To go on would keep a pod's namespace alive and, worse, take it for the host's.
            tracing::error!("cannot return to the host's network namespace: {error}; restart the proxy");
            return;
        }
    }
}

fn enter(netns: NetNs, here: &mut Option<(NetNs, u64)>) -> io::Result<()> {
    let inode = netns.inode()?;
    if here.as_ref().is_none_or(|(_, current)| *current != inode) {
        netns.enter()?;
        *here = Some((netns, inode));
    }
    Ok(())
}

/// `lo` tells for all: the agent, too, leaves IPv6 out of a pod whose `lo` has none.
fn ipv6_is_enabled_here() -> bool {
    // /proc/sys/net shows the calling thread's namespace. Without IPv6 in the kernel the file does not exist.
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

fn new_socket(domain: Domain, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    // Non-blocking and close-on-exec from the start: no further system call on the one thread that all share.
    Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))
}

/// Where a pod's listener is bound.
pub(super) fn listen_address(ipv6: bool, port: u16) -> SocketAddr {
    if ipv6 { (Ipv6Addr::UNSPECIFIED, port).into() } else { (Ipv4Addr::UNSPECIFIED, port).into() }
}

/// Makes a listener of a new socket.
pub(super) fn listen(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)?;
    // Two proxies share the port while one takes over from the other.
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    set_transparent(socket, address)?;
    if address.is_ipv6() {
        // One socket for both families, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    start_listening(socket)
}

/// Lets a bound socket take connections.
pub(super) fn start_listening(socket: &Socket) -> io::Result<()> {
    socket.listen(BACKLOG)
}

/// Binds a new socket of the resolver. On an address, questions come to this very one; on the unspecified address they come
/// to whatever address the pods ask.
pub(super) fn bind_resolver(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)?;
    // Two proxies share the port while one takes over from the other.
    socket.set_reuse_port(true)?;
    if socket.r#type()? == Type::STREAM {
        // On a UDP socket this would let any other process take the questions.
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if address.ip().is_unspecified() {
        set_transparent(socket, address)?;
    }
    socket.bind(&address.into())
}

/// Has a socket for datagrams tell the address that each was sent to.
pub(super) fn tell_destinations(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

/// Makes a new socket one of the proxy's own connections.
pub(super) fn mark_as_own(socket: &Socket) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)
}

/// Gives a new socket an address of another host and a port of the kernel's choice, which it returns.
///
/// Without `IP_BIND_ADDRESS_NO_PORT`, on purpose: `bind(0)` prefers ports of one parity, `connect()` those of the other,
/// by which clients choose theirs. So a delivery seldom wants the port of one of its client's own connections; see
/// `clients` for why it must not have it.
pub(super) fn borrow_address(socket: &Socket, client: SocketAddr) -> io::Result<u16> {
    set_transparent(socket, client)?;
    match client {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // Many deliveries borrow the same address; they differ in where they go.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(client.ip(), 0).into())?;
    Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    // The one at level SOL_IP is what the kernel looks at in both families; ztunnel sets it on IPv6 sockets as well.
    let shared = socket.set_ip_transparent_v4(true);
    if address.is_ipv4() {
        return shared;
    }
    // Either is enough, and there are kernels that know only one of them on an IPv6 socket.
    socket.set_ip_transparent_v6(true).or(shared)
}

/// Where a connection that a rule of netfilter redirected was to go.
pub(super) fn original_destination(socket: SockRef<'_>) -> Option<SocketAddr> {
    let found = socket.original_dst_v4().or_else(|_| socket.original_dst_v6());
    found.ok()?.as_socket()
}

/// Small writes at once, and silent peers noticed.
pub(super) fn tune(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}
