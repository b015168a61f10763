//! What a node lacks is told, with an exit code for each kind, by the agent and by `redirect doctor`.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_tests::wait;
use serde_json::Value;

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    if std::env::var("REDIRECT_KERNEL").is_ok_and(|kernel| kernel == "old") {
        return vec![trial(context, "doctor::an_old_kernel_is_refused", old_kernel)];
    }
    type Test = fn(&Context) -> Result<()>;
    let tests: [(&str, Test); 8] = [
        ("this_node_is_fit", fit),
        ("without_root", without_root),
        ("without_capabilities", without_capabilities),
        ("without_btf", without_btf),
        ("without_cgroup2", without_cgroup2),
        ("version_1_alone", version_1_alone),
        ("read_only_cgroup2", read_only_cgroup2),
        ("without_bpffs", without_bpffs),
    ];
    tests.into_iter().map(|(name, test)| trial(context, format!("doctor::{name}"), test)).collect()
}

const BTF: i32 = 4;
const CGROUP: i32 = 5;
const BPFFS: i32 = 6;
const KERNEL: i32 = 7;
const PRIVILEGES: i32 = 8;

/// What the agent and the doctor did in surroundings that a script of mounts made.
struct Said {
    agent: Output,
    doctor: Output,
}

/// `prepare` is a shell script; what it mounts is gone with the processes.
fn in_surroundings(context: &Context, prepare: &str, change: impl Fn(&mut Command)) -> Result<Said> {
    let session = context.session()?;
    let directory = tempfile::tempdir_in(session.directory())?;
    let redirect = session.binaries().redirect.display().to_string();
    let script = format!("set -e\n{prepare}\nexec \"$@\"");
    let command = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "sh", "-c", &script, "sh", &redirect]).args(arguments);
        change(&mut command);
        command
    };
    let socket = |name: &str| directory.path().join(name).display().to_string();
    let (wire, zds) = (socket("agent.sock"), socket("zds.sock"));
    let agent = ended(command(&["agent", "--socket", &wire, "--zds-socket", &zds]))?;
    let doctor = command(&["doctor", "-o", "json"]).output().context("redirect doctor")?;
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
    Ok(Output { status: status?, stdout: Vec::new(), stderr })
}

impl Said {
    /// The agent refused, the doctor failed the check, and both said why.
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

/// Whatever the kernel: where the other tests pass, nothing fails here.
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
    // Nobody may look into the folders of this user.
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join("redirect");
    // A file that a process writes can't be run, also while a child that was forked meanwhile has it: not this process, then.
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
    };
    in_surroundings(context, "", without)?.refused(PRIVILEGES, "privileges", &["CAP_NET_ADMIN"])
}

fn nothing(_: &mut Command) {}

fn without_btf(context: &Context) -> Result<()> {
    let hide = "mount -t tmpfs none /sys/kernel/btf";
    in_surroundings(context, hide, nothing)?.refused(
        BTF,
        "BTF",
        &["/sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF"],
    )
}

/// Takes the hierarchies of a version away.
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

/// Programs are attached to a directory that is open for reading.
fn read_only_cgroup2(context: &Context) -> Result<()> {
    let root = redirect_tests::cgroup::mount_point()?;
    let (_, checks) = doctor(context, &format!("mount -o remount,bind,ro {}", root.display()))?;
    ensure!(find(&checks, "cgroup2")?["state"] == "ok", "{checks:#?}");
    Ok(())
}

/// In a container without the host's, pins would end with the container.
fn without_bpffs(context: &Context) -> Result<()> {
    let hide = "mount -t tmpfs none /sys/fs/bpf";
    in_surroundings(context, hide, nothing)?.refused(BPFFS, "bpffs", &["/sys/fs/bpf", "--pin-dir"])
}

/// Every feature that is missing is named, and what brings it.
fn old_kernel(context: &Context) -> Result<()> {
    let said = in_surroundings(context, "", nothing)?;
    let words = ["bpf_set_retval", "SO_NETNS_COOKIE", "Linux 5.18", "Linux 5.14", "sock_ops", "cgroup/bind4"];
    said.refused(KERNEL, "SO_NETNS_COOKIE", &words)?;
    let failed = said.checks()?.into_iter().filter(|check| check["state"] == "fail").count();
    let named = String::from_utf8_lossy(&said.agent.stderr).matches("remedy:").count();
    // The doctor also gives the programs to the verifier.
    if !(named..=named + 1).contains(&failed) {
        bail!("the doctor fails {failed} checks, the agent names {named}");
    }
    Ok(())
}
