//! Containers of real runtimes, through the chain with the plugin: those of podman, where the agent is the DaemonSet's pod,
//! as a container with the security context, mounts and arguments from the chart; and those of containerd's `ctr --cni`.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::cgroup;
use redirect_tests::containerd::Containerd;
use redirect_tests::podman::{BUSYBOX, FIXED, Podman, options_of, seccomp};
use redirect_tests::process::Process;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Direction, Families, Node, NodeOptions, ProxyKind, Server, Stack};
use serde_json::Value;

use crate::context::{Context, trial_in_container};
use crate::install::Directories;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![
        trial_in_container(context, "container::captures_what_podman_starts", captures_with_either_profile),
        trial_in_container(context, "container::seccomp_profile_refuses_other_calls", refuses_other_calls),
        trial_in_container(context, "container::captures_what_ctr_starts", captures_ctr),
    ]
}

/// The additional requirements of these tests.
pub(crate) fn check() -> Result<()> {
    for path in [helm(), image()] {
        ensure!(path.exists(), "{} is missing: cargo xtask setup, cargo xtask image", path.display());
    }
    for runtime in ["podman", "containerd"] {
        let version = Command::new(runtime).arg("--version").output();
        ensure!(version.is_ok_and(|output| output.status.success()), "needs {runtime}: cargo xtask setup");
    }
    Ok(())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository")
}

fn helm() -> PathBuf {
    root().join("target/tools/kubernetes/helm")
}

fn image() -> PathBuf {
    std::env::var_os("REDIRECT_IMAGE")
        .map_or_else(|| root().join("target/image/ambient-redirect.tar"), PathBuf::from)
}

/// The files in deploy/ for the kubelet's directory of seccomp profiles.
fn profiles() -> PathBuf {
    root().join("deploy/seccomp")
}

const PROFILE: &str = "ambient-redirect.json";

fn daemonset(paths: &[(&str, &Path)], values: &[&str], image: &str) -> Result<Value> {
    let mut helm = Command::new(helm());
    helm.current_dir(root()).args(["template", "ambient-redirect", "deploy/chart"]);
    helm.args(["--namespace", "ambient-redirect", "--show-only", "templates/daemonset.yaml"]);
    for (key, path) in paths {
        helm.arg("--set").arg(format!("{key}={}", path.display()));
    }
    for value in values {
        helm.args(["--set", value]);
    }
    let (repository, tag) = image.rsplit_once(':').context("a tag")?;
    helm.args(["--set", &format!("image.repository={repository},image.tag={tag}")]);
    let output = helm.output()?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_saphyr::from_str(&String::from_utf8(output.stdout)?)?)
}

/// With the runtime's seccomp profile, and with ours.
fn captures_with_either_profile(context: &Context) -> Result<()> {
    captures(context, &["seccompProfile.type=RuntimeDefault"]).context("the runtime's profile")?;
    let ours = format!("seccompProfile.type=Localhost,seccompProfile.localhostProfile={PROFILE}");
    captures(context, &[&ours]).context("our profile")
}

/// The agent runs as the chart configures it with these values.
fn captures(context: &Context, values: &[&str]) -> Result<()> {
    context.needs(ProxyKind::Embedded, "a ztunnel knows no pod of podman's")?;
    let session = context.session()?;
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let directories = Directories::new(&node, Families::Dual)?;
    let podman = Podman::new(&node, &directories.configurations(), &directories.plugins())?;
    let image = podman.load(&image())?;
    podman.make_busybox()?;

    let (run, zds) = (node.dir().join("run"), node.dir().join("zds"));
    let daemonset = daemonset(
        &[
            ("cni.confDir", &directories.configurations()),
            ("cni.binDir", &directories.plugins()),
            ("runDirectory", &run),
            ("zds.directory", &zds),
        ],
        values,
        &image,
    )?;
    let (options, mut arguments) = options_of(&daemonset, &profiles())?;
    // There is no API server: every pod of the chain is enrolled.
    arguments.retain(|argument| argument != "--kubernetes");
    // Nothing may stay on this machine.
    let pins = session.pins().join("container");
    arguments.extend(["--on-exit=remove".to_owned(), format!("--pin-dir={}", pins.display())]);
    podman.start("agent", &words(&options), &image, &words(&arguments))?;
    let result = with_agent(&node, &podman, &directories, &zds, &daemonset);
    result.with_context(|| format!("log of the agent:\n{}", podman.logs("agent")))?;

    podman.stop("agent")?;
    let log = podman.logs("agent");
    ensure!(!pins.exists(), "the agent left pins behind\n{log}");
    ensure!(directories.is_chained(), "the chain is kept for the next agent");
    Ok(())
}

