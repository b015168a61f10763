//! The proxy's and the agent's view while both sides follow the protocol.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::double::{Event, Proxy, Reply};
use super::{Fixture, LONG, SHORT, eventually, identity, info, quick};
use crate::messages::Request;
use crate::server::{Options, PodProxyState, RemoveOutcome, Workload};

fn add(uid: &str) -> Event {
    Event::Add(uid.into())
}

fn del(uid: &str) -> Event {
    Event::Del(uid.into())
}

#[tokio::test]
async fn an_empty_snapshot_is_just_its_end() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || fixture.handle.proxies().first().is_some_and(|proxy| proxy.synced)).await;
    tokio::time::sleep(SHORT).await;
    assert_eq!(proxy.events(), [Event::SnapshotSent]);
    proxy.check();
}

#[tokio::test]
async fn the_snapshot_comes_in_order_of_arrival_and_the_rest_after_it() {
    let fixture = Fixture::start(quick());
    fixture.handle.set(fixture.workload("b", "ns-b")).unwrap();
    fixture.handle.set(Workload { uid: "c".into(), info: info("c"), netns: None }).unwrap();
    fixture.handle.set(fixture.workload("a", "ns-a")).unwrap();
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    fixture.handle.add(fixture.workload("d", "ns-d"), LONG).await.unwrap();
    let keep = Event::Keep("c".into());
    assert_eq!(proxy.events(), [add("b"), keep, add("a"), Event::SnapshotSent, add("d")]);
    assert_eq!(fixture.handle.pod("c"), PodProxyState::Kept);
    assert_eq!(proxy.seen().served["a"], identity(fixture.netns("ns-a")));
    proxy.check();
}

#[tokio::test]
async fn a_kept_pod_whose_namespace_turns_up_is_added() {
    let fixture = Fixture::start(quick());
    fixture.handle.set(Workload { uid: "a".into(), info: info("a"), netns: None }).unwrap();
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
    assert_eq!(proxy.events(), [Event::Keep("a".into()), Event::SnapshotSent, add("a")]);
    // A later report without the namespace does not lose it.
    fixture.handle.set(Workload { uid: "a".into(), info: info("a"), netns: None }).unwrap();
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Acknowledged);
    proxy.check();
}

#[tokio::test]
async fn a_pod_without_its_namespace_waits_after_the_snapshot() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    fixture.handle.set(Workload { uid: "a".into(), info: info("a"), netns: None }).unwrap();
    tokio::time::sleep(SHORT).await;
    assert_eq!(proxy.events(), [Event::SnapshotSent]);
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Pending);
}

#[tokio::test]
async fn add_returns_when_the_proxy_acknowledged() {
    let fixture = Fixture::start(Options { ack_deadline: LONG, ..quick() });
    let open = Arc::new(AtomicBool::new(false));
    let script_open = Arc::clone(&open);
    // No answer: the first attempt's connection times out below.
    let proxy = Proxy::scripted(&fixture.path, move |request| match request {
        Request::Add(_) if !script_open.load(Ordering::SeqCst) => Reply::Silence,
        _ => Reply::Ack,
    })
    .await;
    eventually("synced", || proxy.synced()).await;
    let handle = fixture.handle.clone();
    let workload = fixture.workload("a", "ns");
    let adding = tokio::spawn(async move { handle.add(workload, LONG).await });
    eventually("sent", || proxy.events().contains(&add("a"))).await;
    tokio::time::sleep(SHORT).await;
    assert!(!adding.is_finished());
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Pending);

    open.store(true, Ordering::SeqCst);
    proxy.leave().await;
    let proxy = Proxy::start(&fixture.path).await;
    adding.await.unwrap().unwrap();
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Acknowledged);
    proxy.check();
}

#[tokio::test]
async fn what_is_served_already_is_not_sent_again() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    for _ in 0..3 {
        fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap();
    }
    assert_eq!(proxy.events(), [Event::SnapshotSent, add("a")]);
    proxy.check();
}

