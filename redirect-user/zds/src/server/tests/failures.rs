//! Proxies that break the protocol, are slow or absent: their connection ends, and others are not affected.

use std::time::Duration;

use tokio_seqpacket::UnixSeqpacket;

use super::double::{Event, Proxy, Reply};
use super::{Fixture, LONG, SHORT, eventually, quick};
use crate::MAX_PACKET;
use crate::messages::{Hello, Request};
use crate::packet;
use crate::server::{AddError, InvalidWorkload, Options, RemoveOutcome};

/// Waits until the server closes a connection that the test opened.
async fn closed(socket: &UnixSeqpacket) -> bool {
    let mut buffer = [0; MAX_PACKET];
    let received = tokio::time::timeout(LONG, socket.recv(&mut buffer)).await.expect("the server closes");
    received.map_or(true, |info| info.bytes_read() == 0)
}

#[tokio::test]
async fn without_a_proxy_the_error_names_the_socket_and_the_pod() {
    let fixture = Fixture::start(quick());
    let error = fixture.handle.add(fixture.workload("a", "ns"), SHORT).await.unwrap_err();
    assert!(matches!(error, AddError::NotConnected { .. }));
    let text = error.to_string();
    assert!(text.contains(fixture.path.to_str().unwrap()) && text.contains("default/name-a (a)"), "{text}");
    // The pod stays wanted.
    let proxy = Proxy::start(&fixture.path).await;
    eventually("served", || proxy.seen().served.contains_key("a")).await;
}

#[tokio::test]
async fn a_proxy_that_never_answers_is_closed() {
    let fixture = Fixture::start(Options { ack_deadline: Duration::from_millis(150), ..quick() });
    let proxy = Proxy::scripted(&fixture.path, |request| match request {
        Request::Add(_) => Reply::Silence,
        _ => Reply::Ack,
    })
    .await;
    eventually("synced", || proxy.synced()).await;
    let within = Duration::from_millis(50);
    let error = fixture.handle.add(fixture.workload("a", "ns"), within).await.unwrap_err();
    assert!(matches!(error, AddError::Timeout { .. }), "{error}");
    eventually("closed", || proxy.ended()).await;
    assert!(fixture.handle.proxies().is_empty());
    proxy.check();
}

#[tokio::test]
async fn a_removal_waits_for_slow_proxies_only_so_long() {
    let fixture = Fixture::start(Options { ack_deadline: Duration::from_millis(150), ..quick() });
    let _proxy = Proxy::scripted(&fixture.path, |request| match request {
        Request::Del(_) => Reply::Silence,
        _ => Reply::Ack,
    })
    .await;
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
    let outcome = fixture.handle.remove("a", SHORT).await;
    assert!(matches!(&outcome, RemoveOutcome::Pending(peers) if peers.len() == 1), "{outcome:?}");
    // The end of the connection completes the removal.
    assert_eq!(fixture.handle.remove("a", LONG).await, RemoveOutcome::Done);
}

#[tokio::test]
async fn when_the_newest_is_stuck_the_older_one_takes_over() {
    let fixture = Fixture::start(Options { ack_deadline: Duration::from_millis(100), ..quick() });
    let old = Proxy::start(&fixture.path).await;
    eventually("synced", || old.synced()).await;
    let stuck = Proxy::scripted(&fixture.path, |_| Reply::Silence).await;
    eventually("asked", || !stuck.events().is_empty()).await;
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
    assert!(old.seen().served.contains_key("a"));
    assert!(!old.ended());
    old.check();
}

#[tokio::test]
async fn a_connection_without_hello_neither_lasts_nor_matters() {
    let fixture = Fixture::start(Options { hello_deadline: Duration::from_millis(150), ..quick() });
    let proxy = Proxy::start(&fixture.path).await;
    let silent = UnixSeqpacket::connect(&fixture.path).await.unwrap();
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
    assert!(closed(&silent).await);
    assert!(!proxy.ended());
}

#[tokio::test]
async fn wrong_hellos_are_closed() {
    let fixture = Fixture::start(quick());
    let hellos: [&[u8]; 4] = [&[0x08, 2], &[0x10, 1], &[0xff; 9], &[0; MAX_PACKET + 1]];
    for hello in hellos {
        let socket = UnixSeqpacket::connect(&fixture.path).await.unwrap();
        socket.send(hello).await.unwrap();
        assert!(closed(&socket).await, "{hello:?}");
    }
    let socket = UnixSeqpacket::connect(&fixture.path).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    packet::send(&socket, &Hello { version: 1 }, Some(std::os::fd::AsFd::as_fd(&file))).await.unwrap();
    assert!(closed(&socket).await);
    assert!(fixture.handle.proxies().is_empty());
}