/// A system call that the runtime's profile allows is refused by ours.
fn refuses_other_calls(context: &Context) -> Result<()> {
    let session = context.session()?;
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let directories = Directories::new(&node, Families::Dual)?;
    let podman = Podman::new(&node, &directories.configurations(), &directories.plugins())?;
    podman.make_busybox()?;
    // It calls ioprio_get.
    let ionice = |options: &[&str]| {
        let command = [BUSYBOX, "/bin/busybox", "ionice", "-p", "1"];
        // As in the agent's container: without it, runtimes change users after applying the profile.
        let alike = ["run", "--rm", "--network=none", "--security-opt=no-new-privileges"];
        podman.run(&[&alike[..], &FIXED[..], options, &command].concat())
    };
    ionice(&[])?;
    let refused = ionice(&[&seccomp(&profiles().join(PROFILE))]).err().context("ioprio_get is allowed")?;
    let text = format!("{refused:#}");
    ensure!(text.contains("ioprio_get: Operation not permitted"), "{text}");
    Ok(())
}

fn words(strings: &[String]) -> Vec<&str> {
    strings.iter().map(String::as_str).collect()
}

fn with_agent(
    node: &Arc<Node>,
    podman: &Podman,
    directories: &Directories,
    zds: &Path,
    daemonset: &Value,
) -> Result<()> {
    wait::until_true("chain with the plugin", SOON, || Ok(directories.is_chained()))?;
    let (log, cgroup) =
        (node.dir().join("access.log"), node.session().cgroup().child("proxy-of-containers")?);
    let mut command = Command::new(&node.session().binaries().redirect);
    command.arg("proxy").arg("--zds-socket").arg(zds.join("ztunnel.sock")).arg("--access-log").arg(&log);
    command.args(["--drain", "0"]);
    let mut proxy = Process::spawn("proxy", command, node.netns(), &cgroup, &node.dir().join("proxy.log"))?;
    let pid = proxy.pid();
    proxy.wait_until("proxy in step with the agent", || {
        let status: Value =
            serde_json::from_str(&podman.run(&["exec", "agent", "/redirect", "status", "-o", "json"])?)?;
        let proxies = status["proxies"].as_array().cloned().unwrap_or_default();
        Ok(proxies.iter().any(|proxy| proxy["pid"] == pid && proxy["synced"] == true))
    })?;

    let network = format!("test-{}", Families::Dual.label());
    let option = format!("--network={network}");
    podman.start("pod", &[&option], BUSYBOX, &GREETER)?;
    let addresses = podman.addresses("pod", &network)?;
    passes_the_proxy(node, &addresses, |arguments| podman.busybox("pod", arguments).map(drop))?;
    podman.run(&["rm", "--force", "--time", "0", "pod"])?;
    let pods = podman.run(&["exec", "agent", "/redirect", "pods", "-o", "json"])?;
    ensure!(pods.trim() == "[]", "after DEL: {pods}");
    probes(node, daemonset)?;
    drop(proxy);
    fs::remove_file(log)?;
    Ok(())
}

/// The server in the containers.
const GREETER: [&str; 9] = ["/bin/busybox", "nc", "-ll", "-p", "9000", "-e", "/bin/busybox", "echo", "hello"];

