//! The effects of pods and labels.

use super::*;
use crate::kube::api::REDIRECTION;
use crate::kube::labels::{BYPASS_INBOUND, VIRTUAL_INTERFACES};
use redirect_ebpf::maps::PodFlags;
use redirect_protocol::wire::Attachment;

#[tokio::test]
async fn labels_enroll_and_un_enroll_running_pods_of_all_kinds() {
    let node = Node::start().await;
    let proxy = node.proxy().await;
    for (number, kind) in (0..).zip(KINDS) {
        let cookie = node.run_sandbox(&uid(number), kind);
        node.api.put_pod(pod(number, None, kind));
        let name = format!("pod-{number}");
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(node.captures(cookie, &[]));

        for flip in 0..2 {
            node.api.patch_pod("shop", &name, &label(Some("ambient")));
            eventually("the pod's label enrolls it", || {
                node.captures(cookie, kind) && proxy.serves(&uid(number))
            })
            .await;
            eventually("the annotation says so", || {
                node.api.redirection("shop", &name).as_deref() == Some("enabled")
            })
            .await;
            node.api.patch_pod("shop", &name, &label(if flip == 0 { None } else { Some("none") }));
            eventually("the pod's label un-enrolls it", || {
                node.captures(cookie, &[]) && !proxy.serves(&uid(number))
            })
            .await;
            eventually("the annotation is removed", || node.api.redirection("shop", &name).is_none()).await;
        }
    }
    let infos = proxy.seen.lock().unwrap().infos.clone();
    assert!(infos.iter().all(|info| info.namespace == "shop" && info.service_account == "cart"), "{infos:?}");
    node.stop().await;
}

#[tokio::test]
async fn a_namespaces_label_enrolls_its_pods_but_those_that_opt_out() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let plain = node.run_sandbox(&uid(1), KINDS[0]);
    let out = node.run_sandbox(&uid(2), &["10.0.0.3"]);
    node.api.put_pod(pod(1, None, KINDS[0]));
    node.api.put_pod(pod(2, Some("none"), &["10.0.0.3"]));
    node.api.put_namespace("shop", json!({"istio.io/dataplane-mode": "ambient"}));
    eventually("the namespace's label enrolls", || node.captures(plain, KINDS[0])).await;
    assert!(node.captures(out, &[]));
    node.api.put_namespace("shop", json!({}));
    eventually("the namespace's label un-enrolls", || node.captures(plain, &[])).await;
    node.stop().await;
}

#[tokio::test]
async fn addresses_are_followed_in_both_families() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), &["10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"]);
    node.api.put_pod(pod(1, Some("ambient"), &[]));
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(node.captures(cookie, &[]), "a pod without addresses is not there yet");
    for addresses in
        [&["10.0.0.2"][..], &["10.0.0.2", "fd00::2"], &["fd00::3", "10.0.0.3"], &["fd00::3"], &["10.0.0.2"]]
    {
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": ips}}));
        eventually("the addresses are followed", || node.captures(cookie, addresses)).await;
    }
    // Like a pod that has ended, before its phase changes.
    node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": []}}));
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(node.captures(cookie, &["10.0.0.2"]));
    node.api.patch_pod("shop", "pod-1", &json!({"status": {"phase": "Succeeded"}}));
    eventually("a pod that has ended leaves", || node.captures(cookie, &[])).await;
    node.stop().await;
}

