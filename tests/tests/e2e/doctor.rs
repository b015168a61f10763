//! The agent and `redirect doctor` report what a node lacks, with an exit code for each kind.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use redirect_protocol::placement::Placement;
use redirect_tests::faults::{self, Fault, Faults};
use redirect_tests::foreign::{Hook, Kind, Program};
use redirect_tests::{Families, Node, NodeOptions, Pod, foreign, wait};
use serde_json::Value;

use crate::context::{Context, needs_tcx, skip, trial};
use crate::on_node;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    if std::env::var("REDIRECT_KERNEL").is_ok_and(|kernel| kernel == "old") {
        return vec![trial(context, "doctor::an_old_kernel_is_refused", old_kernel)];
    }
    type Test = fn(&Context) -> Result<()>;
    let tests: [(&str, Test); 12] = [
        ("this_node_is_fit", fit),
        ("without_root", without_root),
        ("without_capabilities", without_capabilities),
        ("without_btf", without_btf),
        ("probes_that_fail", probes_that_fail),
        ("without_cgroup2", without_cgroup2),
        ("version_1_alone", version_1_alone),
        ("read_only_cgroup2", read_only_cgroup2),
        ("without_bpffs", without_bpffs),
        ("a_chain_without_the_plugin", chain),
        ("sysctls_that_are_off_or_missing", sysctls),
        ("programs_before_ours", others),
    ];
    tests.into_iter().map(|(name, test)| trial(context, format!("doctor::{name}"), test)).collect()
}

/// The checks of pods and their devices.
pub(crate) fn trials_with_pods(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = vec![
        trial(context, "doctor::programs_on_the_devices_of_pods", devices),
        trial(context, "doctor::pods_that_cant_be_read", unread),
    ];
    for program in ["iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"] {
        let name = format!("doctor::rules_of_another_mesh_agent::{program}");
        trials.push(trial(context, name, move |context| netfilter(context, program)));
    }
    trials
}

const BTF: i32 = 4;
const CGROUP: i32 = 5;
const BPFFS: i32 = 6;
const KERNEL: i32 = 7;
const PRIVILEGES: i32 = 8;

/// The behavior of agent and doctor with mounts prepared by a script.
struct Said {
    agent: Output,
    doctor: Output,
}

/// `prepare` is a shell script; what it mounts is gone with the processes.
fn in_surroundings(
    context: &Context,
    prepare: &str,
    change: impl Fn(&mut Command) -> Result<()>,
) -> Result<Said> {
    let session = context.session()?;
    let directory = tempfile::tempdir_in(session.directory())?;
    let redirect = session.binaries().redirect.display().to_string();
    let script = format!("set -e\n{prepare}\nexec \"$@\"");
    let command = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "sh", "-c", &script, "sh", &redirect]).args(arguments);
        change(&mut command)?;
        anyhow::Ok(command)
    };
    let socket = |name: &str| directory.path().join(name).display().to_string();
    let (wire, zds) = (socket("agent.sock"), socket("zds.sock"));
    let agent = ended(command(&["agent", "--socket", &wire, "--zds-socket", &zds])?)?;
    let doctor = command(&["doctor", "-o", "json"])?.output().context("redirect doctor")?;
    Ok(Said { agent, doctor })
}

/// The output of a process that has to end by itself.
fn ended(mut command: Command) -> Result<Output> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0).spawn()?;
    let status = wait::until("end of the agent", wait::SOON, || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
        child.wait()?;
    }
    let mut stderr = Vec::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_end(&mut stderr)?;
    }
    let status = status.with_context(|| String::from_utf8_lossy(&stderr).into_owned())?;
    Ok(Output { status, stdout: Vec::new(), stderr })
}

impl Said {
    /// The agent refused to start, the doctor failed the check, and both gave the reason.
    fn refused(&self, code: i32, check: &str, words: &[&str]) -> Result<()> {
        let text = String::from_utf8_lossy(&self.agent.stderr).into_owned();
        ensure!(self.agent.status.code() == Some(code), "{}: {text}", self.agent.status);
        ensure!(words.iter().all(|word| text.contains(word)), "{words:?} are not all in: {text}");
        ensure!(text.contains("remedy:"), "{text}");
        ensure!(self.doctor.status.code() == Some(2), "doctor: {}", self.doctor.status);
        let found = find(&self.checks()?, check)?;
        ensure!(found["state"] == "fail" && found["remedy"].is_string(), "{found}");
        let detail = found["detail"].as_str().unwrap_or_default();
        ensure!(text.contains(detail), "the doctor says {detail:?}, the agent {text}");
        Ok(())
    }

