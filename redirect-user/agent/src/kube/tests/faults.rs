//! Faults of the API server.

use super::*;
use redirect_testing::Fault;

/// A node with one enrolled pod.
async fn with_pod() -> (Node, Proxy, u64) {
    let node = Node::start().await;
    let proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("enrolled", || {
        node.captures(cookie, KINDS[0]) && node.api.redirection("shop", "pod-1").as_deref() == Some("enabled")
    })
    .await;
    (node, proxy, cookie)
}

/// Whether the node still follows the API server.
async fn follows(node: &Node, cookie: u64) {
    node.api.patch_pod("shop", "pod-1", &label(None));
    eventually("it follows", || node.captures(cookie, &[])).await;
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_where_it_was() {
    let (node, _proxy, cookie) = with_pod().await;
    assert_eq!(node.api.lists_of_pods(), 1);
    node.api.bookmark();
    tokio::time::sleep(Duration::from_millis(20)).await;
    // The history before the bookmark is gone; a client that has seen the bookmark need not start over.
    node.api.compact();
    node.api.cut_watches();
    follows(&node, cookie).await;
    assert_eq!(node.api.lists_of_pods(), 1);
    node.stop().await;
}

#[tokio::test]
async fn a_watch_that_is_too_old_starts_over_and_finds_out_who_is_gone() {
    let (node, _proxy, cookie) = with_pod().await;
    let other = node.run_sandbox(&uid(2), &["10.0.0.3"]);
    node.api.set_away(true);
    node.api.delete_pod("shop", "pod-1");
    node.api.put_pod(pod(2, Some("ambient"), &["10.0.0.3"]));
    node.api.put_namespace("unrelated", json!({}));
    node.api.compact();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(node.captures(cookie, KINDS[0]), "away, it can't have said so");
    node.api.set_away(false);
    eventually("gone and new", || node.captures(cookie, &[]) && node.captures(other, &["10.0.0.3"])).await;
    assert!(node.api.lists_of_pods() > 1, "there was a second list");
    node.stop().await;
}

#[tokio::test]
async fn an_api_server_that_is_away_changes_nothing_until_it_is_back() {
    let (node, proxy, cookie) = with_pod().await;
    node.api.set_away(true);
    tokio::time::sleep(SHORT).await;
    assert!(node.captures(cookie, KINDS[0]) && proxy.serves(&uid(1)));
    node.api.patch_pod("shop", "pod-1", &label(Some("none")));
    node.api.set_away(false);
    eventually("it follows again", || node.captures(cookie, &[])).await;
    eventually("so does the annotation", || node.api.redirection("shop", "pod-1").is_none()).await;
    node.stop().await;
}

#[tokio::test]
async fn an_agent_starts_although_the_api_server_fails_in_every_way() {
    for fault in [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(403),
        Fault::Status(429),
        Fault::Malformed,
        Fault::HangUp,
        Fault::Stall,
    ] {
        let node = Node::start_with(quick(), |api| {
            for _ in 0..2 {
                api.fail_next("GET /api/v1/pods?", fault.clone());
                api.fail_next("GET /api/v1/namespaces?", fault.clone());
                api.fail_next("watch=true", fault.clone());
            }
            api.put_pod(pod(1, Some("ambient"), KINDS[0]));
        })
        .await;
        let cookie = node.run_sandbox(&uid(1), KINDS[0]);
        let _proxy = node.proxy().await;
        let what = format!("enrolled after {fault:?}");
        eventually(&what, || node.captures(cookie, KINDS[0])).await;
        tokio::time::timeout(LONG, node.controller.caught_up()).await.unwrap();
        node.stop().await;
    }
}

#[tokio::test]
async fn retry_after_is_heeded() {
    let api = Patience { list: LONG, ..quick().api };
    let node = Node::start_with(Timing { api, ..quick() }, |api| {
        api.fail_next("GET /api/v1/pods?", Fault::RetryAfter(429, 1));
    })
    .await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(node.api.lists_of_pods(), 1, "not before the second is over");
    tokio::time::timeout(LONG, node.controller.caught_up()).await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn a_watch_that_fails_in_any_way_is_resumed() {
    for fault in [Fault::Status(500), Fault::Status(429), Fault::Status(410), Fault::Malformed, Fault::HangUp]
    {
        let (node, _proxy, cookie) = with_pod().await;
        for _ in 0..3 {
            node.api.fail_next("watch=true", fault.clone());
        }
        node.api.cut_watches();
        eventually("all have failed", || node.api.faults_left() == 0).await;
        follows(&node, cookie).await;
        node.stop().await;
    }
}

#[tokio::test]
async fn a_pod_that_can_not_be_read_does_not_hide_the_others_and_stays_as_it_was() {
    let (node, _proxy, cookie) = with_pod().await;
    for (number, nonsense) in (2..).zip([json!([{"ip": "10.0.0.300"}]), json!("none")]) {
        node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": nonsense}}));
        node.api.put_namespace("unrelated", json!({}));
        node.api.compact();
        node.api.cut_watches();
        let other = node.run_sandbox(&uid(number), &["10.0.0.3"]);
        node.api.put_pod(pod(number, Some("ambient"), &["10.0.0.3"]));
        eventually("the other", || node.captures(other, &["10.0.0.3"])).await;
        assert!(node.captures(cookie, KINDS[0]));
        node.api.delete_pod("shop", &format!("pod-{number}"));
        eventually("the other is gone", || node.captures(other, &[])).await;
    }
    node.api.delete_pod("shop", "pod-1");
    eventually("its end is understood", || node.captures(cookie, &[])).await;
    node.stop().await;
}

#[tokio::test]
async fn an_annotation_is_written_in_the_end() {
    for fault in [
        Fault::Status(409),
        Fault::Status(404),
        Fault::Status(422),
        Fault::Status(500),
        Fault::Status(429),
        Fault::Malformed,
        Fault::HangUp,
    ] {
        let node = Node::start().await;
        let _proxy = node.proxy().await;
        node.run_sandbox(&uid(1), KINDS[0]);
        node.api.fail_next("PATCH", fault.clone());
        node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
        if matches!(fault, Fault::Status(404 | 409)) {
            // The pod has been replaced, and an event about that will arrive.
            eventually("it was tried", || node.api.faults_left() == 0).await;
            let news = annotation("ambient.istio.io/dns-capture", Some("false"));
            node.api.patch_pod("shop", "pod-1", &news);
        }
        let what = format!("written after {fault:?}");
        eventually(&what, || node.api.redirection("shop", "pod-1").as_deref() == Some("enabled")).await;
        node.stop().await;
    }
}

#[tokio::test]
async fn an_annotation_that_cannot_be_written_is_tried_less_and_less_often() {
    const FAULTS: usize = 1000;
    let api = Patience { longest_pause: LONG, ..quick().api };
    let node = Node::start_with(Timing { api, ..quick() }, |_| {}).await;
    (0..FAULTS).for_each(|_| node.api.fail_next("PATCH", Fault::Status(403)));
    // Without a proxy it is polled every 20 ms.
    node.run_sandbox(&uid(1), KINDS[0]);
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("a second try", || node.api.faults_left() < FAULTS - 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    // After 20 ms, 40 ms, 80 ms, and so on.
    let tries = FAULTS - node.api.faults_left();
    assert!(tries < 10, "{tries}");
    node.stop().await;
}

#[tokio::test]
async fn an_event_is_created_in_the_end() {
    for fault in [Fault::Status(403), Fault::Status(500), Fault::Status(429), Fault::Malformed, Fault::HangUp]
    {
        let node = Node::start().await;
        let mut bad = pod(1, Some("ambient"), KINDS[0]);
        bad["metadata"]["annotations"] = json!({"ambient-redirect.io/exclude-outbound-ports": "http"});
        node.api.fail_next("create events", fault.clone());
        node.api.put_pod(bad);
        eventually(&format!("an event after {fault:?}"), || !node.api.world().events.is_empty()).await;
        node.stop().await;
    }
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_told_and_looked_for_again() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let (directory, _) = node.run_process(&uid(1), &"a".repeat(64), &["10.0.0.2"]);
    fs::remove_dir_all(directory).unwrap();
    node.api.put_pod(pod(1, Some("ambient"), &["10.0.0.2"]));
    eventually("an event", || {
        node.api.world().events.iter().any(|event| event["note"].as_str().unwrap().contains("hostPID"))
    })
    .await;
    // Another namespace, created by one of the pod's containers, is not the pod's.
    let nested = node.run_sandbox(&uid(1), &["172.17.0.1"]);
    let right = node.run_sandbox(&uid(1), &["10.0.0.2"]);
    eventually("the right one", || node.captures(right, &["10.0.0.2"])).await;
    assert!(node.captures(nested, &[]));
    node.stop().await;
}
