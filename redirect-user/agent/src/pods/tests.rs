//! Pods on a fake kernel, added and deleted as by the CNI plugin. The tests with Kubernetes cover the other ways.

mod schedules;

use std::convert::Infallible;

use tempfile::TempDir;

use super::super::checkpoints::Found;
use super::*;
use redirect_datapath::datapath::fake::Fake;
use redirect_datapath::facts::Fact;
use redirect_protocol::wire::PodReport;
use redirect_zds::server::{AddError, Options, Server};

struct Node {
    directory: TempDir,
    kernel: Fake,
    pods: Pods<Fake>,
}

impl Node {
    /// Starts without a proxy, so that enrollments end at the proxy's deadline.
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = Fake::default();
        let copy = kernel.clone();
        let (thread, _) = DatapathHandle::start(move || Ok::<_, Infallible>(copy)).unwrap();
        let (_, handle) = Server::bind(&directory.path().join("zds.sock"), Options::default()).unwrap();
        let checkpoints = Checkpoints::open(&directory.path().join("state")).unwrap();
        let pods = Pods::new(thread, handle, defaults(Duration::from_millis(20)), 1, None, checkpoints);
        Self { directory, kernel, pods }
    }

    fn netns(&self, name: &str, addresses: &[&str]) -> (NetNs, u64) {
        let path = self.directory.path().join(name);
        std::fs::File::create(&path).unwrap();
        let netns = NetNs::open(&path).unwrap();
        let cookie = netns.inode().unwrap();
        self.kernel.insert(cookie, &parse(addresses));
        (netns, cookie)
    }

    fn captures(&self, cookie: u64) -> bool {
        self.kernel.facts(cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)))
    }
}

fn defaults(proxy_deadline: Duration) -> Defaults {
    Defaults { proxy_deadline, dns: false, any_source: false }
}

fn parse(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|text| text.parse().unwrap()).collect()
}

fn wanted(uid: &str, name: &str, addresses: &[&str]) -> Wanted {
    let identity = PodIdentity {
        uid: uid.into(),
        namespace: "shop".into(),
        name: name.into(),
        ..PodIdentity::default()
    };
    Wanted { identity, addresses: parse(addresses), ..Wanted::default() }
}

fn attachment(container: &str) -> Attachment {
    Attachment { container_id: container.into(), interface: "eth0".into() }
}

#[tokio::test]
async fn without_a_proxy_the_plugins_pod_is_not_enrolled_and_nothing_is_left() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &[]);
    let error = node.pods.add(attachment("c"), wanted("u", "a", &["10.0.0.2"]), netns).await.unwrap_err();
    assert!(matches!(error, Error::Proxy(AddError::NotConnected { .. })), "{error}");
    assert!(node.kernel.facts(cookie).is_empty());
    assert!(node.pods.uids().await.is_empty());
    assert!(node.pods.ownership.containers().is_empty());
}

/// Adopts a running pod, and captures it as if a proxy served it.
async fn adopt(pods: &Pods<Fake>, wanted: Wanted, sandbox: Sandbox) {
    let uid = wanted.identity.uid.clone();
    pods.adopt(wanted, vec![sandbox]).await.unwrap();
    let mut slot = pods.slots.find(&uid).await.unwrap();
    pods.capture_served(slot.as_mut().unwrap()).await.unwrap();
    pods.release(slot, &uid).await;
}

