//! Network namespaces for tests, and helpers inside them.

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rtnetlink::LinkUnspec;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::super::access_log::AccessLog;
use super::super::context::Context;
use super::super::resolver::Upstreams;
use super::super::sockets::Namespaces;
use super::super::{Identity, OriginalDestination, Shared};
use super::{eventually, soon};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;
use redirect_testing::skip;

/// `lo` has both in every IPv6 namespace; for IPv4, all of 127.0.0.0/8 is local anyway.
pub(super) const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5);
pub(super) const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 6);
pub(super) const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 5);
pub(super) const SERVER_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// A new namespace with `lo` up. If the test may not create one, prints the reason and returns `None`.
pub(super) fn fresh(test: &str, ipv6: bool) -> Option<NetNs> {
    if !nix::unistd::Uid::effective().is_root() {
        skip(test, "needs root for a network namespace");
        return None;
    }
    match thread::spawn(move || make(ipv6)).join().unwrap() {
        Ok(netns) => Some(netns),
        Err(error) => {
            skip(test, format!("no network namespace of this kind: {error}"));
            None
        }
    }
}

fn make(ipv6: bool) -> io::Result<NetNs> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    for interface in ["all", "default", "lo"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        std::fs::File::options().write(true).open(path)?.write_all(if ipv6 { b"0" } else { b"1" })?;
    }
    let addresses: &[Ipv6Addr] = if ipv6 { &[CLIENT_V6, SERVER_V6] } else { &[] };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(set_up(addresses)).map_err(io::Error::other)?;
    NetNs::current()
}

async fn set_up(addresses: &[Ipv6Addr]) -> Result<(), rtnetlink::Error> {
    let (connection, netlink, _) =
        rtnetlink::new_connection().map_err(|error| rtnetlink::Error::NamespaceError(error.to_string()))?;
    tokio::spawn(connection);
    netlink.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await?;
    for &address in addresses {
        netlink.address().add(1, IpAddr::V6(address), 128).execute().await?;
        // Usable once a kernel worker has found that `lo` needs no duplicate address detection.
        eventually("the address can be used", async || UdpSocket::bind((address, 0)).is_ok()).await;
    }
    Ok(())
}

/// A connection from within the namespace.
pub(super) async fn dial(
    namespaces: &Namespaces,
    netns: &NetNs,
    source: Option<IpAddr>,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = namespaces.socket(netns, Domain::for_address(to), Type::STREAM).await?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    soon("connecting", TcpSocket::from_std_stream(socket.into()).connect(to)).await
}

/// A plain application's socket in the namespace: dual-stack, without any of the proxy's options.
pub(super) async fn occupy(namespaces: &Namespaces, netns: &NetNs, address: SocketAddr) -> Socket {
    let socket = namespaces.socket(netns, Domain::for_address(address), Type::STREAM).await.unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(16).unwrap();
    socket
}

pub(super) async fn application(namespaces: &Namespaces, netns: &NetNs, port: u16) -> TcpListener {
    let address = (Ipv6Addr::UNSPECIFIED, port).into();
    TcpListener::from_std(occupy(namespaces, netns, address).await.into()).unwrap()
}

/// The shared state, with an access log that can be read at the end.
pub(super) struct Logged {
    _directory: TempDir,
    path: PathBuf,
    writer: JoinHandle<()>,
}

impl Logged {
    pub(super) fn start(ipv6: bool) -> (Self, Shared) {
        Self::with_upstreams(ipv6, &[])
    }

    pub(super) fn with_upstreams(ipv6: bool, upstreams: &[SocketAddr]) -> (Self, Shared) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access.log");
        let (access_log, writer) = AccessLog::open(&path).unwrap();
        let namespaces = Namespaces::start().unwrap();
        let retry = Duration::from_millis(30);
        let upstreams = Arc::new(Upstreams::new(upstreams, &directory.path().join("resolv.conf")));
        let original_destination = OriginalDestination::default();
        let access_log = Some(access_log);
        let placement = Placement::Pod;
        let shared =
            Shared { namespaces, access_log, ipv6, placement, original_destination, upstreams, retry };
        (Self { _directory: directory, path, writer }, shared)
    }

    /// All lines, once every user of the log is gone.
    pub(super) fn lines(self) -> Vec<Value> {
        self.writer.join().unwrap();
        let text = std::fs::read_to_string(self.path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

pub(super) fn context(shared: &Shared, netns: &NetNs) -> Context {
    let identity = Identity { name: "shop/cart".into(), uid: "uid-1".into() };
    Context::new(shared.clone(), identity, netns.clone())
}
