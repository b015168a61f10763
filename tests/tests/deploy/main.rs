//! The deployment: the chart as Helm renders it for every platform, and the plain manifests, against Kubernetes' own
//! types. Needs helm and kubectl, which `cargo xtask setup` puts below target/tools; without them the tests are skipped,
//! visibly; with `REDIRECT_E2E=require` they fail instead.

mod objects;
mod package;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use redirect_linux::privileges::{AGENT, Capability, PROXY};
use serde_json::Value;

const PLATFORMS: [&str; 10] =
    ["", "aks", "eks", "gke", "k3d", "k3s", "kind", "microk8s", "minikube", "openshift"];

fn main() -> ExitCode {
    let mut trials = vec![
        trial("chart::everything_on", everything_on),
        trial("chart::wrong_values_are_refused", wrong_values_are_refused),
        trial("chart::rights_are_minimal", rights_are_minimal),
        trial("chart::rollouts_keep_pace_with_the_cluster", rollouts),
        trial("manifests::are_valid", manifests_are_valid),
        trial("samples::are_valid", samples_are_valid),
        trial("objects::unknown_fields_are_found", unknown_fields_are_found),
        trial("package::contents", package::contents),
        trial("package::installs_and_goes", package::installs_and_goes),
    ];
    for platform in PLATFORMS {
        let name = if platform.is_empty() { "default" } else { platform };
        trials.push(trial(format!("chart::platform::{name}"), move || on_platform(platform)));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: impl Into<String>, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if !tool("helm").exists() {
            let reason = "needs helm and kubectl: cargo xtask setup";
            if std::env::var("REDIRECT_E2E").is_ok_and(|value| value == "require") {
                return Err(Failed::from(reason));
            }
            return Ok(Completion::ignored_with(reason));
        }
        test().map_err(|error| Failed::from(format!("{error:#}")))?;
        Ok(Completion::Completed)
    })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository")
}

fn tool(name: &str) -> PathBuf {
    root().join("target/tools/kubernetes").join(name)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.current_dir(root()).output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The chart's objects with these values; all must be valid.
fn render(values: &[&str]) -> Result<Vec<Value>> {
    let mut helm = Command::new(tool("helm"));
    helm.args(["template", "mesh", "deploy/chart", "--namespace", "mesh"]);
    for value in values {
        helm.args(["--set", value]);
    }
    objects::read(&run(&mut helm)?)
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Result<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind).with_context(|| format!("no {kind}"))
}

fn on_platform(platform: &str) -> Result<()> {
    let objects = render(&[&format!("platform={platform}")])?;
    let volumes = of_kind(&objects, "DaemonSet")?["spec"]["template"]["spec"]["volumes"].clone();
    let path = |name: &str| {
        let volume = volumes.as_array().into_iter().flatten().find(|volume| volume["name"] == name);
        volume.and_then(|volume| volume["hostPath"]["path"].as_str()).map(str::to_owned)
    };
    let (configurations, plugins) =
        (path("cni-conf").context("cni-conf")?, path("cni-bin").context("cni-bin")?);
    ensure!(configurations.starts_with('/') && plugins.starts_with('/'), "{volumes}");
    let usual = matches!(platform, "" | "aks" | "eks" | "kind" | "minikube");
    ensure!(usual == (plugins == "/opt/cni/bin"), "{platform}: {plugins}");
    let quota = objects.iter().any(|object| object["kind"] == "ResourceQuota");
    ensure!(quota == (platform == "gke"), "{platform}: quota {quota}");
    let container_nodes = matches!(platform, "k3d" | "kind" | "minikube");
    let mounts = path("sys-fs").is_some();
    ensure!(mounts == container_nodes, "{platform}: mounts a bpffs {mounts}");
    let sets = |value: &str| -> Result<bool> {
        let objects = render(&[&format!("platform={platform}"), &format!("mountBpffs={value}")])?;
        Ok(of_kind(&objects, "DaemonSet")?["spec"]["template"]["spec"]["initContainers"].is_array())
    };
    ensure!(sets("true")? && !sets("false")?, "{platform}: mountBpffs");
    Ok(())
}

