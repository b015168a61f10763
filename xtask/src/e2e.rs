//! `cargo xtask e2e`: image and chart on a real cluster, from installation to removal.

mod capturing;
mod cluster;
mod load;
mod report;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::helm;
use crate::image;
use crate::packages::Packages;
use crate::setup;
use crate::userspace;
use crate::workspace::Workspace;
use cluster::Cluster;
use load::Load;
use report::Report;

const SAMPLES: &str = "redirect-samples";
const RELEASE: &str = "ambient-redirect";

/// Which cluster, and what to install.
#[derive(Args)]
pub(crate) struct Options {
    /// How to reach the cluster; as kubectl finds it by default.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// An image that the nodes have or can pull. By default one is built and given to `--load`.
    #[arg(long, value_name = "NAME:TAG", requires = "next_image")]
    image: Option<String>,
    /// The image to upgrade to.
    #[arg(long, value_name = "NAME:TAG", requires = "image")]
    next_image: Option<String>,
    /// The command that puts an image on every node; the archive's path is appended.
    #[arg(long, value_name = "COMMAND", default_value = "kind load image-archive")]
    load: String,
    /// A busybox that the nodes have or can pull, for the samples.
    #[arg(long, value_name = "NAME:TAG", default_value = "busybox:1.36")]
    busybox: String,
    /// The cluster has a node proxy, such as ztunnel: the embedded one is not installed.
    #[arg(long)]
    with_proxy: bool,
    /// The namespace to install into.
    #[arg(long, default_value = "ambient-redirect")]
    namespace: String,
    /// More values of the chart, as helm's `--set`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<OsString>,
    /// Leaves everything as it is when something fails, to be looked at.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn e2e(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    let tools = helm::ensure(workspace, &Packages::new(workspace))?;
    let cluster = Cluster::new(workspace, tools, options.kubeconfig.clone(), &options.namespace);
    let mut report = Report::default();
    let result = run(workspace, options, &cluster, &mut report);
    if result.is_err() {
        cluster.diagnose();
        if !options.keep {
            report.step("cleaned up after the failure", || clean_up(&cluster)).ok();
        }
    }
    print!("\n{report}");
    Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(workspace: &Workspace, options: &Options, cluster: &Cluster<'_>, report: &mut Report) -> Result<()> {
    report.step("cluster", || cluster.describe())?;
    report.step("nothing of ours before", || is_vacant(cluster))?;
    let images = report.value("images on the nodes", || images(workspace, options))?;

    report.step("helm install", || install(cluster, options, &images[0]))?;
    report.step("samples", || samples(cluster, options))?;
    report.step("greetings", || capturing::greetings(cluster, capturing::Captured::Yes))?;
    if !options.with_proxy {
        report.step("all through the proxy but probes", || capturing::passed_the_proxy(cluster))?;
    }
    report.step("what redirect pod says", || capturing::in_the_kernel(cluster))?;
    let before = cluster.vitals(SAMPLES)?;
    report.step("helm upgrade under load", || {
        let load = Load::start(cluster)?;
        let upgraded = install(cluster, options, &images[1]);
        let load = load.finish()?;
        Ok(format!("{}; {load}", upgraded?))
    })?;
    report.step("greetings after the upgrade", || capturing::greetings(cluster, capturing::Captured::Yes))?;
    report.step("probes stayed green", || {
        let after = cluster.vitals(SAMPLES)?;
        ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
        Ok(format!("{} pods, none restarted or unready for a moment", after.len()))
    })?;
    report.step("pods started after the upgrade", || {
        cluster.restart(SAMPLES)?;
        capturing::greetings(cluster, capturing::Captured::Yes)
    })?;

    let daemonset = cluster.get(&options.namespace, &format!("daemonset/{RELEASE}"))?;
    report.step("helm uninstall", || uninstall(cluster, &options.namespace))?;
    report.step("greetings without us", || capturing::greetings(cluster, capturing::Captured::No))?;
    report.step("nothing left on the nodes", || left_on_nodes(cluster, &daemonset))?;
    report.step("pods started without us", || {
        cluster.restart(SAMPLES)?;
        capturing::greetings(cluster, capturing::Captured::No)
    })?;
    report.step("nothing left in the cluster", || {
        cluster.delete_namespaces(&[SAMPLES, &options.namespace])?;
        is_vacant(cluster)
    })
}

/// The image to install, and the one to upgrade to.
fn images(workspace: &Workspace, options: &Options) -> Result<([String; 2], String)> {
    if let (Some(image), Some(next)) = (&options.image, &options.next_image) {
        return Ok(([image.clone(), next.clone()], format!("{image}, then {next}")));
    }
    let programs = userspace::build(workspace, &setup::kernel_side(workspace)?, &[])?;
    let name = image::default_name();
    let next = format!("{name}-next");
    for name in [&next, &name] {
        let (_, archive) = image::write(workspace, &programs, name)?;
        let mut words = options.load.split_whitespace();
        let mut load = workspace.command(words.next().context("--load is empty")?);
        let output = load.args(words).arg(&archive).output();
        let output = output.with_context(|| format!("cannot run `{}`", options.load))?;
        ensure!(output.status.success(), "{}: {}", options.load, String::from_utf8_lossy(&output.stderr));
    }
    let told = format!("{name} and {next}, by `{}`", options.load);
    Ok(([name, next], told))
}

fn install(cluster: &Cluster<'_>, options: &Options, image: &str) -> Result<String> {
    let (repository, tag) = image.rsplit_once(':').with_context(|| format!("{image} has no tag"))?;
    let mut helm = cluster.helm();
    helm.args(["upgrade", "--install", RELEASE, "deploy/chart", "--create-namespace"]);
    helm.args(["--wait", "--timeout", "3m", "--set"]);
    helm.arg(format!("image.repository={repository},image.tag={tag}"));
    if !options.with_proxy {
        helm.args(["--set", "proxy.enabled=true,proxy.accessLog=true"]);
    }
    for value in &options.set {
        helm.arg("--set").arg(value);
    }
    cluster::output(&mut helm)?;
    let agents = cluster.agents()?;
    for agent in &agents {
        let found = agent["spec"]["containers"][0]["image"].as_str();
        ensure!(found == Some(image), "the agent of {} runs {found:?}", agent["spec"]["nodeName"]);
    }
    Ok(format!("{image} is ready on {} nodes", agents.len()))
}

fn samples(cluster: &Cluster<'_>, options: &Options) -> Result<String> {
    for file in ["deploy/samples/sleep.yaml", "deploy/samples/tcp-echo.yaml"] {
        let text = std::fs::read_to_string(cluster.workspace().root(file)).context(file)?;
        cluster.apply(&text.replace("busybox:1.36", &options.busybox))?;
    }
    cluster.rolled_out(SAMPLES)?;
    let pods = cluster.vitals(SAMPLES)?.len();
    Ok(format!("{pods} pods are ready"))
}

fn uninstall(cluster: &Cluster<'_>, namespace: &str) -> Result<String> {
    let mut helm = cluster.helm();
    cluster::output(helm.args(["uninstall", RELEASE, "--wait", "--timeout", "3m"]))?;
    cluster.until_gone(namespace)?;
    Ok("no pod of ours runs".into())
}

/// Runs the removal tools with the agent's permissions on every node where it ran, and returns what they
/// still find.
fn left_on_nodes(cluster: &Cluster<'_>, daemonset: &Value) -> Result<String> {
    let template = &daemonset["spec"]["template"]["spec"];
    let agent = &template["containers"][0];
    let chain: Vec<&Value> = agent["args"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|argument| {
            ["--cni-conf-dir=", "--cni-bin-dir="]
                .iter()
                .any(|known| argument.as_str().is_some_and(|text| text.starts_with(known)))
        })
        .collect();
    let nodes = cluster.nodes()?;
    for node in &nodes {
        let container = |name: &str, arguments: Vec<Value>| {
            let mut container = agent.clone();
            container["name"] = name.into();
            container["args"] = arguments.into();
            for probe in ["readinessProbe", "livenessProbe", "startupProbe", "ports"] {
                container.as_object_mut().map(|fields| fields.remove(probe));
            }
            container
        };
        let uninstall = container("uninstall", vec!["uninstall".into()]);
        let mut remove = vec!["install".into(), "--remove".into()];
        remove.extend(chain.iter().copied().cloned());
        let mut spec = template.clone();
        spec["containers"] = vec![uninstall, container("remove", remove)].into();
        spec["restartPolicy"] = "Never".into();
        spec["nodeName"] = node.as_str().into();
        for field in ["serviceAccountName", "serviceAccount", "initContainers"] {
            spec.as_object_mut().map(|fields| fields.remove(field));
        }
        let name = format!("left-on-{node}");
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": {"istio.io/dataplane-mode": "none"}}, "spec": spec,
        });
        cluster.apply_in_namespace(&pod.to_string())?;
        cluster.until_ended(&name)?;
        let found = [cluster.logs(&name, "uninstall")?, cluster.logs(&name, "remove")?];
        cluster.delete_pod(&name)?;
        if found[0].trim() != "nothing to remove" || !found[1].trim().is_empty() {
            bail!("{node} had something left: {}", found.join("\n"));
        }
    }
    Ok(format!("redirect uninstall and redirect install --remove find nothing on {}", nodes.join(", ")))
}

fn is_vacant(cluster: &Cluster<'_>) -> Result<String> {
    let kinds = "clusterroles,clusterrolebindings,daemonsets,namespaces";
    let found = cluster.everywhere(kinds, "app.kubernetes.io/name=ambient-redirect")?;
    ensure!(found.is_empty(), "there are {}: helm uninstall first", found.join(", "));
    Ok("no object with our label".into())
}

fn clean_up(cluster: &Cluster<'_>) -> Result<String> {
    cluster::output(cluster.helm().args([
        "uninstall",
        RELEASE,
        "--ignore-not-found",
        "--wait",
        "--timeout",
        "2m",
    ]))?;
    cluster.delete_namespaces(&[SAMPLES, cluster.namespace()])?;
    Ok("release and namespaces are gone".into())
}
