//! The answers to the CNI plugin.

use std::time::Instant;

use super::*;
use crate::enrollment::{Enrollment, Verdict};
use crate::kube::admission::Admission;
use crate::kube::labels::BYPASS_INBOUND;
use crate::pods::Wanted;
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::{Attachment, Error, ErrorKind};
use redirect_testing::Fault;

/// A pod's identity as known by the plugin.
fn identity(number: u32) -> PodIdentity {
    PodIdentity {
        uid: uid(number),
        namespace: "shop".into(),
        name: format!("pod-{number}"),
        ..PodIdentity::default()
    }
}

async fn decide(admission: &Admission, pod: &PodIdentity) -> Result<Verdict, Error> {
    tokio::time::timeout(LONG, admission.decide(pod)).await.unwrap()
}

fn is_enrolled(verdict: &Verdict, pod: &PodIdentity) -> bool {
    let known = PodIdentity { service_account: "cart".into(), ..pod.clone() };
    matches!(verdict, Verdict::Enroll { identity, .. } if *identity == known)
}

#[tokio::test]
async fn a_pod_that_is_known_is_decided_at_once() {
    let node = Node::start_with(quick(), |api| {
        api.put_pod(pod(1, Some("ambient"), &[]));
        api.put_pod(pod(2, None, &[]));
        let mut static_pod = pod(3, Some("ambient"), &[]);
        static_pod["metadata"]["annotations"] = json!({"kubernetes.io/config.hash": "f".repeat(32)});
        api.put_pod(static_pod);
    })
    .await;
    node.controller.caught_up().await;
    let admission = node.controller.admission();
    let began = Instant::now();
    assert!(is_enrolled(&decide(&admission, &identity(1)).await.unwrap(), &identity(1)));
    assert!(matches!(decide(&admission, &identity(2)).await.unwrap(), Verdict::Leave(_)));
    // The runtime knows a static pod by its hash, and an old runtime knows no UID at all.
    for stand_in in ["f".repeat(32), "e".repeat(64)] {
        let pod = PodIdentity { uid: stand_in, ..identity(3) };
        assert!(is_enrolled(&decide(&admission, &pod).await.unwrap(), &identity(3)));
    }
    let excluded = PodIdentity { namespace: "kube-system".into(), ..identity(8) };
    assert!(matches!(decide(&admission, &excluded).await.unwrap(), Verdict::Leave(_)));
    let foreign = PodIdentity { namespace: String::new(), ..identity(8) };
    assert!(matches!(decide(&admission, &foreign).await.unwrap(), Verdict::Leave(_)));
    assert!(began.elapsed() < quick().patience, "nobody waited");
    assert_eq!(node.api.count("GET /api/v1/namespaces/shop/pods"), 0, "nobody asked");
    node.stop().await;
}

#[tokio::test]
async fn a_pod_that_the_informer_shows_late_is_waited_for() {
    let node = Node::start().await;
    node.controller.caught_up().await;
    let admission = node.controller.admission();
    // The previous pod with the same name is another one.
    node.api.put_pod(pod(1, Some("none"), &[]));
    let new = PodIdentity { uid: uid(7), ..identity(1) };
    let (verdict, ()) = tokio::join!(decide(&admission, &new), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.api.delete_pod("shop", "pod-1");
        let mut heir = pod(1, Some("ambient"), &[]);
        heir["metadata"]["uid"] = json!(uid(7));
        node.api.put_pod(heir);
    });
    assert!(is_enrolled(&verdict.unwrap(), &new));
    node.stop().await;
}

