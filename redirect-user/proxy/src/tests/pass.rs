//! Connections through the proxy, as the application in the pod sees them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::Direction::{self, Inbound, Outbound};
use super::super::context::Context;
use super::super::listener::{Listeners, Phase};
use super::super::quotas::{Asker, Quotas};
use super::super::{Shared, sockets};
use super::namespace::{
    CLIENT_V4, CLIENT_V6, Logged, SERVER_V4, SERVER_V6, application, context, dial, fresh, occupy,
};
use super::{expect_reset, read_all, send_and_end, soon};
use redirect_linux::netns::NetNs;

const OUTBOUND: u16 = 8080;
const INBOUND: u16 = 8081;

fn mapped(ip: Ipv4Addr) -> IpAddr {
    ip.to_ipv6_mapped().into()
}

/// Client and server address, as the client's socket has them.
fn families() -> [(&'static str, IpAddr, IpAddr); 3] {
    [
        ("IPv4", CLIENT_V4.into(), SERVER_V4.into()),
        ("IPv6", CLIENT_V6.into(), SERVER_V6.into()),
        ("IPv4", mapped(CLIENT_V4), mapped(SERVER_V4)),
    ]
}

/// A client's namespace with the listeners, and the pod's with the application.
struct Stage {
    network: NetNs,
    pod: NetNs,
    shared: Shared,
    log: Logged,
    phase: watch::Sender<Phase>,
    task: JoinHandle<()>,
}

impl Stage {
    async fn set(test: &str) -> Option<Self> {
        Self::with(test, |_| {}).await
    }

    async fn with(test: &str, prepare: impl FnOnce(&mut Context)) -> Option<Self> {
        let (network, pod) = (fresh(test, true)?, fresh(test, true)?);
        let (log, shared) = Logged::start(true);
        let outbound = listener(&shared, &network, OUTBOUND).await;
        let inbound = listener(&shared, &network, INBOUND).await;
        let (phase, told) = watch::channel(Phase::Serve);
        let mut context = context(&shared, &pod);
        prepare(&mut context);
        let task = tokio::spawn(Listeners::new(outbound, inbound).serve(Arc::new(context), told));
        Some(Self { network, pod, shared, log, phase, task })
    }

    async fn dial(&self, client: IpAddr, server: IpAddr, port: u16) -> TcpStream {
        let to = SocketAddr::new(server, port);
        dial(&self.shared.namespaces, &self.network, Some(client), to).await.unwrap()
    }

    async fn application(&self, port: u16) -> TcpListener {
        application(&self.shared.namespaces, &self.pod, port).await
    }

    /// An application that does not answer further SYNs, and the connection that it has not accepted.
    async fn deaf(&self, port: u16) -> (Socket, TcpStream) {
        let address = (Ipv6Addr::UNSPECIFIED, port).into();
        let application = occupy(&self.shared.namespaces, &self.pod, address).await;
        application.listen(0).unwrap();
        let to = SocketAddr::new(SERVER_V6.into(), port);
        let first = dial(&self.shared.namespaces, &self.pod, None, to).await.unwrap();
        (application, first)
    }

    /// Ends the pod and returns what the access log says of connections' ends.
    async fn end(self, phase: Phase) -> Vec<Value> {
        self.phase.send_replace(phase);
        soon("the pod's end", self.task).await.unwrap();
        drop(self.shared);
        let lines = self.log.lines();
        lines.into_iter().filter(|line| line["event"] == "close").collect()
    }
}

async fn listener(shared: &Shared, netns: &NetNs, port: u16) -> TcpListener {
    let socket = shared.namespaces.socket(netns, Domain::IPV6, Type::STREAM).await.unwrap();
    sockets::listen(&socket, sockets::listen_address(true, port)).unwrap();
    TcpListener::from_std(socket.into()).unwrap()
}

fn port_of(direction: Direction) -> u16 {
    if direction == Outbound { OUTBOUND } else { INBOUND }
}

#[tokio::test]
async fn the_application_sees_its_client() {
    let Some(stage) = Stage::set("the_application_sees_its_client").await else { return };
    let mut expected = Vec::new();
    for direction in [Outbound, Inbound] {
        let port = port_of(direction);
        let application = stage.application(port).await;
        for (family, client, server) in families() {
            let mut stream = stage.dial(client, server, port).await;
            let source = stream.local_addr().unwrap();
            send_and_end(&mut stream, b"question").await;
            let (mut accepted, peer) = soon("a connection", application.accept()).await.unwrap();
            let to = accepted.local_addr().unwrap();
            assert_eq!((to.ip().to_canonical(), to.port()), (server.to_canonical(), port));
            // Outbound, the client is the pod itself, so any of its own addresses is right.
            let is_the_clients = peer.ip().to_canonical() == client.to_canonical();
            assert_eq!(is_the_clients, direction == Inbound, "{family} {direction:?}: {peer}");
            assert_eq!(read_all(&mut accepted).await.unwrap(), b"question");
            send_and_end(&mut accepted, b"an answer").await;
            assert_eq!(read_all(&mut stream).await.unwrap(), b"an answer");
            expected.push((family, source, SocketAddr::new(server.to_canonical(), port), peer));
        }
    }
    let lines = stage.end(Phase::Drain).await;
    assert_eq!(lines.len(), expected.len());
    for (line, (family, source, destination, upstream_local)) in lines.iter().zip(expected) {
        let plain = |address: SocketAddr| {
            Value::String(SocketAddr::new(address.ip().to_canonical(), address.port()).to_string())
        };
        assert_eq!(line["family"], family);
        assert_eq!(line["source"], plain(source));
        assert_eq!(line["original_destination"], plain(destination));
        assert_eq!(line["upstream_local"], plain(upstream_local));
        assert_eq!((line["bytes_sent"].as_u64(), line["bytes_received"].as_u64()), (Some(8), Some(9)));
        assert_eq!(line["result"], "ok");
    }
}

#[tokio::test]
async fn many_clients_of_one_address_get_through() {
    let Some(stage) = Stage::set("many_clients_of_one_address_get_through").await else { return };
    let application = stage.application(INBOUND).await;
    let echo = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, peer)) = application.accept().await {
            stream.write_all(peer.ip().to_canonical().to_string().as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            kept.push(stream);
        }
    });
    for (_, client, server) in families() {
        let mut streams = Vec::new();
        for _ in 0..200 {
            streams.push(stage.dial(client, server, INBOUND).await);
        }
        for mut stream in streams {
            let seen = read_all(&mut stream).await.unwrap();
            assert_eq!(seen, client.to_canonical().to_string().into_bytes());
        }
    }
    echo.abort();
    stage.end(Phase::Cut).await;
}

