//! The relay between two ends on loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::super::relay::{Connection, Counters, RelayError, relay};
use super::{expect_reset, read_all, send_and_end, soon};
use redirect_testing::skip;

/// A client and a server with a relay between them.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    counters: Arc<Counters>,
    relay: JoinHandle<Result<(), RelayError>>,
}

async fn connected(ip: IpAddr) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// One pair per family that this machine supports.
async fn pairs(name: &str) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        if let Err(error) = TcpListener::bind((ip, 0)).await {
            skip(&format!("{name} with {ip}"), error);
            continue;
        }
        let (client, front) = connected(ip).await;
        let (back, server) = connected(ip).await;
        let counters = Arc::new(Counters::default());
        let task = {
            let counters = Arc::clone(&counters);
            async move {
                let (front, back) = (Connection::new(front), Connection::new(back));
                relay(front.stream(), back.stream(), &counters).await?;
                front.finish();
                back.finish();
                Ok(())
            }
        };
        pairs.push(Pair { client, server, counters, relay: tokio::spawn(task) });
    }
    pairs
}

#[tokio::test]
async fn each_way_ends_by_itself() {
    for mut pair in pairs("each_way_ends_by_itself").await {
        send_and_end(&mut pair.client, b"question").await;
        assert_eq!(read_all(&mut pair.server).await.unwrap(), b"question");
        // The client's way has ended; the other one continues.
        for part in [b"ans", b"wer"] {
            pair.server.write_all(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        pair.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut pair.client).await.unwrap(), b"answer");
        soon("the relay's end", pair.relay).await.unwrap().unwrap();
        assert_eq!(pair.counters.sent.load(Ordering::Relaxed), 8);
        assert_eq!(pair.counters.received.load(Ordering::Relaxed), 6);
    }
}

#[tokio::test]
async fn the_server_may_end_first() {
    for mut pair in pairs("the_server_may_end_first").await {
        send_and_end(&mut pair.server, b"greeting").await;
        assert_eq!(read_all(&mut pair.client).await.unwrap(), b"greeting");
        send_and_end(&mut pair.client, b"reply").await;
        assert_eq!(read_all(&mut pair.server).await.unwrap(), b"reply");
        soon("the relay's end", pair.relay).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_slow_reader_gets_everything_and_slows_the_writer_down() {
    for mut pair in pairs("a_slow_reader_gets_everything_and_slows_the_writer_down").await {
        // 32 MiB, more than the sockets' own buffers take.
        let data = (0..1u32 << 16).flat_map(u32::to_le_bytes).collect::<Vec<u8>>().repeat(128);
        let expected = data.clone();
        let mut client = pair.client;
        let writer = tokio::spawn(async move {
            client.write_all(&data).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let relayed = pair.counters.sent.load(Ordering::Relaxed);
        assert!((relayed as usize) < expected.len(), "{relayed} bytes went to a server that reads nothing");
        assert!(read_all(&mut pair.server).await.unwrap() == expected, "the data arrive as they were sent");
        drop(pair.server);
        let mut client = soon("the writer's end", writer).await.unwrap();
        assert_eq!(read_all(&mut client).await.unwrap(), b"");
    }
}

#[tokio::test]
async fn a_reset_is_passed_on() {
    for mut pair in pairs("a_reset_is_passed_on").await {
        SockRef::from(&pair.server).set_linger(Some(Duration::ZERO)).unwrap();
        drop(pair.server);
        expect_reset(&mut pair.client).await;
        let result = soon("the relay's end", pair.relay).await.unwrap();
        assert!(matches!(result, Err(RelayError::Upstream(_))), "{result:?}");
    }
}

#[tokio::test]
async fn a_reset_is_passed_on_after_that_ways_end() {
    for mut pair in pairs("a_reset_is_passed_on_after_that_ways_end").await {
        send_and_end(&mut pair.client, b"question").await;
        let mut question = [0; 8];
        soon("the question", pair.server.read_exact(&mut question)).await.unwrap();
        assert_eq!(soon("its end", pair.server.read(&mut [0])).await.unwrap(), 0);
        SockRef::from(&pair.client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(pair.client);
        let result = soon("the relay's end", pair.relay).await.unwrap();
        assert!(matches!(result, Err(RelayError::Client(_))), "{result:?}");
        // A read has already returned the end, so only a write shows the reset.
        let failed = async { while pair.server.write_all(b"answer").await.is_ok() {} };
        soon("the server sees it", failed).await;
    }
}

#[tokio::test]
async fn a_cancelled_relay_resets_both_ends() {
    for mut pair in pairs("a_cancelled_relay_resets_both_ends").await {
        pair.client.write_all(b"x").await.unwrap();
        soon("a byte", pair.server.read_exact(&mut [0])).await.unwrap();
        pair.relay.abort();
        expect_reset(&mut pair.client).await;
        expect_reset(&mut pair.server).await;
    }
}