#[tokio::test]
async fn a_running_pod_is_captured_when_a_proxy_serves_it() {
    for addresses in [&["10.0.0.2"][..], &["fd00::2"], &["10.0.0.2", "fd00::2"]] {
        let node = Node::start();
        let (netns, cookie) = node.netns("pod", addresses);
        let path = node.directory.path().join("acks.sock");
        let (server, proxies) = Server::bind(&path, Options::default()).unwrap();
        let pods = Pods { proxies, ..node.pods };
        let captured = || node.kernel.facts(cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)));
        let pod = wanted("u", "a", addresses);
        pods.adopt(pod.clone(), vec![Sandbox { netns, containers: BTreeSet::new() }]).await.unwrap();
        // Without a proxy, no operation captures anything.
        pods.reconcile("u").await;
        pods.check_drift("u").await;
        let mut changed = pod.clone();
        changed.settings.bypass_inbound = true;
        assert!(pods.update(&changed).await.unwrap() && pods.served().is_empty());
        assert!(node.kernel.facts(cookie).is_empty() && pods.checkpoints.read().unwrap().is_empty());
        let report = pods.report().await;
        assert!(report[0].captured.is_empty() && report[0].proxy.is_err(), "{report:?}");
        assert!(pods.standing("u").await.is_some_and(|standing| standing.awaiting && !standing.captured));

        let task = tokio::spawn(server.run(std::future::pending()));
        let proxy = tokio::spawn(acknowledge(path));
        until("it is served", async || pods.served() == ["u"]).await;
        let now = node.kernel.state().applied.len();
        node.kernel.state().fail_at = Some(now + 1);
        pods.update(&changed).await.unwrap_err();
        assert!(node.kernel.facts(cookie).is_empty() && pods.served() == ["u"], "it is tried again");
        assert!(pods.checkpoints.read().unwrap().is_empty());
        assert!(pods.update(&changed).await.unwrap() && captured() && pods.served().is_empty());
        assert!(pods.standing("u").await.is_some_and(|standing| standing.captured && !standing.awaiting));
        let checkpoints = pods.checkpoints.read().unwrap();
        assert!(
            checkpoints[0].phase == Phase::Done
                && checkpoints[0].recent
                && checkpoints[0].earlier_connections
        );
        // Packets of half-open connections pass only for a limited time.
        let is_let_through =
            |fact: &Fact| matches!(fact, Fact::Pod(pod) if pod.flags & PodFlags::HALF_OPEN.0 != 0);
        assert!(node.kernel.facts(cookie).iter().any(is_let_through));
        pods.slots.find("u").await.unwrap().as_mut().unwrap().since -= HALF_OPEN;
        pods.check_drift("u").await;
        assert!(captured() && !node.kernel.facts(cookie).iter().any(is_let_through));
        assert!(!pods.checkpoints.read().unwrap()[0].recent);
        assert!(pods.repairs().report().is_empty(), "that repairs nothing");
        task.abort();
        proxy.abort();
    }
}

#[tokio::test]
async fn a_pod_that_was_captured_without_a_checkpoint_stays_so() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &["10.0.0.2"]);
    let sandbox = Sandbox { netns, containers: BTreeSet::new() };
    let pod = redirect_ebpf::maps::Pod::default();
    node.kernel.state().namespaces.get_mut(&cookie).unwrap().facts.insert(Fact::Pod(pod));
    node.pods.adopt(wanted("u", "a", &["10.0.0.2"]), vec![sandbox]).await.unwrap();
    assert!(node.captures(cookie) && node.pods.standing("u").await.unwrap().captured);
    assert!(!node.pods.checkpoints.read().unwrap()[0].recent);
}

#[tokio::test]
async fn a_running_pod_is_one_pods() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &["10.0.0.2"]);
    let sandbox = Sandbox { netns, containers: ["c".to_owned()].into() };
    adopt(&node.pods, wanted("u", "a", &["10.0.0.2"]), sandbox.clone()).await;
    assert!(node.captures(cookie));

    // Another pod with the same UID is refused, and a second adoption changes nothing.
    let error = node.pods.adopt(wanted("u", "b", &["10.0.0.2"]), vec![sandbox.clone()]).await.unwrap_err();
    assert!(error.to_string().contains("shop/b") && error.to_string().contains("shop/a"), "{error}");
    node.kernel.state().applied.clear();
    node.pods.adopt(wanted("u", "a", &["10.0.0.2"]), vec![sandbox]).await.unwrap();
    assert!(node.kernel.state().applied.is_empty());

    assert!(node.pods.forget("u").await.unwrap());
    assert!(!node.pods.forget("u").await.unwrap());
    assert!(node.kernel.facts(cookie).is_empty());
    assert!(node.pods.ownership.containers().is_empty());
}

