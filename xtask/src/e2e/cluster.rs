//! A cluster, through kubectl and helm.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::helm::Tools;
use crate::progress;
use crate::workspace::Workspace;

/// The deadline for any operation on a busy cluster.
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) struct Cluster<'a> {
    workspace: &'a Workspace,
    tools: Tools,
    kubeconfig: Option<PathBuf>,
    /// Where our own pods are.
    namespace: String,
}

/// Whether a pod is ready and since when, and how often its containers were restarted.
pub(super) type Vitals = BTreeMap<String, (String, String, u64)>;

impl<'a> Cluster<'a> {
    pub(super) fn new(
        workspace: &'a Workspace,
        tools: Tools,
        kubeconfig: Option<PathBuf>,
        namespace: &str,
    ) -> Self {
        Self { workspace, tools, kubeconfig, namespace: namespace.to_owned() }
    }

    pub(super) fn workspace(&self) -> &Workspace {
        self.workspace
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    fn command(&self, program: &std::path::Path) -> Command {
        let mut command = self.workspace.command(program);
        if let Some(path) = &self.kubeconfig {
            command.env("KUBECONFIG", path);
        }
        command
    }

    pub(super) fn kubectl(&self) -> Command {
        self.command(&self.tools.kubectl)
    }

    /// For the release's namespace.
    pub(super) fn helm(&self) -> Command {
        let mut helm = self.command(&self.tools.helm);
        helm.args(["--namespace", &self.namespace]);
        helm
    }

    /// A script of this repository that calls kubectl.
    pub(super) fn script(&self, path: &str) -> Command {
        let mut script = self.command(&self.workspace.root(path));
        script.env("KUBECTL", &self.tools.kubectl);
        script
    }

    pub(super) fn describe(&self) -> Result<String> {
        let version: Value = serde_json::from_str(&output(self.kubectl().args(["version", "-o", "json"]))?)?;
        let nodes = self.items(&["get", "nodes"])?;
        let info = |key: &str| {
            let mut values: Vec<&str> =
                nodes.iter().filter_map(|node| node["status"]["nodeInfo"][key].as_str()).collect();
            values.sort_unstable();
            values.dedup();
            values.join(", ")
        };
        ensure!(!nodes.is_empty(), "the cluster has no nodes");
        let server = version["serverVersion"]["gitVersion"].as_str().unwrap_or("?");
        Ok(format!(
            "Kubernetes {server}, {} nodes, kernel {}, {}",
            nodes.len(),
            info("kernelVersion"),
            info("containerRuntimeVersion")
        ))
    }

    fn items(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let mut kubectl = self.kubectl();
        let mut list: Value = serde_json::from_str(&output(kubectl.args(arguments).args(["-o", "json"]))?)?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => bail!("kubectl {}: no list", arguments.join(" ")),
        }
    }

    pub(super) fn list(&self, namespace: &str, kind: &str) -> Result<Vec<Value>> {
        self.items(&["get", kind, "-n", namespace])
    }

    pub(super) fn get(&self, namespace: &str, object: &str) -> Result<Value> {
        let text = output(self.kubectl().args(["get", object, "-n", namespace, "-o", "json"]))?;
        Ok(serde_json::from_str(&text)?)
    }

    pub(super) fn everywhere(&self, kinds: &str, label: &str) -> Result<Vec<String>> {
        let items = self.items(&["get", kinds, "-A", "-l", label])?;
        Ok(items.iter().map(|item| format!("{} {}", item["kind"], item["metadata"]["name"])).collect())
    }

    /// Pods that are not being deleted.
    pub(super) fn pods(&self, namespace: &str, label: &str) -> Result<Vec<Value>> {
        let mut pods = self.items(&["get", "pods", "-n", namespace, "-l", label])?;
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(pods)
    }