#[tokio::test]
async fn switches_are_carried_and_followed() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    // A running pod may have earlier connections.
    let before = PodFlags::EARLIER_CONNECTIONS.0 | PodFlags::HALF_OPEN.0 | PodFlags::IN_POD.0;
    let flags = |bits: u32| {
        let facts = node.kernel.facts(cookie);
        let flags =
            facts.iter().filter_map(|fact| if let Fact::Pod(pod) = fact { Some(pod.flags) } else { None });
        flags.eq([before | bits])
    };
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("enrolled", || flags(0)).await;
    node.api.patch_pod("shop", "pod-1", &annotation(BYPASS_INBOUND, Some("true")));
    eventually("inbound is bypassed", || flags(1)).await;
    node.api.patch_pod("shop", "pod-1", &annotation(VIRTUAL_INTERFACES, Some("tap0, tap1")));
    node.api.patch_pod("shop", "pod-1", &annotation(BYPASS_INBOUND, None));
    eventually("inbound is caught again", || flags(0)).await;
    assert_eq!(node.kernel.state().virtual_interfaces[&cookie], ["tap0", "tap1"]);
    node.stop().await;
}

#[tokio::test]
async fn a_bad_annotation_is_told_and_changes_nothing() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let fresh = node.run_sandbox(&uid(1), KINDS[0]);
    let mut bad = pod(1, Some("ambient"), KINDS[0]);
    bad["metadata"]["annotations"] = json!({BYPASS_INBOUND: "true", VIRTUAL_INTERFACES: "a/b"});
    node.api.put_pod(bad);
    eventually("an event", || !node.api.world().events.is_empty()).await;
    let event = node.api.world().events[0].clone();
    assert_eq!(event["regarding"]["name"], "pod-1");
    assert_eq!(event["regarding"]["uid"], uid(1));
    assert_eq!(event["type"], "Warning");
    let note = event["note"].as_str().unwrap();
    assert!(
        note.contains(VIRTUAL_INTERFACES) && note.contains("a/b") && note.contains("separated by commas"),
        "{note}"
    );
    assert!(node.captures(fresh, &[]));

    // Corrected, it is enrolled; broken again, it stays enrolled.
    node.api.patch_pod("shop", "pod-1", &annotation(VIRTUAL_INTERFACES, Some("tap0")));
    eventually("enrolled", || node.captures(fresh, KINDS[0])).await;
    let before = node.kernel.facts(fresh);
    node.api.patch_pod("shop", "pod-1", &annotation(BYPASS_INBOUND, Some("maybe")));
    eventually("another event", || node.api.world().events.len() == 2).await;
    assert_eq!(node.kernel.facts(fresh), before);
    node.stop().await;
}

#[tokio::test]
async fn an_address_that_the_namespace_lacks_is_refused_and_told() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let liar = node.run_sandbox(&uid(1), &["10.0.0.2"]);
    let honest = node.run_sandbox(&uid(2), &["10.0.0.9", "fd00::9"]);
    node.api.put_pod(pod(1, Some("ambient"), &["10.0.0.2", "fd00::9"]));
    node.api.put_pod(pod(2, Some("ambient"), &["10.0.0.9", "fd00::9"]));
    eventually("the other goes on", || node.captures(honest, &["10.0.0.9", "fd00::9"])).await;
    eventually("an event", || !node.api.world().events.is_empty()).await;
    let note = node.api.world().events[0]["note"].as_str().unwrap().to_owned();
    for part in ["shop/pod-1", "IPv6", "fd00::9", "status.podIPs"] {
        assert!(note.contains(part), "{part} is not in: {note}");
    }
    assert!(node.captures(liar, &[]));
    node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": [{"ip": "10.0.0.2"}]}}));
    eventually("the right addresses", || node.captures(liar, &["10.0.0.2"])).await;
    // The same false report about an enrolled pod changes nothing.
    node.api.patch_pod("shop", "pod-1", &json!({"status": {"podIPs": [{"ip": "10.0.0.9"}]}}));
    eventually("another event", || node.api.world().events.len() == 2).await;
    assert!(node.captures(liar, &["10.0.0.2"]) && node.captures(honest, &["10.0.0.9", "fd00::9"]));
    node.stop().await;
}