    fn checks(&self) -> Result<Vec<Value>> {
        let text = String::from_utf8_lossy(&self.doctor.stderr);
        serde_json::from_slice(&self.doctor.stdout).with_context(|| format!("redirect doctor: {text}"))
    }
}

fn find(checks: &[Value], name: &str) -> Result<Value> {
    checks
        .iter()
        .find(|check| check["check"] == name)
        .cloned()
        .with_context(|| format!("no check {name}: {checks:?}"))
}

fn doctor(context: &Context, prepare: &str) -> Result<(ExitStatus, Vec<Value>)> {
    let redirect = context.session()?.binaries().redirect.display().to_string();
    let script = format!("set -e\n{prepare}\nexec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh", &redirect, "doctor", "-o", "json"])
        .output()?;
    let checks = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("redirect doctor: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.status, checks))
}

/// On every kernel on which the other tests pass, no check fails.
fn fit(context: &Context) -> Result<()> {
    let (status, checks) = doctor(context, "")?;
    let worst = if checks.iter().all(|check| check["state"] == "ok") { 0 } else { 1 };
    ensure!(status.code() == Some(worst), "{status}: {checks:#?}");
    ensure!(checks.iter().all(|check| check["state"] != "fail"), "{checks:#?}");
    let has_ipv6 = Path::new("/proc/net/if_inet6").exists();
    ensure!((find(&checks, "IPv6")?["state"] == "ok") == has_ipv6, "{checks:#?}");
    find(&checks, "programs").map(drop)
}

fn without_root(context: &Context) -> Result<()> {
    let redirect = context.session()?.binaries().redirect.clone();
    // A directory that this user can't read.
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join("redirect");
    // A file that is open for writing can't be executed, and a child that another test forks would hold it open; so another
    // process writes it.
    ensure!(Command::new("cp").args([&redirect, &copy]).status()?.success());
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&copy);
        command.args(arguments).uid(65534).gid(65534);
        command
    };
    let agent = ended(command(&["agent"]))?;
    let doctor = command(&["doctor", "-o", "json"]).output()?;
    Said { agent, doctor }.refused(PRIVILEGES, "privileges", &["CAP_BPF", "CAP_SYS_ADMIN"])
}