    pub(super) fn names(&self, namespace: &str, label: &str) -> Result<Vec<String>> {
        let pods = self.pods(namespace, label)?;
        Ok(pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
    }

    /// The agent's pods, one on each node.
    pub(super) fn agents(&self) -> Result<Vec<Value>> {
        let agents = self.pods(&self.namespace, "app.kubernetes.io/name=ambient-redirect")?;
        ensure!(!agents.is_empty(), "no agent runs");
        Ok(agents)
    }

    /// The output of `redirect` in an agent's pod.
    pub(super) fn redirect(&self, agent: &Value, arguments: &[&str]) -> Result<String> {
        let name = agent["metadata"]["name"].as_str().context("a name")?;
        let mut exec = self.kubectl();
        exec.args(["exec", "-n", &self.namespace, name, "-c", "agent", "--", "/redirect"]).args(arguments);
        output(&mut exec)
    }

    pub(super) fn nodes(&self) -> Result<Vec<String>> {
        let nodes = self.items(&["get", "nodes"])?;
        Ok(nodes.iter().filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned)).collect())
    }

    pub(super) fn vitals(&self, namespace: &str) -> Result<Vitals> {
        let mut vitals = Vitals::new();
        for pod in self.pods(namespace, "")? {
            let status = &pod["status"];
            let conditions = status["conditions"].as_array().into_iter().flatten();
            let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready");
            let ready = ready.cloned().unwrap_or_default();
            let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
            let restarts = status["containerStatuses"].as_array().into_iter().flatten();
            let restarts = restarts.filter_map(|container| container["restartCount"].as_u64()).sum();
            let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            vitals.insert(name, (text("status"), text("lastTransitionTime"), restarts));
        }
        ensure!(!vitals.is_empty(), "no pods in {namespace}");
        Ok(vitals)
    }

    pub(super) fn apply(&self, objects: &str) -> Result<()> {
        self.with_input(&["apply", "-f", "-"], objects)
    }

    pub(super) fn apply_in_namespace(&self, object: &str) -> Result<()> {
        self.with_input(&["apply", "-n", &self.namespace, "-f", "-"], object)
    }

    fn with_input(&self, arguments: &[&str], input: &str) -> Result<()> {
        let mut kubectl = self.kubectl();
        kubectl.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = kubectl.spawn().context("cannot run kubectl")?;
        child.stdin.take().context("kubectl's input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    pub(super) fn rolled_out(&self, namespace: &str) -> Result<()> {
        let mut kubectl = self.kubectl();
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        output(kubectl.args(["rollout", "status", "deployment", "-n", namespace, &timeout])).map(drop)
    }

    /// Replaces every pod of the namespace's Deployments.
    pub(super) fn restart(&self, namespace: &str) -> Result<()> {
        output(self.kubectl().args(["rollout", "restart", "deployment", "-n", namespace]))?;
        self.rolled_out(namespace)
    }

    pub(super) fn logs(&self, pod: &str, container: &str) -> Result<String> {
        output(self.kubectl().args(["logs", "-n", &self.namespace, pod, "-c", container]))
    }

    pub(super) fn until_ended(&self, pod: &str) -> Result<()> {
        wait(&format!("{pod} to end"), || {
            let pod = self.get(&self.namespace, &format!("pod/{pod}"))?;
            Ok(matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")))
        })
    }

    pub(super) fn delete_pod(&self, pod: &str) -> Result<()> {
        output(self.kubectl().args(["delete", "pod", "-n", &self.namespace, pod])).map(drop)
    }

    pub(super) fn until_gone(&self, namespace: &str) -> Result<()> {
        wait("our pods to go", || Ok(self.list(namespace, "pods")?.is_empty()))
    }

    pub(super) fn delete_namespaces(&self, namespaces: &[&str]) -> Result<()> {
        let mut kubectl = self.kubectl();
        kubectl.args(["delete", "namespace", "--ignore-not-found", "--timeout=180s"]).args(namespaces);
        output(&mut kubectl).map(drop)
    }

    /// Prints information that helps to diagnose a failure.
    pub(super) fn diagnose(&self) {
        let ours = ["-n", &self.namespace];
        for arguments in [
            &["get", "pods", "-A", "-o", "wide"][..],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &["describe", "pods", ours[0], ours[1]],
            &[
                "logs",
                ours[0],
                ours[1],
                "-l",
                "app.kubernetes.io/name=ambient-redirect",
                "--tail=40",
                "--prefix",
            ],
            &[
                "logs",
                ours[0],
                ours[1],
                "-l",
                "app.kubernetes.io/name=ambient-redirect-proxy",
                "--tail=20",
                "--prefix",
            ],
        ] {
            let said = output(self.kubectl().args(arguments)).unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<&str> = said.lines().collect();
            progress::say(&format!("\n== kubectl {}", arguments.join(" ")));
            lines[lines.len().saturating_sub(30)..].iter().for_each(|line| progress::say(line));
        }
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !done()? {
        ensure!(started.elapsed() < PATIENCE, "waited {} s for {what}", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// The output of a command.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}{}", command.get_program().display(), stdout, stderr.trim());
    }
    Ok(stdout)
}