#[tokio::test]
async fn annotations_are_corrected_to_what_is() {
    let node = Node::start_with(Timing { resync: Duration::from_millis(50), ..quick() }, |api| {
        for number in [1, 2] {
            let mut stale = pod(number, (number == 1).then_some("ambient"), KINDS[0]);
            stale["metadata"]["annotations"] = json!({REDIRECTION: "enabled", "other": "stays"});
            api.put_pod(stale);
        }
    })
    .await;
    let is = |name: &str, value: Option<&str>| node.api.redirection("shop", name).as_deref() == value;
    eventually("not labelled", || is("pod-2", None)).await;
    eventually("no sandbox, no kernel state", || is("pod-1", Some("pending"))).await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    tokio::time::sleep(SHORT).await;
    assert!(node.captures(cookie, &[]) && is("pod-1", Some("pending")), "no proxy serves it");
    let proxy = node.proxy().await;
    eventually("a proxy serves it", || is("pod-1", Some("enabled"))).await;
    assert!(node.captures(cookie, KINDS[0]));
    assert_eq!(proxy.seen.lock().unwrap().snapshot.clone().unwrap(), [uid(1)].into());

    // Other software removes a rule, and sets the annotation to nonsense.
    let lost = node.kernel.facts(cookie).into_iter().find(|fact| matches!(fact, Fact::Rule { .. })).unwrap();
    node.kernel.state().namespaces.get_mut(&cookie).unwrap().facts.remove(&lost);
    eventually("the kernel is repaired", || node.kernel.facts(cookie).contains(&lost)).await;
    node.api.patch_pod("shop", "pod-1", &annotation(REDIRECTION, Some("nonsense")));
    eventually("the annotation is corrected", || is("pod-1", Some("enabled"))).await;
    node.api.patch_pod("shop", "pod-2", &annotation(REDIRECTION, Some("enabled")));
    eventually("the annotation is removed again", || is("pod-2", None)).await;

    // The kernel's state is permanently gone.
    node.kernel.state().namespaces.remove(&cookie);
    eventually("the pod is no longer captured", || is("pod-1", Some("pending"))).await;
    node.stop().await;
}

#[tokio::test]
async fn a_captured_pod_stays_enabled_without_its_proxy_and_one_that_a_proxy_refuses_is_pending() {
    let node = Node::start().await;
    let is = |value: &str| node.api.redirection("shop", "pod-1").as_deref() == Some(value);
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    let proxy = node.proxy().await;
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("enabled", || is("enabled")).await;
    drop(proxy);
    tokio::time::sleep(SHORT).await;
    assert!(is("enabled"), "peers would send it plaintext");
    assert!(node.captures(cookie, KINDS[0]), "never past the proxy");

    let cookie = node.run_sandbox(&uid(2), &["10.0.0.7"]);
    let proxy = node.proxy().await;
    proxy.seen.lock().unwrap().refuse.insert(uid(2));
    node.api.put_pod(pod(2, Some("ambient"), &["10.0.0.7"]));
    eventually("refused", || node.api.redirection("shop", "pod-2").as_deref() == Some("pending")).await;
    tokio::time::sleep(SHORT).await;
    assert!(node.captures(cookie, &[]), "nobody serves it");
    proxy.seen.lock().unwrap().refuse.clear();
    // The agent announces the pod to that proxy again after a while, and to a new one at once.
    let _proxy = node.proxy().await;
    eventually("captured", || node.captures(cookie, &["10.0.0.7"])).await;
    node.stop().await;
}

