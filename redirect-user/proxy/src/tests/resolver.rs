//! A pod's resolver, with upstream servers that answer, keep silent or do not exist.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use redirect_ebpf::constants::PORT_DNS;
use socket2::{Domain, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::super::resolver::Resolver;
use super::super::sockets::Namespaces;
use super::namespace::{CLIENT_V6, Logged, context, dial, fresh, occupy};
use super::soon;
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::TXT));
    message.to_vec().unwrap()
}

/// An answer of as many bytes as the query's first label says; no answer if that is not a number.
fn reply(question: &[u8], limit: usize) -> Option<Vec<u8>> {
    let message = Message::from_vec(question).unwrap();
    let name = message.queries[0].name().clone();
    let length: usize = std::str::from_utf8(name.iter().next()?).ok()?.parse().ok()?;
    let mut reply = message.into_response();
    let text = vec!["x".repeat(100); length.div_ceil(100)];
    reply.add_answer(Record::from_rdata(name, 60, RData::TXT(TXT::new(text))));
    let bytes = reply.to_vec().unwrap();
    Some(if bytes.len() > limit { reply.truncate().to_vec().unwrap() } else { bytes })
}

async fn datagram(namespaces: &Namespaces, netns: &NetNs, address: SocketAddr) -> UdpSocket {
    let socket = namespaces.socket(netns, Domain::for_address(address), Type::DGRAM).await.unwrap();
    socket.bind(&address.into()).unwrap();
    UdpSocket::from_std(socket.into()).unwrap()
}

/// An upstream server, over UDP and TCP.
async fn upstream(namespaces: &Namespaces, netns: &NetNs, address: SocketAddr) -> JoinSet<()> {
    let socket = datagram(namespaces, netns, address).await;
    let listener = TcpListener::from_std(occupy(namespaces, netns, address).await.into()).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, source)) = socket.recv_from(&mut buffer).await {
            if let Some(reply) = reply(&buffer[..length], 512) {
                socket.send_to(&reply, source).await.unwrap();
            }
        }
    });
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut question = vec![0; length.into()];
            stream.read_exact(&mut question).await.unwrap();
            send_framed(&mut stream, &reply(&question, usize::MAX).unwrap()).await;
        }
    });
    tasks
}

async fn send_framed(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
    stream.write_all(bytes).await.unwrap();
}