#[tokio::test]
async fn garbage_instead_of_an_answer_ends_this_connection_only() {
    let fixture = Fixture::start(quick());
    let old = Proxy::start(&fixture.path).await;
    eventually("synced", || old.synced()).await;
    let garbage: [&[u8]; 4] = [&[0xff; 9], &[0x12, 0], &[0; MAX_PACKET + 1], &[0x0a, 0x7f]];
    for bytes in garbage {
        let proxy = Proxy::scripted(&fixture.path, |_| Reply::Raw(bytes.to_vec())).await;
        eventually("closed", || proxy.ended()).await;
        assert_eq!(proxy.events(), [Event::SnapshotSent]);
    }
    assert!(!old.ended());
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
}

#[tokio::test]
async fn an_answer_without_a_request_ends_the_connection() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::scripted(&fixture.path, |_| Reply::AckTwice).await;
    eventually("closed", || proxy.ended()).await;
    assert!(fixture.handle.proxies().is_empty());
}

#[tokio::test]
async fn a_refused_end_of_the_snapshot_ends_the_connection() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::scripted(&fixture.path, |_| Reply::Nack("no".into())).await;
    eventually("closed", || proxy.ended()).await;
}

#[tokio::test]
async fn a_proxy_that_leaves_in_the_middle_leaves_its_pods_to_the_next() {
    let fixture = Fixture::start(quick());
    fixture.handle.set(fixture.workload("a", "a")).unwrap();
    fixture.handle.set(fixture.workload("b", "b")).unwrap();
    let first = Proxy::scripted(&fixture.path, |_| Reply::Leave).await;
    eventually("left", || first.ended()).await;
    let second = Proxy::start(&fixture.path).await;
    eventually("served", || second.seen().served.len() == 2).await;
    second.check();
}

#[tokio::test]
async fn a_proxy_that_the_agent_does_not_want_is_told_nothing() {
    let refuse: crate::server::OnConnect =
        std::sync::Arc::new(|_| Box::pin(async { Err("the map is full".into()) }));
    let fixture = Fixture::start(Options { on_connect: Some(refuse), ..quick() });
    fixture.handle.set(fixture.workload("a", "ns")).unwrap();
    let proxy = Proxy::start(&fixture.path).await;
    eventually("closed", || proxy.ended()).await;
    assert!(proxy.events().is_empty());
}

#[tokio::test]
async fn surplus_connections_wait_for_a_place() {
    let fixture = Fixture::start(Options { max_connections: 2, ..quick() });
    let first = Proxy::start(&fixture.path).await;
    let second = Proxy::start(&fixture.path).await;
    eventually("synced", || first.synced() && second.synced()).await;
    let third = Proxy::start(&fixture.path).await;
    tokio::time::sleep(SHORT).await;
    assert!(!third.synced() && !third.ended());
    first.leave().await;
    eventually("synced", || third.synced()).await;
}

#[tokio::test]
async fn a_pod_that_fits_no_packet_is_refused_at_once() {
    let fixture = Fixture::start(quick());
    let mut workload = fixture.workload("a", "ns");
    workload.info.name = "n".repeat(MAX_PACKET);
    assert!(matches!(fixture.handle.set(workload), Err(InvalidWorkload::Packet { .. })));
    let nameless = fixture.workload("", "ns");
    assert!(matches!(fixture.handle.set(nameless), Err(InvalidWorkload::NoUid(_))));
}

#[tokio::test]
async fn adding_ends_when_the_pod_is_removed_meanwhile() {
    let fixture = Fixture::start(quick());
    let handle = fixture.handle.clone();
    let workload = fixture.workload("a", "ns");
    let adding = tokio::spawn(async move { handle.add(workload, LONG).await });
    eventually("wanted", || fixture.handle.pod("a") == crate::server::PodProxyState::NoProxy).await;
    assert_eq!(fixture.handle.remove("a", LONG).await, RemoveOutcome::Done);
    assert!(matches!(adding.await.unwrap(), Err(AddError::Withdrawn { .. })));
}
