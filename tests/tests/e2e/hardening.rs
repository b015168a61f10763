//! The privileges that agent and proxy drop, and the processes that may not connect to them.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use caps::CapSet;
use libtest_mimic::Trial;
use redirect_linux::privileges::{self, Capability};
use redirect_protocol::placement::Placement;
use redirect_tests::process::Process;
use redirect_tests::{Families, Netns, Node, ProxyKind, agent, wait};

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context) -> Result<()>;
    let tests: [(&str, Test); 4] = [
        ("agent_and_proxy_keep_little", keep_little),
        ("missing_capabilities_are_named", missing_capabilities),
        ("pods_can_not_ask_the_agent", pods_ask),
        ("pods_can_not_pass_for_the_proxy", pods_as_proxy),
    ];
    tests.into_iter().map(|(name, test)| trial(context, format!("hardening::{name}"), test)).collect()
}

fn keep_little(context: &Context) -> Result<()> {
    let node = context.node()?;
    for (pid, kept) in [
        (node.with_agent(|agent| Ok(agent.process().pid()))?, privileges::AGENT),
        (node.proxy_pid()?, privileges::PROXY),
    ] {
        if pid == node.proxy_pid()? && context.proxy()? == ProxyKind::Ztunnel {
            // It keeps arbitrary others.
            continue;
        }
        let expected = kept.iter().fold(0, |set, capability| set | 1u64 << capability.index());
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(thread?.path().join("status"))?;
            let field = |name: &str| -> Result<u64> {
                let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
                Ok(u64::from_str_radix(line.with_context(|| format!("no {name}"))?, 16)?)
            };
            for (name, value) in [("CapEff", expected), ("CapPrm", expected), ("CapBnd", expected)] {
                ensure!(field(name)? == value, "{name} is {:x}, not {value:x}:\n{status}", field(name)?);
            }
            ensure!(field("CapInh")? == 0 && field("CapAmb")? == 0 && field("NoNewPrivs")? == 1, "{status}");
        }
    }
    Ok(())
}

fn missing_capabilities(context: &Context) -> Result<()> {
    let session = context.session()?;
    let directory = tempfile::tempdir_in(session.directory())?;
    for (program, kept) in [("agent", privileges::AGENT), ("proxy", privileges::PROXY)] {
        for &missing in kept {
            let mut command = Command::new(&session.binaries().redirect);
            command.arg(program).arg("--zds-socket").arg(directory.path().join("zds.sock"));
            without(&mut command, missing);
            let output = command.output()?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(!output.status.success(), "{program} without {missing}: {text}");
            ensure!(
                text.contains(&missing.to_string()) && text.contains("securityContext"),
                "{missing}: {text}"
            );
        }
    }
    Ok(())
}

/// Starts it as root without one capability.
fn without(command: &mut Command, capability: Capability) {
    let drop = move || caps::drop(None, CapSet::Bounding, capability).map_err(std::io::Error::other);
    // SAFETY: the closure runs between fork and exec and makes one system call.
    unsafe { command.pre_exec(drop) };
}

/// Root in a pod with the host's files: only processes outside of pods may send requests.
fn pods_ask(context: &Context) -> Result<()> {
    let node = context.node()?;
    let (enrolled, plain) = (node.enrolled("pod", Families::Dual)?, node.plain("pod", Families::Dual)?);
    let ask = |netns: &Netns| {
        let mut command = Command::new(&node.session().binaries().redirect);
        command.arg("pods").arg("--socket").arg(node.agent_socket());
        netns.execute(command, b"")
    };
    ensure!(ask(plain.netns())?.status.success());
    let refused = ask(enrolled.netns())?;
    let text = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && text.contains("enrolled pod"), "{text}");
    Ok(())
}

fn pods_as_proxy(context: &Context) -> Result<()> {
    let session = context.session()?;
    // The same test may run in the other placement at the same time.
    let cgroup = session.applications().child(&format!("false-proxy-{:?}", context.placement()))?;
    let node = Node::start(&session)?;
    let pod = node.enrolled("pod", Families::Dual)?;
    let mut command = Command::new(&session.binaries().redirect);
    command.arg("proxy").arg("--zds-socket").arg(agent::zds_socket(node.dir()));
    let log = node.dir().join("false-proxy.log");
    let _process = Process::spawn("false proxy", command, pod.netns(), &cgroup, &log)?;
    let agent_log = node.dir().join("agent.log");
    let (refusal, proxies) = match context.placement() {
        Placement::Pod => ("is in an enrolled pod", 1),
        Placement::Node => ("the agent announces no pods", 0),
    };
    wait::until_true("refusal", wait::SOON, || Ok(fs::read_to_string(&agent_log)?.contains(refusal)))?;
    let status = node.status()?;
    let known = status.maps.iter().find(|map| map.name == "PROXY_CGROUPS").context("no map")?;
    ensure!(known.entries == proxies, "{} cgroups are the proxy's", known.entries);
    let said = fs::read_to_string(&log)?;
    if said.contains("served") {
        bail!("it was given a pod:\n{said}");
    }
    Ok(())
}