#[tokio::test]
async fn a_pod_without_addresses_is_refused_and_disturbs_nobody() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &[]);
    let (neighbours, neighbour) = node.netns("neighbour", &["10.0.0.3"]);
    let sandbox = Sandbox { netns: neighbours, containers: BTreeSet::new() };
    adopt(&node.pods, wanted("v", "b", &["10.0.0.3"]), sandbox).await;
    let error = node.pods.add(attachment("c"), wanted("u", "a", &[]), netns).await.unwrap_err();
    assert!(matches!(error, Error::NoAddresses(_)), "{error}");
    assert!(error.to_string().contains("shop/a"), "{error}");
    assert!(node.kernel.facts(cookie).is_empty());
    assert!(node.captures(neighbour));
    assert_eq!(node.pods.uids().await, ["v"]);
}

#[tokio::test]
async fn the_hosts_namespace_is_no_pods() {
    let node = Node::start();
    let (netns, cookie) = node.netns("host", &["10.0.0.2"]);
    let host = Pods { host_cookie: cookie, ..node.pods };
    let error = host.add(attachment("c"), wanted("u", "a", &["10.0.0.2"]), netns.clone()).await.unwrap_err();
    assert!(matches!(error, Error::HostNetwork(_)), "{error}");
    let sandbox = Sandbox { netns, containers: BTreeSet::new() };
    let error = host.adopt(wanted("u", "a", &["10.0.0.2"]), vec![sandbox]).await.unwrap_err();
    assert!(matches!(error, Error::NoNamespace(_)), "{error}");
    assert!(node.kernel.facts(cookie).is_empty());
}

#[tokio::test]
async fn a_failed_change_leaves_the_pod_as_it_was() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &["10.0.0.2", "fd00::2"]);
    let sandbox = Sandbox { netns, containers: BTreeSet::new() };
    adopt(&node.pods, wanted("u", "a", &["10.0.0.2"]), sandbox).await;
    let before = node.kernel.facts(cookie);
    let mut more = wanted("u", "a", &["10.0.0.2", "fd00::2"]);
    more.settings.bypass_inbound = true;
    let next = node.kernel.state().applied.len();
    for step in 0..3 {
        let now = node.kernel.state().applied.len();
        node.kernel.state().fail_at = Some(now + step);
        node.pods.update(&more).await.unwrap_err();
        assert_eq!(node.kernel.facts(cookie), before, "after a failure at step {step}");
    }
    assert!(node.kernel.state().applied.len() > next);
    assert!(node.pods.update(&more).await.unwrap());
    assert!(node.kernel.facts(cookie).contains(&Fact::Address("fd00::2".parse().unwrap())));
    let changed = |fact: &Fact| matches!(fact, Fact::Pod(pod) if pod.flags & PodFlags::BYPASS_INBOUND.0 != 0);
    assert!(node.kernel.facts(cookie).iter().any(changed));
    assert!(!node.pods.update(&wanted("other", "b", &[])).await.unwrap());
}

/// A second ADD, such as for another interface, fails: the proxy is slow, the kernel refuses a step, or the request is invalid.
#[tokio::test]
async fn a_failed_second_add_leaves_the_pod_as_it_was() {
    let node = Node::start();
    let (netns, cookie) = node.netns("pod", &["10.0.0.2", "fd00::2"]);
    let sandbox = Sandbox { netns: netns.clone(), containers: BTreeSet::new() };
    adopt(&node.pods, wanted("u", "a", &["10.0.0.2"]), sandbox).await;
    let (facts, report) = (node.kernel.facts(cookie), node.pods.report().await);
    let again =
        |addresses: &[&str]| node.pods.add(attachment("2"), wanted("u", "a", addresses), netns.clone());
    let as_it_was = async |case: &str| {
        assert_eq!(node.kernel.facts(cookie), facts, "{case}");
        let mut now = node.pods.report().await;
        now.iter_mut().zip(&report).for_each(|(now, before)| now.since = before.since);
        assert_eq!(now, report, "{case}");
        assert!(!node.pods.ownership.containers().contains("2"), "{case}");
    };
    for address in ["10.0.0.3", "fd00::2", "::ffff:10.0.0.4"] {
        // No proxy acknowledges it in time.
        let error = again(&[address]).await.unwrap_err();
        assert!(matches!(error, Error::Proxy(AddError::NotConnected { .. })), "{error}");
        as_it_was(&format!("{address}, slow proxy")).await;
        let now = node.kernel.state().applied.len();
        node.kernel.state().fail_at = Some(now);
        let error = again(&[address]).await.unwrap_err();
        assert!(matches!(error, Error::Datapath(_)), "{error}");
        as_it_was(&format!("{address}, refused step")).await;
    }
    assert!(node.pods.forget("u").await.unwrap(), "the pod is no longer known");
    assert!(node.kernel.facts(cookie).is_empty());
}