#[tokio::test]
async fn a_closed_port_is_a_reset() {
    let Some(stage) = Stage::set("a_closed_port_is_a_reset").await else { return };
    for (_, client, server) in families() {
        for direction in [Outbound, Inbound] {
            expect_reset(&mut stage.dial(client, server, port_of(direction)).await).await;
        }
    }
    for line in stage.end(Phase::Drain).await {
        assert!(line["result"].as_str().unwrap().starts_with("connect: Connection refused"), "{line}");
    }
}

fn is_empty(quotas: &Arc<Quotas>, most: usize) -> bool {
    (0..most).map(|_| quotas.take(Asker::Pod)).collect::<Option<Vec<_>>>().is_some()
}

fn reset(streams: impl IntoIterator<Item = TcpStream>) {
    for stream in streams {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

#[tokio::test]
async fn a_client_that_gives_up_has_the_proxy_give_up() {
    const CLIENTS: usize = 20;
    let unanswered = Quotas::new(CLIENTS);
    let test = "a_client_that_gives_up_has_the_proxy_give_up";
    let bounded = Stage::with(test, |context| context.unanswered = Arc::clone(&unanswered)).await;
    let Some(stage) = bounded else { return };
    for direction in [Outbound, Inbound] {
        let port = port_of(direction);
        let _deaf = stage.deaf(port).await;
        for (_, client, server) in families() {
            let mut waiting = Vec::new();
            for _ in 0..CLIENTS {
                waiting.push(stage.dial(client, server, port).await);
            }
            // A client that has ended its direction still waits for the answer.
            send_and_end(&mut waiting[0], b"question").await;
            super::eventually("all wait", async || unanswered.take(Asker::Pod).is_none()).await;
            reset(waiting);
            super::eventually("none waits", async || is_empty(&unanswered, CLIENTS)).await;
        }
    }
    let lines = stage.end(Phase::Drain).await;
    assert_eq!(lines.len(), 2 * 3 * CLIENTS);
    for line in lines {
        assert!(line["result"].as_str().unwrap().starts_with("client: "), "{line}");
    }
}

#[tokio::test]
async fn a_pod_has_so_many_connections_that_wait_for_an_answer() {
    const MOST: usize = 3;
    let unanswered = Quotas::new(MOST);
    let test = "a_pod_has_so_many_connections_that_wait_for_an_answer";
    let bounded = Stage::with(test, |context| context.unanswered = Arc::clone(&unanswered)).await;
    let Some(stage) = bounded else { return };
    let _deaf = stage.deaf(OUTBOUND).await;
    for (_, client, server) in families() {
        let mut waiting = Vec::new();
        for _ in 0..MOST {
            waiting.push(stage.dial(client, server, OUTBOUND).await);
        }
        super::eventually("all wait", async || unanswered.take(Asker::Pod).is_none()).await;
        expect_reset(&mut stage.dial(client, server, OUTBOUND).await).await;
        reset(waiting);
        super::eventually("none waits", async || is_empty(&unanswered, MOST)).await;
    }
    let lines = stage.end(Phase::Drain).await;
    let refused = |line: &&Value| line["result"].as_str().unwrap().contains("too many connections");
    assert_eq!((lines.len(), lines.iter().filter(refused).count()), (3 * (MOST + 1), 3), "{lines:?}");
}

#[tokio::test]
async fn a_removed_pods_connections_are_cut() {
    let Some(stage) = Stage::set("a_removed_pods_connections_are_cut").await else { return };
    let mut ends = Vec::new();
    for direction in [Outbound, Inbound] {
        let application = stage.application(port_of(direction)).await;
        for (_, client, server) in families() {
            let mut stream = stage.dial(client, server, port_of(direction)).await;
            let (mut accepted, _) = soon("a connection", application.accept()).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            soon("a byte", accepted.read_exact(&mut [0])).await.unwrap();
            ends.extend([stream, accepted]);
        }
    }
    let lines = stage.end(Phase::Cut).await;
    for mut end in ends {
        expect_reset(&mut end).await;
    }
    assert!(lines.len() == 6 && lines.iter().all(|line| line["result"] == "cut"), "{lines:?}");
}

#[tokio::test]
async fn draining_lets_connections_end_but_takes_no_more() {
    let Some(stage) = Stage::set("draining_lets_connections_end_but_takes_no_more").await else { return };
    let application = stage.application(OUTBOUND).await;
    let (_, client, server) = families()[0];
    let mut stream = stage.dial(client, server, OUTBOUND).await;
    let (mut accepted, _) = soon("a connection", application.accept()).await.unwrap();
    stage.phase.send_replace(Phase::Drain);
    let refused = async || {
        let to = SocketAddr::new(server, OUTBOUND);
        dial(&stage.shared.namespaces, &stage.network, None, to).await.is_err()
    };
    super::eventually("new connections are refused", refused).await;
    send_and_end(&mut stream, b"still").await;
    assert_eq!(read_all(&mut accepted).await.unwrap(), b"still");
    drop(accepted);
    assert_eq!(read_all(&mut stream).await.unwrap(), b"");
    drop(stream);
    let lines = stage.end(Phase::Drain).await;
    assert_eq!(lines[0]["result"], "ok");
}

#[tokio::test]
async fn deliveries_leave_the_ports_of_their_clients_alone() {
    let Some(stage) = Stage::set("deliveries_leave_the_ports_of_their_clients_alone").await else { return };
    // A range so small that deliveries often collide with the clients' ports by chance.
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    stage.pod.run(|| std::fs::write(range, "30000 30039")).unwrap().unwrap();
    let application = stage.application(INBOUND).await;
    for (family, client, server) in families() {
        let ports =
            if client.is_ipv6() && family == "IPv4" { [30007, 30009, 30011] } else { [30001, 30003, 30005] };
        let mut open = Vec::new();
        for port in ports {
            let to = SocketAddr::new(server, INBOUND);
            let socket = stage
                .shared
                .namespaces
                .socket(&stage.network, Domain::for_address(to), Type::STREAM)
                .await
                .unwrap();
            socket.bind(&SocketAddr::new(client, port).into()).unwrap();
            let stream = TcpSocket::from_std_stream(socket.into()).connect(to).await.unwrap();
            let (accepted, peer) = soon("a connection", application.accept()).await.unwrap();
            open.push((stream, accepted));
            let met = ports.iter().take(open.len()).any(|&taken| taken == peer.port());
            assert!(!met, "{family}: {peer} is one of its clients");
        }
    }
    stage.end(Phase::Cut).await;
}