#[tokio::test]
async fn another_namespace_or_identity_is_removed_and_added() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    fixture.handle.add(fixture.workload("a", "one"), LONG).await.unwrap();
    fixture.handle.add(fixture.workload("a", "two"), LONG).await.unwrap();
    assert_eq!(proxy.seen().served["a"], identity(fixture.netns("two")));
    let mut workload = fixture.workload("a", "two");
    workload.info.service_account = "other".into();
    fixture.handle.add(workload, LONG).await.unwrap();
    let replaced = [add("a"), del("a"), add("a"), del("a"), add("a")];
    assert_eq!(proxy.events(), [&[Event::SnapshotSent], replaced.as_slice()].concat());
    proxy.check();
}

#[tokio::test]
async fn a_removal_during_the_snapshot_follows_it() {
    let fixture = Fixture::start(quick());
    for uid in ["a", "b", "c"] {
        fixture.handle.set(fixture.workload(uid, uid)).unwrap();
    }
    let handle = fixture.handle.clone();
    // While "a" is being answered, "a" (sent) and "c" (not sent) are removed, and "d" is added.
    let late = Mutex::new(Some(fixture.workload("d", "d")));
    let proxy = Proxy::scripted(&fixture.path, move |request| {
        if matches!(request, Request::Add(add) if add.uid == "a") {
            handle.unset("a");
            handle.unset("c");
            handle.set(late.lock().unwrap().take().unwrap()).unwrap();
        }
        Reply::Ack
    })
    .await;
    eventually("d", || proxy.events().contains(&add("d"))).await;
    assert_eq!(proxy.events(), [add("a"), add("b"), Event::SnapshotSent, del("a"), add("d")]);
    proxy.check();
}

#[tokio::test]
async fn a_refusal_is_told_and_the_pod_sent_again() {
    let fixture = Fixture::start(quick());
    let refusing = Arc::new(AtomicBool::new(true));
    let script = Arc::clone(&refusing);
    let proxy = Proxy::scripted(&fixture.path, move |request| match request {
        Request::Add(_) if script.load(Ordering::SeqCst) => Reply::Nack("port 15001 is taken".into()),
        _ => Reply::Ack,
    })
    .await;
    let error = fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap_err().to_string();
    assert!(error.contains("default/name-a (a)") && error.contains("port 15001 is taken"), "{error}");
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Refused("port 15001 is taken".into()));
    let refused = fixture.handle.proxies().remove(0).refused;
    assert_eq!(refused, [("a".to_owned(), "port 15001 is taken".to_owned())]);

    refusing.store(false, Ordering::SeqCst);
    eventually("served", || fixture.handle.pod("a") == PodProxyState::Acknowledged).await;
    assert!(fixture.handle.proxies().remove(0).refused.is_empty());
    proxy.check();
}

#[tokio::test]
async fn asking_again_for_a_refused_pod_does_not_wait_for_the_backoff() {
    let fixture = Fixture::start(Options { retry: Duration::from_secs(3600), ..quick() });
    let mut refuse = 2;
    let proxy = Proxy::scripted(&fixture.path, move |request| match request {
        Request::Add(_) if refuse > 0 => {
            refuse -= 1;
            Reply::Nack(format!("{refuse} to go"))
        }
        _ => Reply::Ack,
    })
    .await;
    let mut errors = Vec::new();
    while let Err(error) = fixture.handle.add(fixture.workload("a", "ns"), LONG).await {
        errors.push(error.to_string());
    }
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[1].ends_with("0 to go"), "{errors:?}");
    proxy.check();
}

#[tokio::test]
async fn a_refused_pod_is_removed_as_others_are() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::scripted(&fixture.path, |request| match request {
        Request::Add(_) => Reply::Nack("no".into()),
        _ => Reply::Ack,
    })
    .await;
    fixture.handle.add(fixture.workload("a", "ns"), LONG).await.unwrap_err();
    assert_eq!(fixture.handle.remove("a", LONG).await, RemoveOutcome::Done);
    assert_eq!(proxy.events().last(), Some(&del("a")));
    assert_eq!(fixture.handle.pod("a"), PodProxyState::Unknown);
    proxy.check();
}