/// The agent retries a failed removal at once. If that fails too, the pod stays known, and the next attempt removes it.
#[tokio::test]
async fn a_pod_that_can_not_be_removed_is_known_still() {
    for (address, fails_on) in ["10.0.0.2", "fd00::2", "::ffff:10.0.0.2"]
        .into_iter()
        .flat_map(|address| [(address, false), (address, true)])
    {
        for step in 0.. {
            let case = format!("{address}, step {step}, again: {fails_on}");
            let node = Node::start();
            let (netns, cookie) = node.netns("pod", &["10.0.0.2", "fd00::2"]);
            let sandbox = Sandbox { netns, containers: BTreeSet::new() };
            adopt(&node.pods, wanted("u", "a", &[address]), sandbox).await;
            let now = node.kernel.state().applied.len();
            node.kernel.state().fail_at = Some(now + step);
            node.kernel.state().fails_on = fails_on;
            let removed = node.pods.forget("u").await;
            let over = node.kernel.state().fail_at.take().is_some() && removed.is_ok();
            assert_eq!(removed.is_err(), fails_on && !over, "{case}");
            if let Err(error) = removed {
                assert!(matches!(error, Error::NotRemoved { .. }), "{error}");
                assert_eq!(node.pods.uids().await, ["u"], "{case}");
                assert!(node.pods.forget("u").await.unwrap());
            }
            assert!(node.kernel.facts(cookie).is_empty() && node.pods.uids().await.is_empty(), "{case}");
            if over {
                assert!(step > 1, "{case}: no step failed");
                break;
            }
        }
    }
}

/// The agent stops capturing a pod that leaves, and its proxy has a grace period, also under the next agent. If the pod returns,
/// the connections that it opened in between continue.
#[tokio::test]
async fn a_pod_that_leaves_has_time() {
    for address in ["10.0.0.2", "fd00::2", "::ffff:10.0.0.2"] {
        let node = Node::start();
        let (netns, cookie) = node.netns("pod", &["10.0.0.2", "fd00::2"]);
        let sandbox = Sandbox { netns: netns.clone(), containers: BTreeSet::new() };
        assert_eq!(node.pods.leave("u", LONG).await, None, "a pod that is not known");
        let pod = wanted("u", "a", &[address]);
        adopt(&node.pods, pod.clone(), sandbox).await;
        let has = |flags: PodFlags| {
            let has = |fact: &Fact| matches!(fact, Fact::Pod(pod) if PodFlags(pod.flags).contains(flags));
            node.kernel.facts(cookie).iter().any(has)
        };
        assert_eq!(node.pods.leave("u", Duration::ZERO).await, None);
        assert!(node.captures(cookie) && !has(PodFlags::RELEASED), "{address}");
        for _ in 0..2 {
            let left = node.pods.leave("u", LONG).await.unwrap();
            assert!(left <= LONG && left > LONG / 2, "{address}: {left:?}");
            // Neither a reconciliation nor a drift check captures it again.
            node.pods.reconcile("u").await;
            node.pods.check_drift("u").await;
            assert!(has(PodFlags::RELEASED) && node.pods.repairs().report().is_empty(), "{address}");
        }
        assert!(!node.pods.standing("u").await.unwrap().captured);
        let checkpoints = node.pods.checkpoints.read().unwrap();
        assert!(checkpoints[0].leaving, "{checkpoints:?}");
        let (found, state) = (Found { checkpoint: checkpoints[0].clone(), netns: Some(netns) }, "state");
        let restored = Pods {
            slots: Slots::default(),
            ownership: Ownership::default(),
            checkpoints: Checkpoints::open(&node.directory.path().join(state)).unwrap(),
            ..node.pods
        };
        assert_eq!(restored.restore(vec![found]).await.adopted, 1);
        assert!(has(PodFlags::RELEASED), "{address}");
        assert!(restored.leave("u", LONG).await.is_some());
        assert!(restored.update(&pod).await.unwrap() && !has(PodFlags::RELEASED), "{address}");
        assert!(has(PodFlags::EARLIER_CONNECTIONS) && has(PodFlags::HALF_OPEN), "{address}");
        assert!(restored.standing("u").await.unwrap().captured);
        assert!(!restored.checkpoints.read().unwrap()[0].leaving);
        // The grace period is over.
        assert!(restored.leave("u", Duration::from_nanos(1)).await.is_none());
        assert!(restored.forget("u").await.unwrap() && node.kernel.facts(cookie).is_empty());
    }
}