async fn by_udp(namespaces: &Namespaces, netns: &NetNs, resolver: IpAddr, bytes: &[u8]) -> Message {
    let unspecified =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
    let socket = datagram(namespaces, netns, SocketAddr::new(unspecified, 0)).await;
    let resolver = SocketAddr::new(resolver, PORT_DNS);
    socket.send_to(bytes, resolver).await.unwrap();
    let mut buffer = [0; 4096];
    let (length, source) = soon("an answer", socket.recv_from(&mut buffer)).await.unwrap();
    assert_eq!(source, resolver);
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn read_framed(stream: &mut TcpStream) -> Message {
    let length = soon("an answer", stream.read_u16()).await.unwrap();
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await.unwrap();
    Message::from_vec(&bytes).unwrap()
}

#[tokio::test]
async fn questions_are_answered_by_whichever_upstream_server_can() {
    let test = "questions_are_answered_by_whichever_upstream_server_can";
    let Some(netns) = fresh(test, true) else { return };
    // A server that never answers, one that does not exist, one that answers; the last one over IPv6 as well.
    for (server, resolvers) in [("127.0.0.9:5300", [V4, V6]), ("[fd00::6]:5300", [V6, V4])] {
        let (silent, server) = ("127.0.0.8:5300".parse().unwrap(), server.parse().unwrap());
        let upstreams = [silent, "[fd00::99]:5300".parse().unwrap(), server];
        let (log, shared) = Logged::with_upstreams(true, &upstreams);
        let namespaces = shared.namespaces.clone();
        let _silent = datagram(&namespaces, &netns, silent).await;
        let _upstream = upstream(&namespaces, &netns, server).await;
        let context = Arc::new(context(&shared, &netns));
        drop(shared);
        let resolver = Resolver::open(&context, true).await.unwrap();
        let serving = tokio::spawn(resolver.serve(Arc::clone(&context)));
        drop(context);
        for resolver in resolvers {
            let answer = by_udp(&namespaces, &netns, resolver, &query("100.test.")).await;
            assert_eq!((answer.answers.len(), answer.metadata.truncation), (1, false));
        }
        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
        let lines = log.lines();
        assert_eq!(lines.len(), 2, "{lines:#?}");
        for (line, resolver) in lines.iter().zip(resolvers) {
            let family = if resolver.is_ipv4() { "IPv4" } else { "IPv6" };
            for (field, expected) in [
                ("event", "dns"),
                ("pod", "shop/cart"),
                ("uid", "uid-1"),
                ("family", family),
                ("transport", "udp"),
                ("name", "100.test."),
                ("type", "TXT"),
                ("rcode", "NOERROR"),
            ] {
                assert_eq!(line[field], expected, "{line:#}");
            }
            assert_eq!(line["upstream"], server.to_string());
            assert!(line["duration_ms"].as_u64().unwrap() >= 2000, "the silent server comes first: {line:#}");
        }
    }
}

#[tokio::test]
async fn long_answers_come_by_tcp() {
    let Some(netns) = fresh("long_answers_come_by_tcp", true) else { return };
    let server = SocketAddr::new(CLIENT_V6.into(), 5300);
    let (_log, shared) = Logged::with_upstreams(true, &[server]);
    let namespaces = shared.namespaces.clone();
    let _upstream = upstream(&namespaces, &netns, server).await;
    let context = Arc::new(context(&shared, &netns));
    let resolver = Resolver::open(&context, true).await.unwrap();
    let serving = tokio::spawn(resolver.serve(context));
    for address in [V4, V6] {
        let answer = by_udp(&namespaces, &netns, address, &query("2000.test.")).await;
        assert!(answer.metadata.truncation && answer.answers.is_empty());
        let to = SocketAddr::new(address, PORT_DNS);
        let mut stream = dial(&namespaces, &netns, None, to).await.unwrap();
        // Several queries over one connection, also in one write.
        for name in ["2000.test.", "100.test."] {
            send_framed(&mut stream, &query(name)).await;
        }
        for length in [2000, 100] {
            let answer = read_framed(&mut stream).await;
            assert!(!answer.metadata.truncation);
            let RData::TXT(text) = &answer.answers[0].data else { panic!("{answer:?}") };
            assert_eq!(text.txt_data.iter().map(|part| part.len()).sum::<usize>(), length);
        }
        send_framed(&mut stream, b"no question").await;
        assert_eq!(soon("the end", stream.read(&mut [0])).await.unwrap(), 0);
    }
    serving.abort();
}

#[tokio::test]
async fn questions_that_nobody_answers_fail_and_too_many_at_once() {
    const MANY: usize = 300;
    let Some(netns) = fresh("questions_that_nobody_answers_fail", false) else { return };
    let silent = "127.0.0.8:5300".parse().unwrap();
    let (_log, shared) = Logged::with_upstreams(true, &[silent]);
    let namespaces = shared.namespaces.clone();
    let _silent = datagram(&namespaces, &netns, silent).await;
    let context = Arc::new(context(&shared, &netns));
    let resolver = Resolver::open(&context, false).await.unwrap();
    let serving = tokio::spawn(resolver.serve(context));
    let broken = by_udp(&namespaces, &netns, V4, &[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await;
    assert_eq!(broken.metadata.response_code, ResponseCode::FormErr);

    let socket = datagram(&namespaces, &netns, (Ipv4Addr::UNSPECIFIED, 0).into()).await;
    let began = tokio::time::Instant::now();
    for _ in 0..MANY {
        socket.send_to(&query("silence.test."), (V4, PORT_DNS)).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut buffer = [0; 512];
    let mut times = Vec::new();
    for _ in 0..MANY {
        let length = soon("an error", socket.recv(&mut buffer)).await.unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        times.push(began.elapsed().as_millis());
    }
    let at_once = times.iter().filter(|&&time| time < 1500).count();
    assert_eq!(at_once, MANY - 256, "those that are more than may wait are answered at once");
    serving.abort();
}

/// Placement `node`: one resolver for all pods, which it identifies by their addresses.
#[tokio::test]
async fn one_pod_takes_nothing_from_the_others_of_the_node() {
    const MANY: usize = 300;
    const CONNECTIONS: usize = 64;
    let test = "one_pod_takes_nothing_from_the_others_of_the_node";
    let Some(netns) = fresh(test, true) else { return };
    let server = SocketAddr::new(V4, 5300);
    let (_log, mut shared) = Logged::with_upstreams(true, &[server]);
    shared.placement = Placement::Node;
    let namespaces = shared.namespaces.clone();
    let _upstream = upstream(&namespaces, &netns, server).await;
    let resolver = Resolver::open(&Arc::new(context(&shared, &netns)), true).await.unwrap();
    let serving = tokio::spawn(resolver.serve(Arc::new(context(&shared, &netns))));
    for (greedy, other, resolver) in
        [(V4, IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), V4), (V6, IpAddr::V6(CLIENT_V6), V6)]
    {
        let to = SocketAddr::new(resolver, PORT_DNS);
        let socket = datagram(&namespaces, &netns, SocketAddr::new(greedy, 0)).await;
        for _ in 0..MANY {
            socket.send_to(&query("silence.test."), to).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut buffer = [0; 512];
        for _ in 256..MANY {
            soon("an error", socket.recv(&mut buffer)).await.unwrap();
        }
        // This many wait now.
        let asking = datagram(&namespaces, &netns, SocketAddr::new(other, 0)).await;
        asking.send_to(&query("100.test."), to).await.unwrap();
        let length = soon("an answer", asking.recv(&mut buffer)).await.unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(
            (answer.metadata.response_code, answer.answers.len()),
            (ResponseCode::NoError, 1),
            "{other}"
        );

        let mut open = Vec::new();
        for _ in 0..CONNECTIONS {
            open.push(dial(&namespaces, &netns, Some(greedy), to).await.unwrap());
        }
        let mut one_more = dial(&namespaces, &netns, Some(greedy), to).await.unwrap();
        assert_eq!(soon("the end", one_more.read(&mut [0])).await.unwrap_or(0), 0, "{greedy}");
        let mut stream = dial(&namespaces, &netns, Some(other), to).await.unwrap();
        send_framed(&mut stream, &query("100.test.")).await;
        assert_eq!(read_framed(&mut stream).await.answers.len(), 1, "{other}");
    }
    serving.abort();
}