#[tokio::test]
async fn what_is_never_enrolled_is_not() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let changes: [fn(&mut Value); 4] = [
        |pod| pod["spec"]["hostNetwork"] = json!(true),
        |pod| pod["metadata"]["annotations"] = json!({"sidecar.istio.io/status": "{}"}),
        |pod| pod["metadata"]["namespace"] = json!("kube-system"),
        |pod| pod["spec"]["nodeName"] = json!("node-2"),
    ];
    let mut cookies = Vec::new();
    for (number, change) in (1..).zip(changes) {
        cookies.push(node.run_sandbox(&uid(number), &["10.0.0.2"]));
        let mut pod = pod(number, Some("ambient"), &["10.0.0.2"]);
        change(&mut pod);
        node.api.put_pod(pod);
    }
    // A process in the host's own namespace is not the pod's, whatever its cgroup.
    let (directory, _) = node.run_process(&uid(5), &"d".repeat(64), &["10.0.0.5"]);
    fs::remove_file(directory.join("ns/net")).unwrap();
    fs::hard_link(node.directory.path().join("proc/1/ns/net"), directory.join("ns/net")).unwrap();
    node.api.put_pod(pod(5, Some("ambient"), &["10.0.0.5"]));
    let good = node.run_sandbox(&uid(9), &["10.0.0.9"]);
    node.api.put_pod(pod(9, Some("ambient"), &["10.0.0.9"]));
    eventually("a pod that is", || node.captures(good, &["10.0.0.9"])).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(cookies.iter().all(|cookie| node.captures(*cookie, &[])));
    assert_eq!(node.pods.uids().await, [uid(9)]);
    node.stop().await;
}

#[tokio::test]
async fn the_same_uid_twice_a_deleted_pod_and_one_of_its_name() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let first = node.run_sandbox(&uid(1), &["10.0.0.2"]);
    node.api.put_pod(pod(1, Some("ambient"), &["10.0.0.2"]));
    eventually("enrolled", || node.captures(first, &["10.0.0.2"])).await;
    let mut twin = pod(2, Some("ambient"), &["10.0.0.2"]);
    twin["metadata"]["uid"] = json!(uid(1));
    node.api.put_pod(twin);
    node.api.delete_pod("shop", "pod-2");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(node.captures(first, &["10.0.0.2"]), "the twin's end is not the pod's");

    let second = node.run_sandbox(&uid(3), &["10.0.0.2"]);
    node.api.delete_pod("shop", "pod-1");
    let mut heir = pod(1, Some("ambient"), &["10.0.0.2"]);
    heir["metadata"]["uid"] = json!(uid(3));
    node.api.put_pod(heir);
    eventually("the heir is captured", || node.captures(first, &[]) && node.captures(second, &["10.0.0.2"]))
        .await;
    node.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_was_found_is_taken_down_by_its_containers_name() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let (_, cookie) = node.run_process(&uid(1), &"a".repeat(64), &["10.0.0.2"]);
    node.api.put_pod(pod(1, Some("ambient"), &["10.0.0.2"]));
    eventually("enrolled", || node.captures(cookie, &["10.0.0.2"])).await;
    let attachment = |letter: &str| Attachment { container_id: letter.repeat(64), interface: "eth0".into() };
    node.pods.del(&attachment("b")).await.unwrap();
    assert!(node.captures(cookie, &["10.0.0.2"]));
    node.pods.del(&attachment("a")).await.unwrap();
    assert!(node.captures(cookie, &[]));
    // The process still exists, and the API server still reports the pod as running.
    node.api.patch_pod("shop", "pod-1", &annotation("news", Some("none")));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(node.captures(cookie, &[]));
    node.stop().await;
}

#[tokio::test]
async fn a_flood_of_pods_is_worked_off() {
    const PODS: u32 = 150;
    let node = Node::start().await;
    let proxy = node.proxy().await;
    let mut cookies = Vec::new();
    for number in 0..PODS {
        let ip = format!("10.1.{}.{}", number / 250, number % 250 + 1);
        cookies.push((node.run_sandbox(&uid(number), &[&ip]), ip.clone()));
        node.api.put_pod(pod(number, Some("ambient"), &[&ip]));
    }
    eventually("all are captured", || cookies.iter().all(|(cookie, ip)| node.captures(*cookie, &[ip]))).await;
    eventually("all are served", || (0..PODS).all(|number| proxy.serves(&uid(number)))).await;
    eventually("all are annotated", || {
        (0..PODS).all(|number| {
            node.api.redirection("shop", &format!("pod-{number}")).as_deref() == Some("enabled")
        })
    })
    .await;
    node.stop().await;
}