/// The limit for operations that do not wait for a proxy: much shorter than the proxy's deadline in these tests.
const AT_ONCE: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(600);

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let reached = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(AT_ONCE, reached).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn pods_that_wait_for_a_proxy_delay_nobody() {
    const PODS: usize = 50;
    let node = Node::start();
    let path = node.directory.path().join("acks.sock");
    let (server, proxies) = Server::bind(&path, Options::default()).unwrap();
    let (running, cookie) = node.netns("running", &["10.1.0.1", "fd00::1:1"]);
    let namespaces: Vec<_> = (0..PODS).map(|number| node.netns(&format!("{number}"), &[])).collect();
    let Node { kernel, pods, directory: _directory } = node;
    let pods = Arc::new(Pods { proxies, defaults: defaults(LONG), ..pods });
    let sandbox = Sandbox { netns: running, containers: ["r".to_owned()].into() };
    adopt(&pods, wanted("running", "running", &["10.1.0.1", "fd00::1:1"]), sandbox).await;

    let adds: Vec<_> = namespaces
        .iter()
        .enumerate()
        .map(|(number, (netns, _))| {
            let (pods, netns, number) = (Arc::clone(&pods), netns.clone(), number.to_string());
            let pod = wanted(&number, &number, &[&format!("10.0.0.{number}"), &format!("fd00::{number}")]);
            tokio::spawn(async move { pods.add(attachment(&number), pod, netns).await })
        })
        .collect();
    until("all wait", async || pods.report().await.len() == PODS + 1).await;
    let states = || pods.checkpoints.read().unwrap().into_iter().map(|checkpoint| checkpoint.phase);
    assert_eq!(states().filter(|phase| *phase == Phase::Begun).count(), PODS, "they would be undone");

    let others = async {
        // Repairs, on notification and periodic, also of waiting pods.
        for (uid, cookie) in [("running", cookie), ("7", namespaces[7].1)] {
            for at_once in [true, false] {
                let facts = kernel.facts(cookie);
                kernel.state().namespaces.get_mut(&cookie).unwrap().facts.pop_last().unwrap();
                assert_ne!(kernel.facts(cookie), facts);
                if at_once {
                    pods.reconcile(uid).await;
                } else {
                    pods.check_drift(uid).await;
                }
                assert_eq!(kernel.facts(cookie), facts, "{uid}");
            }
        }
        // Reports, changes, GC.
        assert_eq!(pods.called("shop/7").await.len(), 1);
        assert!(pods.standing("7").await.unwrap().captured);
        let mut changed = wanted("7", "7", &[]);
        changed.settings.bypass_inbound = true;
        assert!(pods.update(&changed).await.unwrap());
        pods.collect(&[]).await;
        assert_eq!(pods.report().await.len(), PODS + 1, "an ADD in progress is no leftover");
        // Removal, also of a waiting pod.
        assert!(pods.forget("running").await.unwrap());
        pods.del(&attachment("0")).await.unwrap();
    };
    tokio::time::timeout(AT_ONCE, others).await.expect("nobody waits for them");
    assert!(kernel.facts(cookie).is_empty() && kernel.facts(namespaces[0].1).is_empty());
    assert_eq!(adds.iter().skip(1).filter(|add| add.is_finished()).count(), 0);

    let task = tokio::spawn(server.run(std::future::pending()));
    let proxy = tokio::spawn(acknowledge(path));
    for (number, add) in adds.into_iter().enumerate() {
        let ended = tokio::time::timeout(AT_ONCE, add).await.expect("in time").unwrap();
        match number {
            0 => assert!(matches!(ended, Err(Error::Proxy(AddError::Withdrawn { .. }))), "{ended:?}"),
            _ => ended.unwrap(),
        }
    }
    assert_eq!(states().filter(|phase| *phase == Phase::Done).count(), PODS - 1);
    let seven = pods
        .checkpoints
        .read()
        .unwrap()
        .into_iter()
        .find(|checkpoint| checkpoint.identity.uid == "7")
        .unwrap();
    assert!(seven.settings.bypass_inbound, "what was changed meanwhile stays");
    task.abort();
    proxy.abort();
}