#[tokio::test]
async fn the_newest_gets_new_pods_and_everybody_gets_removals() {
    let fixture = Fixture::start(quick());
    let old = Proxy::start(&fixture.path).await;
    eventually("synced", || old.synced()).await;
    fixture.handle.add(fixture.workload("a", "a"), LONG).await.unwrap();
    let new = Proxy::start(&fixture.path).await;
    eventually("synced", || new.synced()).await;
    fixture.handle.add(fixture.workload("b", "b"), LONG).await.unwrap();
    assert_eq!(fixture.handle.remove("a", LONG).await, RemoveOutcome::Done);
    assert_eq!(old.events(), [Event::SnapshotSent, add("a"), del("a")]);
    assert_eq!(new.events(), [add("a"), Event::SnapshotSent, add("b"), del("a")]);

    // The old one takes over, and gets what it missed.
    let peers = fixture.handle.connections();
    assert_eq!(peers.borrow().len(), 2);
    assert!(peers.borrow()[0].id > peers.borrow()[1].id);
    new.check();
    new.leave().await;
    eventually("taken over", || old.seen().served.contains_key("b")).await;
    assert_eq!(peers.borrow().len(), 1);
    old.check();
}

#[tokio::test]
async fn the_agent_prepares_before_a_proxy_is_told_anything() {
    let (prepared, script) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let (hook_prepared, hook_peers) = (Arc::clone(&prepared), Arc::clone(&script));
    let options = Options {
        on_connect: Some(Arc::new(move |peer| {
            let (prepared, peers) = (Arc::clone(&hook_prepared), Arc::clone(&hook_peers));
            Box::pin(async move {
                tokio::time::sleep(SHORT).await;
                peers.lock().unwrap().push(peer);
                prepared.store(true, Ordering::SeqCst);
                Ok(())
            })
        })),
        ..quick()
    };
    let fixture = Fixture::start(options);
    let proxy = Proxy::scripted(&fixture.path, move |_| {
        assert!(prepared.load(Ordering::SeqCst));
        Reply::Ack
    })
    .await;
    eventually("synced", || proxy.synced()).await;
    let own = i32::try_from(std::process::id()).unwrap();
    assert_eq!(script.lock().unwrap()[0].process.pid(), own);
    assert_eq!(fixture.handle.connections().borrow()[0].process.pid(), own);
}

#[tokio::test]
async fn the_end_of_the_server_closes_connections_and_removes_the_file() {
    let fixture = Fixture::start(quick());
    let proxy = Proxy::start(&fixture.path).await;
    eventually("synced", || proxy.synced()).await;
    fixture.stop.send(()).unwrap();
    fixture.server.await.unwrap();
    eventually("ended", || proxy.ended()).await;
    assert!(!fixture.path.exists());
    assert!(fixture.handle.proxies().is_empty());
}

#[tokio::test]
async fn nothing_stays_open_for_pods_and_proxies_that_went() {
    let fixture = Fixture::start(quick());
    for round in 0..3 {
        let proxy = Proxy::start(&fixture.path).await;
        for uid in ["a", "b"] {
            fixture.handle.add(fixture.workload(uid, uid), LONG).await.unwrap();
        }
        // Listening socket and connection are the server's; the pods' descriptors are held once.
        assert_eq!(fixture.server_sockets(), 2, "round {round}");
        assert_eq!(fixture.open_namespaces(), 2, "round {round}");
        fixture.handle.remove("a", LONG).await;
        eventually("closed", || fixture.open_namespaces() == 1).await;
        proxy.leave().await;
        fixture.handle.remove("b", LONG).await;
        eventually("closed", || fixture.open_namespaces() == 0 && fixture.server_sockets() == 1).await;
    }
}