fn without_capabilities(context: &Context) -> Result<()> {
    const CAP_NET_ADMIN: libc::c_ulong = 12;
    let without = |command: &mut Command| {
        let drop = || {
            // SAFETY: the call takes numbers alone, and changes this process, which has just been forked.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: the closure makes one system call.
        unsafe { command.pre_exec(drop) };
        Ok(())
    };
    in_surroundings(context, "", without)?.refused(PRIVILEGES, "privileges", &["CAP_NET_ADMIN"])
}

fn nothing(_: &mut Command) -> Result<()> {
    Ok(())
}

/// A failing probe reports its error. It only proves that the kernel lacks a feature if the error says so.
fn probes_that_fail(context: &Context) -> Result<()> {
    const ANY: i32 = 1;
    let point = "bpf MAP_CREATE".to_owned();
    for (error, code, word) in [
        (libc::EPERM, PRIVILEGES, "EPERM"),
        (libc::ENOMEM, ANY, "ENOMEM"),
        (libc::EREMOTEIO, ANY, "EREMOTEIO"),
        (libc::EINVAL, KERNEL, "the kernel lacks hash"),
    ] {
        let nowhere = || "/nonexistent".into();
        let faults = Faults::new(nowhere(), nowhere());
        let said = in_surroundings(context, "", |command| {
            faults.arm(Some((&point, 1, Fault::FailsFromNowOn(error))));
            faults.inject_into(command, faults::Program::Agent)
        })?;
        said.refused(code, "maps", &[word])?;
        let text = String::from_utf8_lossy(&said.agent.stderr);
        ensure!(text.contains("lacks") == (error == libc::EINVAL), "{text}");
    }
    Ok(())
}

fn without_btf(context: &Context) -> Result<()> {
    let hide = "mount -t tmpfs none /sys/kernel/btf";
    in_surroundings(context, hide, nothing)?.refused(
        BTF,
        "BTF",
        &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"],
    )
}

/// Unmounts the hierarchies of a version.
const NO_VERSION_2: &str = "awk '{for (i = 7; i <= NF; i++) if ($i == \"-\" && $(i + 1) == \"cgroup2\") print $5}' \
                            /proc/self/mountinfo | while read -r place; do umount -l \"$place\"; done";

fn without_cgroup2(context: &Context) -> Result<()> {
    let hide = "umount -l -a -t cgroup,cgroup2 || true\nmount -t tmpfs none /sys/fs/cgroup";
    let prepare = format!("{NO_VERSION_2}\n{hide}");
    in_surroundings(context, &prepare, nothing)?.refused(
        CGROUP,
        "cgroup2",
        &["not mounted", "mount -t cgroup2"],
    )
}

fn version_1_alone(context: &Context) -> Result<()> {
    let prepare = format!(
        "{NO_VERSION_2}\nmkdir -p /tmp/version-1\nmount -t tmpfs none /tmp/version-1\nmkdir /tmp/version-1/named\n\
         mount -t cgroup -o none,name=ambient-redirect-test none /tmp/version-1/named"
    );
    in_surroundings(context, &prepare, nothing)?.refused(CGROUP, "cgroup2", &["only version 1"])
}

/// To attach programs, it suffices to open the directory for reading.
fn read_only_cgroup2(context: &Context) -> Result<()> {
    let root = redirect_tests::cgroup::mount_point()?;
    let (_, checks) = doctor(context, &format!("mount -o remount,bind,ro {}", root.display()))?;
    ensure!(find(&checks, "cgroup2")?["state"] == "ok", "{checks:#?}");
    Ok(())
}

/// In a container without the host's bpffs, pins would end with the container.
fn without_bpffs(context: &Context) -> Result<()> {
    let hide = "mount -t tmpfs none /sys/fs/bpf";
    in_surroundings(context, hide, nothing)?.refused(BPFFS, "bpffs", &["/sys/fs/bpf", "--pin-dir"])
}

/// `redirect doctor` with arguments: its result for one check, and its exit code.
fn asked(context: &Context, arguments: &[&str], name: &str) -> Result<(Vec<Value>, Option<i32>)> {
    let redirect = context.session()?.binaries().redirect.clone();
    check(&Command::new(redirect).args(["doctor", "-o", "json"]).args(arguments).output()?, name)
}

fn check(output: &Output, name: &str) -> Result<(Vec<Value>, Option<i32>)> {
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("redirect doctor: {}", String::from_utf8_lossy(&output.stderr)))?;
    let found: Vec<_> = checks.into_iter().filter(|found| found["check"] == name).collect();
    ensure!(!found.is_empty(), "no check {name}");
    Ok((found, output.status.code()))
}

