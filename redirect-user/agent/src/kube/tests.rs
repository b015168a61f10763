//! The controller against doubles of the API server, the kernel, the proxy and `/proc`; the rest is real.

mod admission;
mod controller;
mod faults;
mod proxy;
mod real;
mod requests;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::informer::Patience;
use super::{Controller, Rate, Rules, Timing, client, client_at};
use crate::checkpoints::Checkpoints;
use crate::pods::Defaults;
use crate::pods::Pods;
use proxy::Proxy;
use redirect_datapath::datapath::fake::Fake;
use redirect_datapath::facts::Fact;
use redirect_datapath::handle::DatapathHandle;
use redirect_linux::netns::NetNs;
use redirect_testing::ApiServer;
use redirect_zds::server::{Options, Server};

const NODE: &str = "node-1";
/// Long enough for anything expected to happen.
const LONG: Duration = Duration::from_secs(10);
/// Long enough to conclude that something does not happen.
const SHORT: Duration = Duration::from_millis(150);
/// The addresses of the three kinds of pods.
const KINDS: [&[&str]; 3] = [&["10.0.0.2", "fd00::2"], &["10.0.0.2"], &["fd00::2"]];

fn quick() -> Timing {
    Timing {
        patience: Duration::from_millis(60),
        admission: Duration::from_millis(500),
        resync: Duration::from_secs(60),
        poll: Duration::from_millis(20),
        events: Duration::from_millis(50),
        api: Patience {
            first_pause: Duration::from_millis(20),
            longest_pause: Duration::from_millis(100),
            list: Duration::from_millis(300),
        },
    }
}

/// A node and its API server.
struct Node {
    directory: TempDir,
    api: ApiServer,
    kernel: Fake,
    pods: Arc<Pods<Fake>>,
    controller: Arc<Controller<Fake>>,
    next_pid: AtomicU32,
    stop: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
    _zds: oneshot::Sender<()>,
}

impl Node {
    /// With a namespace `shop` without a label.
    async fn start() -> Self {
        Self::start_with(quick(), |_| {}).await
    }

    async fn start_with(timing: Timing, prepare: impl FnOnce(&ApiServer)) -> Self {
        let api = ApiServer::start().await;
        api.put_namespace("shop", json!({}));
        prepare(&api);
        let config = kube::Config::new(format!("http://{}", api.address).parse().unwrap());
        Self::assemble(timing, config, api)
    }

    fn assemble(timing: Timing, config: kube::Config, api: ApiServer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = Fake::default();
        let copy = kernel.clone();
        let (thread, _) = DatapathHandle::start(move || Ok::<_, std::convert::Infallible>(copy)).unwrap();
        let (server, handle) = Server::bind(&directory.path().join("zds.sock"), Options::default()).unwrap();
        let (zds, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        let host = make_netns(&directory.path().join("proc/1/ns/net"));
        fs::write(directory.path().join("proc/1/cgroup"), "0::/init.scope\n").unwrap();
        let pods = Arc::new(Pods::new(
            thread,
            handle,
            Defaults { proxy_deadline: LONG, dns: false, any_source: false },
            host.inode().unwrap(),
            None,
            Checkpoints::open(&directory.path().join("state")).unwrap(),
        ));
        let rules = Rules { excluded: ["kube-system".to_owned()].into(), ..Rules::default() };
        let proc = directory.path().join("proc");
        let client = client_at(Rate { requests: 10_000, period: Duration::from_secs(1) }, config).unwrap();
        let controller = Controller::new(client, NODE.into(), rules, proc, Arc::clone(&pods), timing);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(Arc::clone(&controller).run(stopped));
        let next_pid = AtomicU32::new(100);
        Self { directory, api, kernel, pods, controller, next_pid, stop, task, _zds: zds }
    }

    async fn proxy(&self) -> Proxy {
        Proxy::connect(&self.directory.path().join("zds.sock")).await
    }

    async fn proxy_that_refuses(&self, uids: BTreeSet<String>) -> Proxy {
        Proxy::connect_refusing(&self.directory.path().join("zds.sock"), uids).await
    }

    /// Runs a process of a pod in a namespace with these addresses. Returns the namespace's cookie.
    fn run_sandbox(&self, uid: &str, addresses: &[&str]) -> u64 {
        self.run_process(uid, &"c".repeat(64), addresses).1
    }

    fn run_process(&self, uid: &str, container: &str, addresses: &[&str]) -> (PathBuf, u64) {
        let pid = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let directory = self.directory.path().join(format!("proc/{pid}"));
        let netns = make_netns(&directory.join("ns/net"));
        let shape = "0::/kubepods/burstable/pod{u}/{i}\n";
        let cgroup = super::process_cgroup::tests::fill(shape, uid, container);
        fs::write(directory.join("cgroup"), cgroup).unwrap();
        let cookie = netns.inode().unwrap();
        self.kernel.insert(cookie, &parse(addresses));
        (directory, cookie)
    }

    /// A namespace without processes, as the CNI plugin passes it.
    fn new_netns(&self, addresses: &[&str]) -> (NetNs, u64) {
        let number = self.next_pid.fetch_add(1, Ordering::Relaxed);
        let netns = make_netns(&self.directory.path().join(format!("netns/{number}")));
        let cookie = netns.inode().unwrap();
        self.kernel.insert(cookie, &parse(addresses));
        (netns, cookie)
    }

    /// Whether exactly these addresses are captured in the namespace; none: no facts are left there.
    fn captures(&self, cookie: u64, addresses: &[&str]) -> bool {
        let facts = self.kernel.facts(cookie);
        let captured: BTreeSet<IpAddr> = facts
            .iter()
            .filter_map(|fact| if let Fact::Address(address) = fact { Some(*address) } else { None })
            .collect();
        let complete = facts.iter().any(|fact| matches!(fact, Fact::Pod(_)));
        captured == parse(addresses).into_iter().collect()
            && complete != facts.is_empty()
            && (complete || addresses.is_empty())
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap().unwrap();
        self.pods.shut_down().await;
    }
}

fn make_netns(path: &std::path::Path) -> NetNs {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "").unwrap();
    NetNs::open(path).unwrap()
}

fn parse(addresses: &[&str]) -> Vec<IpAddr> {
    addresses.iter().map(|text| text.parse().unwrap()).collect()
}

/// Imitates a Kubernetes UID.
fn uid(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// A pod of the node in the namespace `shop`, running.
fn pod(number: u32, mode: Option<&str>, addresses: &[&str]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{number}"), "namespace": "shop", "uid": uid(number),
            "labels": mode.map(|mode| json!({"istio.io/dataplane-mode": mode})).unwrap_or(json!({})),
        },
        "spec": {"nodeName": NODE, "serviceAccountName": "cart", "containers": []},
        "status": {"phase": "Running", "podIPs": ips},
    })
}

fn label(mode: Option<&str>) -> Value {
    json!({"metadata": {"labels": {"istio.io/dataplane-mode": mode}}})
}

fn annotation(key: &str, value: Option<&str>) -> Value {
    json!({"metadata": {"annotations": {key: value}}})
}

/// Waits until the condition holds.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "did not happen: {what}");
}