fn everything_on() -> Result<()> {
    let objects = render(&[
        "podMonitor.enabled=true",
        "alerts.enabled=true",
        "alerts.labels.release=prometheus",
        "dashboard.enabled=true",
        "proxy.enabled=true",
        "proxy.accessLog=true",
        "metrics.port=15999",
        "health.port=15998",
        "mountBpffs=true",
        "networkPolicy.enabled=true",
        "resourceQuota=true",
        "cni.ownConf=true",
        "cni.timeout=7",
        "maxAddresses=9",
        "exclude.outboundNetworks={10.0.0.0/8,fd00::/8}",
        "exclude.inboundPorts={22,9100}",
        "exclude.namespaces={a,b}",
        "istioExclusions=true",
        "placement=node",
        "node.rulePriority=9",
        "node.sourceIpVerification=false",
        "node.proxyCgroups={/mesh}",
        "node.outboundProxyCgroups={/mesh/out}",
        "imagePullSecrets[0].name=secret",
        "seccompProfile.type=Localhost",
        "seccompProfile.localhostProfile=ambient-redirect.json",
        "podAnnotations.a=b",
        "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight=1",
        "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].preference.matchExpressions[0].key=k",
        "affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].preference.matchExpressions[0].operator=Exists",
    ])?;
    for kind in ["NetworkPolicy", "ResourceQuota"] {
        of_kind(&objects, kind)?;
    }
    monitoring(&objects)?;
    let proxy = daemonset(&objects, "mesh-proxy")?;
    let container = &proxy["spec"]["template"]["spec"]["containers"][0];
    ensure!(capabilities(container) == names(PROXY), "the proxy may do {:?}", capabilities(container));
    ensure!(proxy["spec"]["selector"] != daemonset(&objects, "mesh")?["spec"]["selector"], "selectors");
    let arguments = &daemonset(&objects, "mesh")?["spec"]["template"]["spec"]["containers"][0]["args"];
    let arguments: BTreeSet<&str> =
        arguments.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for wanted in [
        "--cni-own-conf",
        "--cni-timeout=7",
        "--max-addresses=9",
        "--exclude-outbound-networks=10.0.0.0/8,fd00::/8",
        "--exclude-inbound-ports=22,9100",
        "--exclude-namespaces=a,b",
        "--istio-exclusions",
        "--placement=node",
        "--rule-priority=9",
        "--source-ip-verification=false",
        "--proxy-cgroup=/sys/fs/cgroup/mesh",
        "--outbound-proxy-cgroup=/sys/fs/cgroup/mesh/out",
        "--cni-exclude-namespaces=kube-system,mesh",
        "--metrics-address=[::]:15999",
        "--health-address=127.0.0.1:15998",
    ] {
        ensure!(arguments.contains(wanted), "no {wanted} in {arguments:?}");
    }
    Ok(())
}

fn daemonset<'a>(objects: &'a [Value], name: &str) -> Result<&'a Value> {
    let found =
        objects.iter().find(|object| object["kind"] == "DaemonSet" && object["metadata"]["name"] == name);
    found.with_context(|| format!("no DaemonSet {name}"))
}

fn capabilities(container: &Value) -> BTreeSet<String> {
    let added = container["securityContext"]["capabilities"]["add"].as_array().into_iter().flatten();
    added.filter_map(Value::as_str).map(|name| format!("CAP_{name}")).collect()
}

fn names(capabilities: &[Capability]) -> BTreeSet<String> {
    capabilities.iter().map(ToString::to_string).collect()
}

/// The objects for Prometheus and Grafana contain the files, and refer to existing metrics.
fn monitoring(objects: &[Value]) -> Result<()> {
    let read = |file: &str| std::fs::read_to_string(root().join("deploy/chart/monitoring").join(file));
    let rule = of_kind(objects, "PrometheusRule")?;
    let alerts: Value = serde_saphyr::from_str(&read("alerts.yaml")?)?;
    ensure!(rule["spec"] == alerts, "alerts: {}", rule["spec"]);
    ensure!(rule["metadata"]["labels"]["release"] == "prometheus", "{}", rule["metadata"]);
    let config = of_kind(objects, "ConfigMap")?;
    ensure!(config["metadata"]["labels"]["grafana_dashboard"] == "1", "{}", config["metadata"]);
    let dashboard = config["data"]["ambient-redirect.json"].as_str().context("a dashboard")?;
    let (given, there): (Value, Value) =
        (serde_json::from_str(dashboard)?, serde_json::from_str(&read("dashboard.json")?)?);
    ensure!(given == there, "the dashboard is another one");

    let monitor = of_kind(objects, "PodMonitor")?;
    let agent = &daemonset(objects, "mesh")?["spec"]["template"];
    let port = &agent["spec"]["containers"][0]["ports"][0];
    ensure!(monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["name"], "{}", monitor["spec"]);
    ensure!(port["containerPort"] == 15999, "{port}");
    let labels = &agent["metadata"]["labels"];
    for (key, value) in monitor["spec"]["selector"]["matchLabels"].as_object().context("a selector")? {
        ensure!(labels[key] == *value, "{key} is {} of the agent's pods", labels[key]);
    }
    Ok(())
}

