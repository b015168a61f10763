//! `redirect uninstall` leaves nothing, in any initial state.

use std::os::unix::fs::symlink;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_protocol::placement::Placement;
use redirect_tests::cni::REDIRECT;
use redirect_tests::kernel::Footprint;
use redirect_tests::{Connection, Families, Node, NodeOptions, Pod};
use serde_json::Value;

use crate::context::{Context, needs_tcx, trial};
use crate::install::Directories;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let case = |name: &str, case: Case| {
        trial(context, format!("uninstall::{name}"), move |context| leaves_nothing(context, case))
    };
    vec![
        case("after_kill", Case::default()),
        case("with_tcx_links", Case { tcx: true, ..Case::default() }),
        case("without_checkpoints", Case { without_checkpoints: true, ..Case::default() }),
        case("without_pins", Case { without_pins: true, ..Case::default() }),
        case("with_another_layout", Case { another_layout: true, ..Case::default() }),
        trial(context, "uninstall::refuses_while_an_agent_runs", refuses),
        trial(context, "uninstall::refuses_while_another_agent_runs", refuses_for_another),
        trial(context, "uninstall::leaves_pins_of_others", leaves_pins_of_others),
        trial(context, "uninstall::twice_is_as_good_as_once", twice),
        trial(context, "uninstall::takes_the_plugin_out_of_the_chain", takes_the_plugin_out),
    ]
}

/// The initial state.
#[derive(Clone, Copy, Debug, Default)]
struct Case {
    tcx: bool,
    without_checkpoints: bool,
    without_pins: bool,
    another_layout: bool,
}

fn leaves_nothing(context: &Context, case: Case) -> Result<()> {
    if case.tcx {
        needs_tcx()?;
    }
    let tc = if case.tcx { "tcx" } else { "clsact" };
    let agent_arguments = ["--on-exit", "keep", "--tc", tc].map(str::to_owned).to_vec();
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let pods: Vec<Pod> =
        Families::ALL.into_iter().map(|families| node.plain("pod", families)).collect::<Result<_>>()?;
    // One sysctl was on before the enrollment, and stays on.
    pods[0].netns().set_sysctl("net.ipv4.fwmark_reflect", "1")?;
    let places = || [node.netns()].into_iter().chain(pods.iter().map(Pod::netns));
    let footprints = || places().map(Footprint::of).collect::<Result<Vec<_>>>();
    let before = footprints()?;
    node.start_agent(&agent_arguments)?;
    node.start_proxy()?;
    for pod in &pods {
        pod.enroll()?;
    }
    let objects = node.with_agent(|agent| agent.objects())?;
    node.kill_agent()?;
    if case.another_layout {
        let other = node.pin_dir().join("maps-v0");
        std::fs::create_dir(&other)?;
        let map = objects.maps.first().context("a map")?.to_string();
        let pinned =
            Command::new("bpftool").args(["map", "pin", "id", &map]).arg(other.join("OLD")).status()?;
        ensure!(pinned.success());
    }
    // Namespaces that only descriptors hold are found by checkpoints only.
    let mut processes = Vec::new();
    if case.without_checkpoints {
        for pod in &pods {
            processes.push(Process::start(pod)?);
        }
        std::fs::remove_dir_all(node.state_dir())?;
    }
    if case.without_pins {
        std::fs::remove_dir_all(node.pin_dir())?;
    }
    let report = report(&node.uninstall(&[])?)?;
    let found = report["namespaces"].as_array().context("namespaces")?.len();
    match context.placement() {
        Placement::Pod => ensure!(found == pods.len(), "{report:#}"),
        Placement::Node => ensure!(found == 0 && report["host"]["ingress_device"] == true, "{report:#}"),
    }
    ensure!(!node.pin_dir().exists() && !node.state_dir().exists(), "{report:#}");
    objects.wait_until_gone()?;
    let mut after = footprints()?;
    if case.without_checkpoints {
        // Without checkpoints, the original state of the sysctl is unknown.
        after[1].sysctls.clone_from(&before[1].sysctls);
    }
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    for pod in &pods {
        for stack in pod.families().stacks() {
            let listening = pod.listen(stack)?;
            let to = pod.endpoint(stack.family(), listening.port())?;
            ensure!(Connection::open(node.netns(), stack, to)?.is_direct(), "still captured");
        }
    }
    Ok(())
}

/// A process in a pod, so that its namespace shows in `/proc`.
struct Process(std::process::Child);

