//! A Kubernetes API server for the agent of a node: a double, in the node's namespace.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use redirect_testing::ApiServer;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::node::{Node, NodeOptions};
use crate::pod::Pod;
use crate::session::Session;

const NODE: &str = "node-1";

/// A node whose agent works with Kubernetes, and the API server.
#[derive(Debug)]
pub struct Cluster {
    // Before the runtime, in which it runs.
    api: ApiServer,
    node: Arc<Node>,
    _runtime: Runtime,
}

impl Cluster {
    /// Starts both, and a proxy. The agent gets these arguments besides.
    pub fn start(session: &Arc<Session>, arguments: &[&str]) -> Result<Self> {
        let cluster = Self::without_agent(session)?;
        cluster.start_agent(arguments)?;
        cluster.node.start_proxy()?;
        Ok(cluster)
    }

    /// Starts a node without agent and proxy, and the API server.
    pub fn without_agent(session: &Arc<Session>) -> Result<Self> {
        Self::without_agent_on(session, NodeOptions::default())
    }

    /// The same on a node that is made with these options.
    pub fn without_agent_on(session: &Arc<Session>, options: NodeOptions) -> Result<Self> {
        let node = Node::with(session, NodeOptions { agent: false, proxy: false, ..options })?;
        let listener = node.netns().run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let api = {
            let _entered = runtime.enter();
            ApiServer::serve(tokio::net::TcpListener::from_std(listener)?)
        };
        let cluster = Self { api, node, _runtime: runtime };
        cluster.api.put_namespace("default", json!({"istio.io/dataplane-mode": "ambient"}));
        Ok(cluster)
    }

    /// The API server.
    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Adds a pod with these annotations to the API server, in its state before its sandbox is set up. Enrolling it is the
    /// CNI plugin's task.
    pub fn announce(&self, pod: &Pod, annotations: &[(&str, &str)]) {
        let annotations: Value =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
        let identity = pod.identity();
        self.api.put_pod(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": identity.name, "namespace": identity.namespace, "uid": identity.uid,
                "annotations": annotations,
            },
            // Without a service account: a ztunnel without a control plane only knows such pods.
            "spec": {"nodeName": NODE, "containers": []},
            "status": {"phase": "Pending"},
        }));
    }

    /// Adds a running pod with these labels to the API server.
    pub fn announce_running(&self, pod: &Pod, labels: &[(&str, &str)]) {
        self.announce_annotated(pod, labels, &[]);
    }

    /// [`Self::announce_running`] with annotations.
    pub fn announce_annotated(&self, pod: &Pod, labels: &[(&str, &str)], annotations: &[(&str, &str)]) {
        let map = |pairs: &[(&str, &str)]| -> Value {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect()
        };
        let (labels, annotations) = (map(labels), map(annotations));
        let ips: Vec<Value> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
        let identity = pod.identity();
        self.api.put_pod(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": identity.name, "namespace": identity.namespace, "uid": identity.uid, "labels": labels,
                "annotations": annotations,
            },
            "spec": {"nodeName": NODE, "containers": []},
            "status": {"phase": "Running", "podIPs": ips},
        }));
    }

    /// The value of the pod's annotation.
    #[must_use]
    pub fn redirection(&self, pod: &Pod) -> Option<String> {
        self.api.redirection(&pod.identity().namespace, &pod.identity().name)
    }

    /// Starts the agent, or starts it again, with these arguments besides.
    pub fn start_agent(&self, arguments: &[&str]) -> Result<()> {
        self.node.start_agent(&self.arguments(arguments)?)
    }

    /// As [`Self::start_agent`], without waiting until it is ready.
    pub fn begin_agent(&self, arguments: &[&str]) -> Result<()> {
        self.node.begin_agent(&self.arguments(arguments)?)
    }

    fn arguments(&self, more: &[&str]) -> Result<Vec<String>> {
        let kubeconfig = self.kubeconfig()?.display().to_string();
        let own = ["--kubernetes", "--node-name", NODE, "--kubeconfig", &kubeconfig];
        Ok(own.iter().chain(more).map(ToString::to_string).collect())
    }

    /// The notes of the events about a pod.
    #[must_use]
    pub fn events(&self, pod: &Pod) -> Vec<String> {
        let world = self.api.world();
        let about = world.events.iter().filter(|event| event["regarding"]["uid"] == pod.identity().uid);
        about.filter_map(|event| event["note"].as_str().map(str::to_owned)).collect()
    }

    fn kubeconfig(&self) -> Result<PathBuf> {
        let path = self.node.dir().join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": format!("http://{}", self.api.address)}}],
            "users": [{"name": "double", "user": {}}],
            "contexts": [{"name": "double", "context": {"cluster": "double", "user": "double"}}],
        });
        std::fs::write(&path, text.to_string())?;
        Ok(path)
    }
}