fn wrong_values_are_refused() -> Result<()> {
    for wrong in [
        "platform=mars",
        "withoutProxy=bypass",
        "placement=sidecar",
        "node.rulePriority=0",
        "cni.timeout=0",
        "cni.confDir=relative",
        "exclude.outboundPorts={65536}",
        "noSuchValue=1",
        "cni.noSuchValue=1",
        "seccompProfile.type=Localhost",
    ] {
        if render(&[wrong]).is_ok() {
            bail!("{wrong} is accepted");
        }
    }
    Ok(())
}

/// A rollout node by node would take hours in a cluster with thousands of them.
fn rollouts() -> Result<()> {
    let objects = render(&["proxy.enabled=true"])?;
    for (name, share) in [("mesh", "maxUnavailable"), ("mesh-proxy", "maxSurge")] {
        let strategy = &daemonset(&objects, name)?["spec"]["updateStrategy"]["rollingUpdate"];
        let is_share = strategy[share].as_str().is_some_and(|share| share.ends_with('%'));
        ensure!(is_share, "{name}: {strategy}");
    }
    Ok(())
}

/// A change that adds a permission must also change this list.
fn rights_are_minimal() -> Result<()> {
    let objects = render(&[])?;
    let rules = |kind: &str| -> Result<Vec<String>> {
        let rules = of_kind(&objects, kind)?["rules"].as_array().context("rules")?;
        let list = |rule: &Value, key: &str| {
            let words: Vec<_> =
                rule[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            words.join(",")
        };
        Ok(rules.iter().map(|rule| format!("{}: {}", list(rule, "resources"), list(rule, "verbs"))).collect())
    };
    ensure!(
        rules("ClusterRole")?
            == ["pods,namespaces: get,list,watch", "pods/status: patch", "events: create,patch"]
    );
    ensure!(rules("Role")? == ["daemonsets: get,list,watch"]);
    let container = &of_kind(&objects, "DaemonSet")?["spec"]["template"]["spec"]["containers"][0];
    let context = &container["securityContext"];
    ensure!(context["privileged"] == false && context["readOnlyRootFilesystem"] == true, "{context}");
    ensure!(context["capabilities"]["drop"] == serde_json::json!(["ALL"]), "{context}");
    let (added, kept) = (capabilities(container), names(AGENT));
    ensure!(added == kept, "the chart adds {added:?}, the agent keeps {kept:?}");
    Ok(())
}

fn manifests_are_valid() -> Result<()> {
    let objects =
        objects::read(&run(Command::new(tool("kubectl")).args(["kustomize", "deploy/manifests"]))?)?;
    of_kind(&objects, "Namespace")?;
    // The rest is the chart's, object for object.
    let mut helm = Command::new(tool("helm"));
    helm.args(["template", "ambient-redirect", "deploy/chart", "--namespace", "ambient-redirect"]);
    let rendered = objects::read(&run(&mut helm)?)?;
    let others: Vec<&Value> = objects.iter().filter(|object| object["kind"] != "Namespace").collect();
    ensure!(others.len() == rendered.len(), "{} objects instead of {}", others.len(), rendered.len());
    for object in &rendered {
        ensure!(
            others.contains(&object),
            "kustomize makes another {} {}",
            object["kind"],
            object["metadata"]["name"]
        );
    }
    Ok(())
}

fn samples_are_valid() -> Result<()> {
    let mut checked = 0;
    for entry in std::fs::read_dir(root().join("deploy/samples"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") && !path.ends_with("kind.yaml") {
            let found = objects::read(&std::fs::read_to_string(&path)?)
                .with_context(|| path.display().to_string())?;
            checked += found.len();
        }
    }
    ensure!(checked > 0, "no samples");
    Ok(())
}

fn unknown_fields_are_found() -> Result<()> {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  lables: {}\n";
    let error = objects::read(text).err().context("a misspelt field is accepted")?;
    ensure!(format!("{error:#}").contains("lables"), "{error:#}");
    Ok(())
}
