//! The number of requests from each agent to the API server of a large cluster.

use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};

use super::*;

/// The maximum on a node.
const PODS: u32 = 250;
/// Two watches, of pods and of namespaces, which begin with the list.
const WATCHES: usize = 2;

fn name(number: u32) -> String {
    format!("pod-{number}")
}

/// On a busy machine, a slow list must not be retried.
fn patient() -> Timing {
    Timing { api: Patience { list: LONG, ..quick().api }, ..quick() }
}

/// A node with all pods running, served and annotated.
async fn full() -> (Node, Proxy) {
    let node = Node::start_with(patient(), |_| {}).await;
    let proxy = node.proxy().await;
    for number in 0..PODS {
        let ip = format!("10.1.{}.{}", number / 250, number % 250 + 1);
        node.run_sandbox(&uid(number), &[&ip]);
        node.api.put_pod(pod(number, Some("ambient"), &[&ip]));
    }
    all_are(&node, "enabled").await;
    (node, proxy)
}

async fn all_are(node: &Node, value: &str) {
    eventually(value, || {
        (0..PODS).all(|number| node.api.redirection("shop", &name(number)).as_deref() == Some(value))
    })
    .await;
}

fn total(node: &Node) -> usize {
    node.api.count("")
}

/// All requests except annotations.
fn asked_besides(node: &Node) -> Vec<(String, String)> {
    let requests = node.api.world().requests.clone();
    requests.into_iter().filter(|(method, _)| method != "PATCH").collect()
}

#[tokio::test]
async fn a_start_costs_two_watches_and_at_most_two_annotations_a_pod() {
    let (node, _proxy) = full().await;
    let patches = node.api.count("PATCH /api/v1/namespaces/shop/pods/");
    let asked = asked_besides(&node);
    assert_eq!(asked.len(), WATCHES, "{asked:?}");
    assert_eq!(node.api.count("sendInitialEvents=true"), WATCHES, "lists are streams");
    // A pod that a worker sees before the proxy has acknowledged it is pending first.
    assert!((PODS as usize..=2 * PODS as usize).contains(&patches), "{patches}");

    // The API server restarts without its history. That must cause no writes.
    node.api.put_namespace("unrelated", json!({}));
    node.api.compact();
    node.api.cut_watches();
    eventually("listed again", || node.api.count("sendInitialEvents=true") == 2 * WATCHES).await;
    tokio::time::sleep(SHORT).await;
    assert_eq!(node.api.count("PATCH"), patches);
    node.stop().await;
}

#[tokio::test]
async fn servers_without_streams_are_asked_for_lists_in_one_piece() {
    let node = Node::start_with(patient(), |api| {
        api.set_lists_only();
        api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    })
    .await;
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    eventually("enrolled", || node.captures(cookie, KINDS[0])).await;
    // A streaming list, a plain list, and a watch each.
    for (what, count) in [("GET", 6), ("sendInitialEvents=true", 2), ("watch=true", 4), ("limit=", 0)] {
        let asked = asked_besides(&node);
        assert_eq!(node.api.count(what), count, "{what}: {asked:?}");
    }
    // An older state might lack a pod that was just enrolled.
    assert_eq!(node.api.count("resourceVersion=0"), 0);
    node.stop().await;
}

#[tokio::test]
async fn a_node_that_loses_its_proxy_writes_nothing() {
    let (node, proxy) = full().await;
    let before = total(&node);
    for _ in 0..3 {
        drop(node.proxy().await);
        tokio::time::sleep(SHORT).await;
    }
    drop(proxy);
    tokio::time::sleep(20 * quick().poll).await;
    let _proxy = node.proxy().await;
    tokio::time::sleep(SHORT).await;
    let requests = node.api.world().requests.clone();
    assert_eq!(requests.len(), before, "{:?}", &requests[before..]);
    all_are(&node, "enabled").await;
    node.stop().await;
}

#[tokio::test]
async fn a_node_whose_proxy_refuses_all_pods_writes_each_once() {
    let (node, proxy) = full().await;
    let before = total(&node);
    drop(proxy);
    let refusing = node.proxy_that_refuses((0..PODS).map(uid).collect()).await;
    all_are(&node, "pending").await;
    tokio::time::sleep(20 * quick().poll).await;
    assert_eq!(total(&node) - before, PODS as usize);
    drop(refusing);
    let _proxy = node.proxy().await;
    all_are(&node, "enabled").await;
    assert_eq!(total(&node) - before, 2 * PODS as usize);
    node.stop().await;
}

