//! Sockets in a pod's network namespace.
//!
//! A socket belongs forever to the namespace of the thread that called `socket(2)`; bind, listen and connect work from any
//! thread. So one thread does nothing but `setns(2)` and `socket(2)`, and everything else happens on the runtime's threads.
//!
//! There is one thread for all pods: a pod then costs no thread, and a thread that stayed in a pod's namespace would keep
//! it alive after the pod. `setns(2)` costs about as much as `socket(2)`, so one thread creates more than a hundred
//! thousand sockets per second. It enters a namespace only if the last request was for another one, and returns to the
//! host's once the queue is empty, which is rare under load.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use redirect_ebpf::constants::MARK_PROXY;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::sync::{mpsc, oneshot};

use redirect_linux::netns::NetNs;

/// The capacity of the thread's queue.
const QUEUE: usize = 1024;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// When to probe a silent peer, how often, and how many times.
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

/// Sends jobs to the thread that enters namespaces. The thread ends with the last handle.
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

    /// Creates a TCP or UDP socket of this domain in the namespace.
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
        // Holds the namespace, so that its inode is not reused within the batch.
        let mut here: Option<(NetNs, u64)> = None;
        while let Some((netns, work)) = job {
            work(enter(netns, &mut here));
            job = queue.try_recv().ok();
        }
        drop(here);
        if let Err(error) = home.enter() {
            // Continuing would keep a pod's namespace alive and, worse, take it for the host's.
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

/// `lo` decides: the agent also skips IPv6 in a pod whose `lo` does not have it.
fn ipv6_is_enabled_here() -> bool {
    // /proc/sys/net shows the calling thread's namespace. Without IPv6 in the kernel the file does not exist.
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

fn new_socket(domain: Domain, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    // Non-blocking and close-on-exec from the start: no further system call on the shared thread.
    Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))
}

/// The address of a pod's listener.
pub(super) fn listen_address(ipv6: bool, port: u16) -> SocketAddr {
    if ipv6 { (Ipv6Addr::UNSPECIFIED, port).into() } else { (Ipv4Addr::UNSPECIFIED, port).into() }
}

/// Makes a new socket listen.
pub(super) fn listen(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)?;
    // Two proxies share the port while one replaces the other.
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    set_transparent(socket, address)?;
    if address.is_ipv6() {
        // One socket for both families, regardless of net.ipv6.bindv6only.
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    start_listening(socket)
}

/// Starts to accept connections on a bound socket.
pub(super) fn start_listening(socket: &Socket) -> io::Result<()> {
    socket.listen(BACKLOG)
}

/// Binds a new socket of the resolver. With an address, it receives queries to that address only; with the unspecified
/// address, queries to any address.
pub(super) fn bind_resolver(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)?;
    // Two proxies share the port while one replaces the other.
    socket.set_reuse_port(true)?;
    if socket.r#type()? == Type::STREAM {
        // On a UDP socket this would let any other process intercept queries.
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

/// Makes a UDP socket report each datagram's destination address.
pub(super) fn tell_destinations(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

/// Marks a new socket as the proxy's own connection.
pub(super) fn mark_as_own(socket: &Socket) -> io::Result<()> {
    socket.set_mark(MARK_PROXY)
}

/// Binds a new socket to an address of another host and a port of the kernel's choice, which is returned.
///
/// Deliberately without `IP_BIND_ADDRESS_NO_PORT`: `bind(0)` prefers ports of one parity, and `connect()`, which clients
/// use, those of the other. So a delivery seldom gets the port of one of its client's own connections; `clients`
/// explains why it must not.
pub(super) fn borrow_address(socket: &Socket, client: SocketAddr) -> io::Result<u16> {
    set_transparent(socket, client)?;
    match client {
        SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
        SocketAddr::V6(_) => socket.set_freebind_v6(true)?,
    }
    // Many deliveries borrow the same address, and differ in their destinations.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(client.ip(), 0).into())?;
    Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
}

fn set_transparent(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    // The kernel checks the option at level SOL_IP in both families; ztunnel also sets it on IPv6 sockets.
    let shared = socket.set_ip_transparent_v4(true);
    if address.is_ipv4() {
        return shared;
    }
    // Either one suffices, and some kernels know only one of them on an IPv6 socket.
    socket.set_ip_transparent_v6(true).or(shared)
}

/// The original destination of a connection that a netfilter rule redirected.
pub(super) fn original_destination(socket: SockRef<'_>) -> Option<SocketAddr> {
    let found = socket.original_dst_v4().or_else(|_| socket.original_dst_v6());
    found.ok()?.as_socket()
}

/// Sends small writes at once, and detects silent peers.
pub(super) fn tune(socket: SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}