/// Connections from and to the container pass the proxy, in every family and stack. `busybox` runs its busybox.
fn passes_the_proxy(
    node: &Arc<Node>,
    addresses: &[IpAddr],
    busybox: impl Fn(&[&str]) -> Result<()>,
) -> Result<()> {
    let other = node.plain("other", Families::Dual)?;
    for stack in Stack::ALL {
        // From the container.
        let server = Server::start(other.netns(), stack, 0, "other")?;
        let to = other.endpoint(stack.family(), server.port())?;
        let spelt = stack.spell(to);
        busybox(&["nc", "-w", "5", &spelt.ip().to_string(), &to.port().to_string()])?;
        passed(node, Direction::Outbound, stack.family(), to)?;
        // To the container.
        let to = SocketAddr::new(of_family(addresses, stack.family())?, 9000);
        let mut client = Command::new("/bin/busybox");
        client.args(["nc", "-w", "5", &to.ip().to_string(), "9000"]);
        let heard = other.netns().output(client, b"")?;
        ensure!(heard == b"hello\n", "heard {:?}", String::from_utf8_lossy(&heard));
        passed(node, Direction::Inbound, stack.family(), to)?;
    }
    Ok(())
}

/// The agent, as a process of the node, adds the plugin to the chain with which `ctr` starts containers, and captures them.
fn captures_ctr(context: &Context) -> Result<()> {
    context.needs(ProxyKind::Embedded, "a ztunnel knows no container of containerd's")?;
    let session = context.session()?;
    let node = Node::with(&session, NodeOptions { agent: false, proxy: false, ..NodeOptions::default() })?;
    let directories = Directories::new(&node, Families::Dual)?;
    // Containers are outside the tests' cgroup.
    let cgroup = ["--cgroup".to_owned(), cgroup::mount_point()?.display().to_string()];
    node.start_agent(&[&directories.agent_arguments()[..], &cgroup].concat())?;
    wait::until_true("chain with the plugin", SOON, || Ok(directories.is_chained()))?;
    node.start_proxy()?;

    let containerd = Containerd::start(&node, &directories.configurations(), &directories.plugins())?;
    let result = with_containerd(&node, &containerd);
    result.with_context(|| format!("log of containerd:\n{}", containerd.log()))
}

fn with_containerd(node: &Arc<Node>, containerd: &Containerd) -> Result<()> {
    let run = containerd.run("pod", &GREETER)?;
    let report = wait::until("the container among the pods", SOON, || Ok(node.reports()?.pop()))?;
    let addresses = report.addresses;
    passes_the_proxy(node, &addresses, |arguments| containerd.busybox("pod", arguments))?;
    containerd.end("pod", run)?;
    ensure!(node.reports()?.is_empty(), "after DEL: {:?}", node.reports()?);
    Ok(())
}

/// The kubelet's probes get answers, and they are positive.
fn probes(node: &Node, daemonset: &Value) -> Result<()> {
    let container = &daemonset["spec"]["template"]["spec"]["containers"][0];
    for probe in ["readinessProbe", "livenessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().context("a path")?;
        let mut client = Command::new("/bin/busybox");
        client.args(["wget", "-q", "-O", "-"]);
        client.arg(format!("http://127.0.0.1:{}{path}", container["ports"][0]["containerPort"]));
        let said = node.netns().output(client, b"").with_context(|| format!("{probe} {path}"))?;
        let said = String::from_utf8(said)?;
        ensure!(said.contains("[+] datapath") && !said.contains("[-]"), "{probe}: {said}");
        ensure!((probe == "readinessProbe") == said.contains("[+] chain"), "{probe}: {said}");
    }
    Ok(())
}

fn of_family(addresses: &[IpAddr], family: Family) -> Result<IpAddr> {
    addresses.iter().copied().find(|ip| ip.is_ipv4() == (family == Family::Ipv4)).context("an address")
}

fn passed(node: &Node, direction: Direction, family: Family, to: SocketAddr) -> Result<()> {
    let what = format!("{direction:?} to {to}");
    let entries = node.access_log().connections(&what, |entry| {
        entry.direction == direction
            && entry.is_of(family)
            && redirect_tests::stack::canonical(entry.original_destination) == to
    })?;
    ensure!(!entries.is_empty(), "{what}");
    Ok(())
}