#[tokio::test]
async fn a_pod_that_the_informer_does_not_show_is_asked_for() {
    let node = Node::start_with(quick(), |api| {
        for what in ["GET /api/v1/pods?", "GET /api/v1/namespaces?"] {
            (0..50).for_each(|_| api.fail_next(what, Fault::Stall));
        }
        api.put_namespace("labelled", json!({"istio.io/dataplane-mode": "ambient"}));
        let mut labelled = pod(2, None, &[]);
        labelled["metadata"]["namespace"] = json!("labelled");
        api.put_pod(labelled);
        api.put_pod(pod(1, Some("ambient"), &[]));
        api.put_pod(pod(3, None, &[]));
    })
    .await;
    let admission = node.controller.admission();
    assert!(is_enrolled(&decide(&admission, &identity(1)).await.unwrap(), &identity(1)));
    let labelled = PodIdentity { namespace: "labelled".into(), ..identity(2) };
    assert!(is_enrolled(&decide(&admission, &labelled).await.unwrap(), &labelled));
    assert!(matches!(decide(&admission, &identity(3)).await.unwrap(), Verdict::Leave(_)));
    let error = decide(&admission, &identity(4)).await.unwrap_err();
    assert!(error.kind == ErrorKind::TryAgain && error.message.contains("shop/pod-4 "), "{error:?}");
    let replaced = PodIdentity { uid: uid(9), ..identity(1) };
    let error = decide(&admission, &replaced).await.unwrap_err();
    assert!(error.message.contains("replaced"), "{error:?}");
    node.stop().await;
}

#[tokio::test]
async fn without_the_api_server_what_is_known_is_decided_and_the_rest_fails_in_time() {
    let node = Node::start_with(quick(), |api| api.put_pod(pod(1, Some("ambient"), &[]))).await;
    node.controller.caught_up().await;
    node.api.set_away(true);
    let admission = node.controller.admission();
    assert!(is_enrolled(&decide(&admission, &identity(1)).await.unwrap(), &identity(1)));
    let began = Instant::now();
    let error = decide(&admission, &identity(2)).await.unwrap_err();
    assert!(error.kind == ErrorKind::TryAgain && error.message.contains("shop/pod-2"), "{error:?}");
    assert!(error.message.contains("is the API server reachable"), "{error:?}");
    assert!(began.elapsed() < quick().admission + Duration::from_secs(1));
    node.stop().await;
}

#[tokio::test]
async fn a_bad_annotation_fails_the_pod_with_its_reason() {
    let node = Node::start_with(quick(), |api| {
        let mut bad = pod(1, Some("ambient"), &[]);
        bad["metadata"]["annotations"] = json!({BYPASS_INBOUND: "maybe"});
        api.put_pod(bad);
    })
    .await;
    let error = decide(&node.controller.admission(), &identity(1)).await.unwrap_err();
    assert!(error.message.contains("shop/pod-1") && error.message.contains(BYPASS_INBOUND), "{error:?}");
    eventually("an event", || !node.api.world().events.is_empty()).await;
    node.stop().await;
}

#[tokio::test]
async fn the_plugins_pod_is_kept_in_step_from_then_on() {
    let node = Node::start().await;
    let proxy = node.proxy().await;
    node.api.put_pod(pod(1, Some("ambient"), &[]));
    let admission = node.controller.admission();
    let Verdict::Enroll { identity, settings } = decide(&admission, &identity(1)).await.unwrap() else {
        panic!("not enrolled")
    };
    let (netns, cookie) = node.new_netns(&["10.0.0.2", "fd00::2"]);
    let attachment = Attachment { container_id: "a".repeat(64), interface: "eth0".into() };
    let wanted = Wanted { identity, settings, addresses: parse(&["10.0.0.2", "fd00::2"]) };
    node.pods.add(attachment.clone(), wanted, netns).await.unwrap();
    admission.enrolled(&uid(1));
    assert!(node.captures(cookie, KINDS[0]) && proxy.serves(&uid(1)));
    eventually("enabled", || node.api.redirection("shop", "pod-1").as_deref() == Some("enabled")).await;
    // Kubernetes reports one of the two, as single-stack clusters do; the other is the pod's as well.
    node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": [{"ip": "10.0.0.2"}]}}));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(node.captures(cookie, KINDS[0]));
    node.api.patch_pod("shop", "pod-1", &label(None));
    eventually("un-enrolled", || node.captures(cookie, &[])).await;
    node.pods.del(&attachment).await.unwrap();
    node.stop().await;
}