#[tokio::test]
async fn what_happens_again_is_counted_in_one_event() {
    /// Less than the channel's capacity.
    const TIMES: u64 = 60;
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("enrolled", || node.captures(cookie, KINDS[0])).await;
    let lost = node.kernel.facts(cookie).into_iter().find(|fact| matches!(fact, Fact::Rule { .. })).unwrap();
    for _ in 0..TIMES {
        node.kernel.state().namespaces.get_mut(&cookie).unwrap().facts.remove(&lost);
        node.pods.reconcile(&uid(1)).await;
    }
    eventually("all are counted", || {
        node.api.world().events.iter().any(|event| event["series"]["count"] == TIMES)
    })
    .await;
    let events = node.api.world().events.clone();
    assert_eq!(events.len(), 1, "{events:?}");
    let counted = node.api.count("PATCH /apis/events.k8s.io/");
    assert!(counted < TIMES as usize / 4, "{counted} requests for {TIMES} repairs");
    tokio::time::sleep(3 * quick().events).await;
    assert_eq!(node.api.count("PATCH /apis/events.k8s.io/"), counted, "nothing has happened since");
    node.stop().await;
}

/// The manifest's roles allow every request that these tests cause.
#[tokio::test]
async fn the_agents_roles_allow_what_it_asks() {
    let node = Node::start().await;
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid(1), KINDS[0]);
    let mut bad = pod(2, Some("ambient"), KINDS[1]);
    bad["metadata"]["annotations"] = json!({"ambient.istio.io/bypass-inbound-capture": "maybe"});
    node.api.put_pod(bad);
    node.api.put_pod(pod(1, Some("ambient"), KINDS[0]));
    eventually("enrolled", || node.captures(cookie, KINDS[0])).await;
    let lost = node.kernel.facts(cookie).into_iter().find(|fact| matches!(fact, Fact::Rule { .. })).unwrap();
    for _ in 0..2 {
        node.kernel.state().namespaces.get_mut(&cookie).unwrap().facts.remove(&lost);
        node.pods.reconcile(&uid(1)).await;
    }
    for what in ["PATCH /api/", "POST /apis/events.k8s.io/", "PATCH /apis/events.k8s.io/"] {
        eventually(what, || node.api.count(what) > 0).await;
    }
    let rules = rules();
    let requests = node.api.world().requests.clone();
    for (method, path) in requests {
        let (group, resource, verb) = asked(&method, &path);
        let includes = |list: &Option<Vec<String>>, what: &str| list.iter().flatten().any(|one| one == what);
        let allowed = rules.iter().any(|rule| {
            includes(&rule.api_groups, &group)
                && includes(&rule.resources, &resource)
                && rule.verbs.iter().any(|one| one == verb)
        });
        assert!(
            allowed,
            "{verb} {resource} of group {group:?} ({method} {path}) is not allowed by {rules:?}"
        );
    }
    node.stop().await;
}

/// Group, resource and verb of a request, as the API server determines them.
fn asked(method: &str, target: &str) -> (String, String, &'static str) {
    let (path, query) = target.split_once('?').unwrap();
    let mut parts = path.split('/').skip(1);
    let group = match parts.next().unwrap() {
        "api" => "",
        _ => parts.next().unwrap(),
    };
    let mut parts: Vec<&str> = parts.skip(1).collect();
    if let ["namespaces", _, _, ..] = parts[..] {
        parts.drain(..2);
    }
    let resource = match parts[..] {
        [resource, _, sub] => format!("{resource}/{sub}"),
        _ => parts[0].to_owned(),
    };
    let verb = match (method, parts.len()) {
        ("POST", _) => "create",
        ("PATCH", _) => "patch",
        (_, 1) if query.contains("watch=true") => "watch",
        (_, 1) => "list",
        _ => "get",
    };
    (group.to_owned(), resource, verb)
}

/// The rules of the manifest's roles.
fn rules() -> Vec<PolicyRule> {
    const MANIFEST: &str =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/manifests/ambient-redirect.yaml"));
    let mut rules = Vec::new();
    for document in MANIFEST.split("\n---\n") {
        let kind = |kind: &str| document.lines().any(|line| line == format!("kind: {kind}"));
        if kind("ClusterRole") {
            rules.extend(serde_saphyr::from_str::<ClusterRole>(document).unwrap().rules.unwrap());
        } else if kind("Role") {
            rules.extend(serde_saphyr::from_str::<Role>(document).unwrap().rules.unwrap());
        }
    }
    rules
}