impl Process {
    fn start(pod: &Pod) -> Result<Self> {
        let child = pod.netns().run(|| Command::new("sleep").arg("60").spawn())??;
        Ok(Self(child))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn report(output: &Output) -> Result<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {errors}", output.status);
    serde_json::from_slice(&output.stdout).context("the report")
}

fn refuses(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let output = node.uninstall(&[])?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3) && text.contains("--force"), "{}: {text}", output.status);
    pod.check().context("after a refusal")?;
    // The agent continues, and repairs what it can.
    let report = report(&node.uninstall(&["--force"])?)?;
    ensure!(report["pins"].as_array().is_some_and(|pins| !pins.is_empty()), "{report:#}");
    Ok(())
}

/// The agent of another pin directory has captured pods, which count as much as one's own.
fn refuses_for_another(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    // Names on a bpffs can't contain dots.
    let elsewhere = node.pin_dir().with_file_name("elsewhere");
    let uninstall = |arguments: &[&str]| {
        let mut command = Command::new(&context.session()?.binaries().redirect);
        command.args(["uninstall", "-o", "json", "--cni-conf-dir"]).arg(node.dir().join("net.d"));
        command.arg("--cni-bin-dir").arg(node.dir().join("bin"));
        command.arg("--state-dir").arg(node.dir().join("elsewhere")).arg("--pin-dir").arg(&elsewhere);
        Ok::<_, anyhow::Error>(node.netns().run(|| command.args(arguments).output())??)
    };
    let output = uninstall(&[])?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3) && text.contains("--known-only"), "{}: {text}", output.status);
    // It may be the agent of another test.
    ensure!(text.contains("an agent runs and uses /sys/fs/bpf/"), "{text}");
    // It would repair the removed state.
    let agent = Pid::from_raw(node.with_agent(|agent| Ok(agent.process().pid()))?.try_into()?);
    kill(agent, Signal::SIGSTOP)?;
    let before = Footprint::of(node.netns());
    let known = uninstall(&["--known-only"]);
    let after = Footprint::of(node.netns());
    kill(agent, Signal::SIGCONT)?;
    report(&known?)?;
    let (before, after) = (before?, after?);
    ensure!(before == after, "the host had {before:#?}\nand has {after:#?}");
    pod.check().context("after a refusal")
}

/// A wrong pin directory, such as the root of the bpffs: only our pins are removed.
fn leaves_pins_of_others(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let _pod = node.enrolled("pod", Families::Dual)?;
    let objects = node.with_agent(|agent| agent.objects())?;
    node.kill_agent()?;
    let others = node.pin_dir().join("cilium");
    std::fs::create_dir_all(&others)?;
    let map = objects.maps.first().context("a map")?.to_string();
    let theirs = others.join("map");
    let pinned = Command::new("bpftool").args(["map", "pin", "id", &map]).arg(&theirs).status()?;
    ensure!(pinned.success());
    report(&node.uninstall(&[])?)?;
    ensure!(theirs.exists(), "the pin of others is gone");
    let left: Vec<_> = std::fs::read_dir(node.pin_dir())?.flatten().map(|entry| entry.path()).collect();
    ensure!(left == [others.clone()], "{left:?}");
    std::fs::remove_file(theirs)?;
    std::fs::remove_dir(&others)?;
    Ok(std::fs::remove_dir(node.pin_dir())?)
}

fn twice(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    node.stop_agent()?;
    for _ in 0..2 {
        let report = report(&node.uninstall(&[])?)?;
        ensure!(report["namespaces"] == Value::Array(Vec::new()), "{report:#}");
        ensure!(report["pins"] == Value::Array(Vec::new()), "{report:#}");
    }
    Ok(())
}

/// Not while an agent runs. Afterwards pods start without the plugin.
fn takes_the_plugin_out(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let directories = Directories::new(&node, Families::Dual)?;
    symlink(directories.configurations(), node.dir().join("net.d"))?;
    symlink(directories.plugins(), node.dir().join("bin"))?;
    directories.run(&[])?;
    ensure!(node.uninstall(&[])?.status.code() == Some(3) && directories.is_chained(), "in use");
    node.stop_agent()?;
    for expected in [2, 0] {
        let report = report(&node.uninstall(&[])?)?;
        let changed = report["chain"].as_array().context("chain")?;
        ensure!(changed.len() == expected, "{report:#}");
        ensure!(directories.chain()?.types() == ["bridge"], "{:?}", directories.chain()?);
        ensure!(!directories.plugins().join(REDIRECT).exists(), "the plugin is still there");
    }
    directories.pod("after", Families::Dual).map(drop)
}