#[tokio::test]
async fn an_add_that_fails_undoes_what_it_did_and_nothing_else() {
    for second in ["10.0.0.3", "fd00::3", "::ffff:10.0.0.3"] {
        let node = Node::start();
        let (netns, cookie) = node.netns("pod", &["10.0.0.2"]);
        let Node { kernel, pods, directory: _directory } = node;
        let pods = Arc::new(Pods { defaults: defaults(Duration::from_secs(2)), ..pods });
        let sandbox = Sandbox { netns: netns.clone(), containers: BTreeSet::new() };
        adopt(&pods, wanted("u", "a", &["10.0.0.2"]), sandbox).await;
        let add = tokio::spawn({
            let (pods, second) = (Arc::clone(&pods), wanted("u", "a", &[second]));
            async move { pods.add(attachment("2"), second, netns).await }
        });
        let address = second.parse::<IpAddr>().unwrap().to_canonical();
        let has_second = || kernel.facts(cookie).contains(&Fact::Address(address));
        until("it is captured", async || has_second()).await;
        let mut changed = wanted("u", "a", &["10.0.0.2"]);
        changed.settings.bypass_inbound = true;
        assert!(pods.update(&changed).await.unwrap());
        assert!(has_second(), "{second}");
        let error = add.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Proxy(AddError::NotConnected { .. })), "{error}");
        assert!(!has_second(), "{second}");
        assert!(!pods.ownership.containers().contains("2"), "{second}");
        let checkpoints = pods.checkpoints.read().unwrap();
        assert!(
            checkpoints[0].settings.bypass_inbound && checkpoints[0].attachments.is_empty(),
            "{checkpoints:?}"
        );
        assert_eq!(checkpoints[0].phase, Phase::Done);
    }
}

#[tokio::test]
async fn a_late_removal_of_the_sandbox_before_does_not_touch_the_one_after_it() {
    let node = Node::start();
    let (first, first_cookie) = node.netns("first", &[]);
    let (second, second_cookie) = node.netns("second", &[]);
    let server = Server::bind(&node.directory.path().join("acks.sock"), Options::default()).unwrap();
    let pods = Pods { proxies: server.1, defaults: defaults(Duration::from_secs(5)), ..node.pods };
    let task = tokio::spawn(server.0.run(std::future::pending()));
    let proxy = tokio::spawn(acknowledge(node.directory.path().join("acks.sock")));
    let captures = |cookie: u64| node.kernel.facts(cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)));
    pods.add(attachment("1"), wanted("u", "a", &["10.0.0.2"]), first).await.unwrap();
    assert!(captures(first_cookie));
    pods.add(attachment("2"), wanted("u", "a", &["10.0.0.2"]), second).await.unwrap();
    assert!(captures(second_cookie) && node.kernel.facts(first_cookie).is_empty());
    pods.del(&attachment("1")).await.unwrap();
    assert!(captures(second_cookie));
    pods.check(&attachment("2"), &parse(&["10.0.0.2"])).await.unwrap();
    assert!(matches!(pods.check(&attachment("1"), &[]).await, Err(Error::Unknown(_))));
    pods.collect(&[attachment("2")]).await;
    assert!(captures(second_cookie));
    pods.collect(&[]).await;
    assert!(node.kernel.facts(second_cookie).is_empty());
    assert!(pods.report().await.is_empty());
    task.abort();
    proxy.abort();
}