/// No chain, a chain without the plugin, one whose plugin is missing, and a complete one.
fn chain(context: &Context) -> Result<()> {
    let session = context.session()?;
    let directory = tempfile::tempdir_in(session.directory())?;
    let (conf, bin) = (directory.path().join("net.d"), directory.path().join("bin"));
    std::fs::create_dir(&bin)?;
    let says = |state: &str, word: &str| -> Result<()> {
        let (conf, bin) = (conf.display().to_string(), bin.display().to_string());
        let (found, code) = asked(context, &["--cni-conf-dir", &conf, "--cni-bin-dir", &bin], "CNI chain")?;
        let detail = found[0]["detail"].as_str().unwrap_or_default();
        ensure!(found[0]["state"] == state && detail.contains(word), "{found:#?}");
        ensure!(found[0]["remedy"].is_string() == (state != "ok"), "{found:#?}");
        let least = match state {
            "ok" => 0,
            "warn" => 1,
            _ => 2,
        };
        ensure!(code.is_some_and(|code| code >= least), "{code:?}: {found:#?}");
        Ok(())
    };
    says("warn", "cannot read")?;
    std::fs::create_dir(&conf)?;
    says("warn", "there is no CNI configuration")?;
    let list = |plugins: &str| {
        let text = format!(r#"{{"cniVersion":"1.0.0","name":"net","plugins":[{plugins}]}}"#);
        std::fs::write(conf.join("10-net.conflist"), text)
    };
    list(r#"{"type":"bridge"}"#)?;
    says("warn", "has no redirect-cni")?;
    list(r#"{"type":"bridge"},{"type":"redirect-cni"}"#)?;
    says("fail", "no pod starts")?;
    ensure!(
        Command::new("cp").arg(&session.binaries().plugin).arg(bin.join("redirect-cni")).status()?.success()
    );
    says("ok", "10-net.conflist")
}

/// A container's mounts can hide them.
fn sysctls(context: &Context) -> Result<()> {
    let directory = tempfile::tempdir_in(context.session()?.directory())?;
    let zero = directory.path().join("zero");
    std::fs::write(&zero, "0\n")?;
    for name in ["net/core/bpf_jit_enable", "net/ipv4/tcp_syncookies"] {
        let (status, checks) = doctor(context, &format!("mount --bind {} /proc/sys/{name}", zero.display()))?;
        let found = find(&checks, &name.replace('/', "."))?;
        ensure!(found["state"] == "warn" && found["remedy"].is_string(), "{status}: {found}");
        ensure!(find(&checks, "sysctls of pods")?["state"] == "ok", "{checks:#?}");
    }
    let (status, checks) = doctor(context, "mount -t tmpfs none /proc/sys/net")?;
    let found = find(&checks, "sysctls of pods")?;
    let detail = found["detail"].as_str().unwrap_or_default();
    ensure!(status.code() == Some(2) && found["state"] == "fail", "{status}: {found}");
    ensure!(
        detail.contains("net.ipv4.tcp_fwmark_accept") && detail.contains("net.ipv6.fwmark_reflect"),
        "{found}"
    );
    Ok(())
}

/// Chains like those of Istio's agent in a pod. The other pod has none.
fn netfilter(context: &Context, program: &str) -> Result<()> {
    let node = context.node()?;
    let (clean, pod) = (node.enrolled("clean", Families::Dual)?, node.enrolled("pod", Families::Dual)?);
    let mut command = Command::new(program);
    command.args(["-w", "-t", "nat", "-N", "ISTIO_OUTPUT"]);
    let output = pod.netns().execute(command, b"")?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if stderr.contains("Table does not exist") {
        return Err(skip(format!("the kernel has no {program}")));
    }
    ensure!(output.status.success(), "{stderr}");
    let state = node.state_dir().display().to_string();
    let (found, code) = asked(context, &["--state-dir", &state], "netfilter rules in pods")?;
    let of = |pod: &Pod| {
        let named = pod.identity().to_string();
        found.iter().find(|found| found["detail"].as_str().is_some_and(|detail| detail.contains(&named)))
    };
    let warning = of(&pod).with_context(|| format!("{found:#?}"))?;
    ensure!(warning["state"] == "warn" && warning["remedy"].is_string() && code >= Some(1), "{found:#?}");
    ensure!(warning["detail"].as_str().is_some_and(|text| text.contains("ISTIO_OUTPUT")), "{found:#?}");
    ensure!(of(&clean).is_none(), "{found:#?}");
    Ok(())
}

/// Socket-level load balancers that are attached before ours, for each family.
fn others(context: &Context) -> Result<()> {
    let session = context.session()?;
    // No other test's programs are there.
    let cgroup = session.cgroup().child("programs-before-ours")?;
    if !foreign::has_order(cgroup.path())? {
        return Err(skip("the kernel has no order among programs of a cgroup (Linux 6.17)"));
    }
    let path = cgroup.path().display().to_string();
    let agent_arguments = vec!["--cgroup".into(), path.clone()];
    let _node =
        Node::with(&session, NodeOptions { agent_arguments, proxy: false, ..NodeOptions::default() })?;
    let ask = || asked(context, &["--cgroup", &path], "programs of others");
    let says = |words: &str| {
        let (found, _) = ask()?;
        ensure!(found.len() == 1 && found[0]["state"] == "ok", "{found:#?}");
        ensure!(found[0]["detail"].as_str().is_some_and(|detail| detail.contains(words)), "{found:#?}");
        Ok(())
    };
    let nowhere = ["192.0.2.77:77".parse()?, "[2001:db8::77]:77".parse()?];
    let attach = |nowhere| Program::rewriting_first(cgroup.path(), Kind::Connections, nowhere, nowhere);
    let first = nowhere.map(attach).into_iter().collect::<Result<Vec<_>>>()?;
    let (found, code) = ask()?;
    ensure!(found.len() == 2 && code >= Some(1), "{code:?}: {found:#?}");
    for (found, ours) in found.iter().zip(["outbound_ipv4", "outbound_ipv6"]) {
        let detail = found["detail"].as_str().unwrap_or_default();
        ensure!(found["state"] == "warn" && found["remedy"].is_string(), "{found:#?}");
        ensure!(detail.starts_with(ours) && detail.contains("foreign runs before ours"), "{found:#?}");
    }
    drop(first);
    // The kernel removes them a little later.
    wait::until("no such programs", wait::SOON, || Ok(says("none at our hooks").ok()))?;
    let attach = |nowhere| Program::rewriting(cgroup.path(), Kind::Connections, nowhere, nowhere);
    let _last = nowhere.map(attach).into_iter().collect::<Result<Vec<_>>>()?;
    says("none before ours at our hooks; there are foreign")
}

/// tcx programs that appear after the agent's observation: the kernel runs them first, or exclusively.
fn devices(context: &Context) -> Result<()> {
    needs_tcx()?;
    let node = Node::with_arguments(&context.session()?, &["--check-interval", "3600"])?;
    let (_clean, pod) = (node.enrolled("clean", Families::Dual)?, node.enrolled("pod", Families::Dual)?);
    let state = node.state_dir().display().to_string();
    let ask = || {
        let mut command = Command::new(&node.session().binaries().redirect);
        command.args(["doctor", "-o", "json", "--state-dir", &state]);
        check(&node.netns().run(move || command.output())??, "TC programs of others")
    };
    let (netns, device) = match context.placement() {
        Placement::Pod => (pod.netns(), "eth0".to_owned()),
        Placement::Node => (node.netns(), on_node::host_device(&pod)?),
    };
    let index = netns.json(&format!("ip -j link show dev {device}"))?[0]["ifindex"].as_u64();
    let index = u32::try_from(index.context("no index")?)?;
    let attach = |hook| {
        /// `TCX_NEXT`: the next program runs.
        const NEXT: i32 = -1;
        netns.run(|| Program::with_verdict(index, hook, NEXT))?
    };
    // Stopped, because notifications about other devices would make it observe at once.
    let agent = Pid::from_raw(node.with_agent(|agent| Ok(agent.process().pid()))?.try_into()?);
    kill(agent, Signal::SIGSTOP)?;
    let programs: Result<Vec<_>> = [Hook::TcxIngress, Hook::TcxEgress].map(attach).into_iter().collect();
    let asked = ask();
    kill(agent, Signal::SIGCONT)?;
    let (programs, (found, code)) = (programs?, asked?);
    ensure!(found.len() == programs.len() && code >= Some(1), "{code:?}: {found:#?}");
    for (found, side) in found.iter().zip(["ingress", "egress"]) {
        let place = format!("pod {}: {device}, {side}: foreign runs before ours", pod.identity());
        ensure!(found["state"] == "warn" && found["remedy"].is_string(), "{found:#?}");
        ensure!(found["detail"].as_str().is_some_and(|detail| detail.starts_with(&place)), "{found:#?}");
    }
    // The agent observes the pod again, and attaches its programs before the others.
    pod.enroll()?;
    let (found, _) = ask()?;
    ensure!(found.len() == 1 && found[0]["state"] == "ok", "{found:#?}");
    ensure!(
        found[0]["detail"].as_str().is_some_and(|detail| detail.contains("there are foreign")),
        "{found:#?}"
    );
    Ok(())
}

/// Unreadable state is not taken for missing.
fn unread(context: &Context) -> Result<()> {
    let directory = tempfile::tempdir_in(context.session()?.directory())?;
    std::fs::write(directory.path().join("pods"), "")?;
    let state = directory.path().display().to_string();
    for name in ["netfilter rules in pods", "TC programs of others"] {
        let (found, code) = asked(context, &["--state-dir", &state], name)?;
        ensure!(found.len() == 1 && found[0]["state"] == "warn" && code >= Some(1), "{code:?}: {found:#?}");
        ensure!(found[0]["detail"].as_str().is_some_and(|text| text.contains("cannot read")), "{found:#?}");
    }
    Ok(())
}

/// The report names every missing feature, and what provides it.
fn old_kernel(context: &Context) -> Result<()> {
    let said = in_surroundings(context, "", nothing)?;
    let words = ["bpf_set_retval", "SO_NETNS_COOKIE", "Linux 5.18", "Linux 5.14", "sock_ops", "cgroup/bind4"];
    said.refused(KERNEL, "SO_NETNS_COOKIE", &words)?;
    let failed = said.checks()?.into_iter().filter(|check| check["state"] == "fail").count();
    let named = String::from_utf8_lossy(&said.agent.stderr).matches("remedy:").count();
    // The doctor also loads the programs.
    if !(named..=named + 1).contains(&failed) {
        bail!("the doctor fails {failed} checks, the agent names {named}");
    }
    Ok(())
}