#[tokio::test]
async fn a_namespace_is_the_pods_that_was_brought_with_it_last() {
    let node = Node::start();
    let (old, old_cookie) = node.netns("old", &["10.0.0.2"]);
    let (new, new_cookie) = node.netns("new", &["10.0.0.2"]);
    let server = Server::bind(&node.directory.path().join("acks.sock"), Options::default()).unwrap();
    let pods = Pods { proxies: server.1, defaults: defaults(Duration::from_secs(5)), ..node.pods };
    let task = tokio::spawn(server.0.run(std::future::pending()));
    let proxy = tokio::spawn(acknowledge(node.directory.path().join("acks.sock")));
    let captures = |cookie: u64| node.kernel.facts(cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)));
    pods.add(attachment("1"), wanted("u", "a", &["10.0.0.2"]), old).await.unwrap();
    // The new pod's namespace replaces the old one at its path, and a drift check finds it before the new pod's ADD.
    std::fs::rename(node.directory.path().join("new"), node.directory.path().join("old")).unwrap();
    pods.check_drift("u").await;
    assert!(captures(new_cookie) && !captures(old_cookie));
    pods.add(attachment("2"), wanted("v", "b", &["10.0.0.2"]), new).await.unwrap();
    pods.check_drift("u").await;
    pods.del(&attachment("1")).await.unwrap();
    assert!(captures(new_cookie));
    pods.check(&attachment("2"), &parse(&["10.0.0.2"])).await.unwrap();
    pods.del(&attachment("2")).await.unwrap();
    assert!(node.kernel.facts(new_cookie).is_empty());
    task.abort();
    proxy.abort();
}

#[tokio::test]
async fn an_address_is_the_pods_that_was_brought_with_it_last() {
    for contested in ["10.0.0.2", "fd00::2", "::ffff:10.0.0.2"] {
        let node = Node::start();
        let running = async |name: &str, addresses: &[&str]| {
            let (netns, cookie) = node.netns(name, &["10.0.0.2", "fd00::2", "10.0.0.3"]);
            let sandbox = Sandbox { netns, containers: BTreeSet::new() };
            adopt(&node.pods, wanted(name, name, addresses), sandbox).await;
            cookie
        };
        let old = running("old", &[contested, "10.0.0.3"]).await;
        let new = running("new", &[contested]).await;
        let has = |cookie, address: &str| {
            let address = address.parse::<IpAddr>().unwrap().to_canonical();
            node.kernel.facts(cookie).contains(&Fact::Address(address))
        };
        // The first check finds that the address is gone.
        node.pods.check_drift("old").await;
        node.kernel.state().applied.clear();
        node.pods.check_drift("old").await;
        node.pods.check_drift("new").await;
        assert_eq!(node.kernel.state().applied, [], "{contested}");
        assert!(has(new, contested) && !has(old, contested) && has(old, "10.0.0.3"), "{contested}");
        let report = node.pods.report().await;
        let of_old = report.iter().find(|pod| pod.pod.name == "old").unwrap();
        assert_eq!(of_old.addresses, parse(&["10.0.0.3"]));

        assert!(node.pods.forget("new").await.unwrap());
        node.pods.check_drift("old").await;
        assert!(has(old, contested), "{contested}: nobody has it now");
    }
}

#[tokio::test]
async fn a_pod_that_is_being_worked_on_is_waited_for_when_it_is_called() {
    let node = Node::start();
    for name in ["a", "b"] {
        let (netns, _) = node.netns(name, &["10.0.0.2"]);
        let sandbox = Sandbox { netns, containers: BTreeSet::new() };
        adopt(&node.pods, wanted(name, name, &["10.0.0.2"]), sandbox).await;
    }
    let work = node.pods.slots.lock("a").await;
    let names =
        |reports: &[PodReport]| reports.iter().map(|report| report.pod.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&node.pods.called("shop/b").await), ["shop/b"], "another pod's work is not waited for");
    assert_eq!(names(&node.pods.report().await), ["shop/b"]);
    let (called, ()) = tokio::join!(node.pods.called("a"), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(work);
    });
    assert_eq!(names(&called), ["shop/a"]);
    assert!(node.pods.called("c").await.is_empty());
}

async fn acknowledge(path: std::path::PathBuf) {
    use redirect_zds::messages::{Ack, Hello, Response, WorkloadRequest, WorkloadResponse};
    use redirect_zds::packet;
    let socket = tokio_seqpacket::UnixSeqpacket::connect(path).await.unwrap();
    packet::send(&socket, &Hello { version: 1 }, None).await.unwrap();
    while let Ok(Some(_)) = packet::receive::<WorkloadRequest>(&socket).await {
        let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error: String::new() })) };
        packet::send(&socket, &response, None).await.unwrap();
    }
}
