//! An agent process, and the output of its command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::{PodReport, Status};
use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::faults::{Faults, Program};
use crate::kernel::Objects;
use crate::netns::Netns;
use crate::process::Process;
use crate::session::Session;
use crate::wait;

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    socket: PathBuf,
    binary: PathBuf,
    placement: Placement,
}

impl Agent {
    /// Starts an agent in a node's namespace and waits until it is ready. Its outbound programs see the processes of
    /// this session only.
    pub fn start(
        session: &Session,
        netns: &Netns,
        cgroup: &Cgroup,
        dir: &Path,
        arguments: &[String],
        faults: Option<&Faults>,
    ) -> Result<Self> {
        let mut agent = Self::begin(session, netns, cgroup, dir, arguments, faults)?;
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// As [`Agent::start`], without waiting.
    pub fn begin(
        session: &Session,
        netns: &Netns,
        cgroup: &Cgroup,
        dir: &Path,
        arguments: &[String],
        faults: Option<&Faults>,
    ) -> Result<Self> {
        let socket = socket(dir);
        let mut command = Command::new(&session.binaries().redirect);
        command.arg("agent").arg("--socket").arg(&socket);
        command.arg("--zds-socket").arg(zds_socket(dir));
        if !arguments.iter().any(|argument| argument == "--cgroup") {
            command.arg("--cgroup").arg(session.cgroup().path());
        }
        command.arg("--pin-dir").arg(pin_dir(session, dir));
        command.arg("--state-dir").arg(state_dir(dir));
        let named = arguments.iter().position(|argument| argument == "--placement");
        let placement = match named.and_then(|at| arguments.get(at + 1)).map(String::as_str) {
            Some("node") => Placement::Node,
            Some(_) => Placement::Pod,
            None => {
                command.args(["--placement", spelled(session.placement())]);
                session.placement()
            }
        };
        if !arguments.iter().any(|argument| argument == "--on-exit") {
            command.args(["--on-exit", "remove"]);
        }
        if !arguments.iter().any(|argument| argument == "--check-interval") {
            command.args(["--check-interval", "1"]);
        }
        if !arguments.iter().any(|argument| argument == "--proxy-deadline") {
            // Shorter than the plugin's own deadline in tests, so that the plugin reports the agent's error.
            let deadline = wait::patient(wait::SOON).as_secs().to_string();
            command.args(["--proxy-deadline", &deadline]);
        }
        command.args(arguments);
        let systemd = notify_socket(dir);
        if systemd.exists() {
            command.env("NOTIFY_SOCKET", systemd);
        }
        if let Some(faults) = faults {
            faults.inject_into(&mut command, Program::Agent)?;
        }
        let name = format!("agent of {}", netns.name());
        let process = Process::spawn(&name, command, netns, cgroup, &dir.join("agent.log"))?;
        let binary = session.binaries().redirect.clone();
        Ok(Self { process, socket, binary, placement })
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Waits until it is ready. If it ends, returns an error with the end of its log.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let (binary, socket) = (self.binary.clone(), self.socket.clone());
        self.process.wait_until("ready agent", || Ok(query::<Status>(&binary, &socket, "status").is_ok()))
    }

    /// `redirect status`.
    pub fn status(&self) -> Result<Status> {
        query(&self.binary, &self.socket, "status")
    }

    /// `redirect pods`.
    pub fn pods(&self) -> Result<Vec<PodReport>> {
        query(&self.binary, &self.socket, "pods")
    }

    /// Waits until a proxy is connected and knows every pod.
    pub fn wait_for_proxy(&mut self, pid: u32) -> Result<()> {
        let (binary, socket) = (self.binary.clone(), self.socket.clone());
        // There the agent acknowledges on the proxy's behalf.
        let pid = if self.placement == Placement::Node { self.process.pid() } else { pid };
        self.process.wait_until("proxy in step with the agent", || {
            let status: Status = query(&binary, &socket, "status")?;
            Ok(status.proxies.iter().any(|proxy| proxy.pid == pid && proxy.synced))
        })
    }

    /// Waits until no proxy is connected.
    pub fn wait_for_no_proxy(&self) -> Result<()> {
        wait::until_true("agent without a proxy", wait::SOON, || Ok(self.status()?.proxies.is_empty()))
    }

    /// The BPF objects that it created.
    pub fn objects(&self) -> Result<Objects> {
        let programs = self.status()?.programs.iter().map(|program| program.id).collect();
        Objects::of(self.process.pid(), programs)
    }

    /// Stops it as Kubernetes does. Fails if it does not exit successfully, or if it left anything.
    pub fn stop(self) -> Result<()> {
        let objects = self.objects()?;
        self.end()?;
        objects.wait_until_gone()
    }

    /// As [`Agent::stop`], without the check for leftovers.
    pub fn end(mut self) -> Result<()> {
        let status = self.process.terminate()?;
        if !status.success() {
            bail!("agent: {status}\n{}", self.process.last_lines());
        }
        Ok(())
    }

    /// Kills it, like a crash.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill().map(drop)
    }
}

/// The agent's pin directory for a node.
#[must_use]
pub fn pin_dir(session: &Session, dir: &Path) -> PathBuf {
    session.pins().join(dir.file_name().unwrap_or_default())
}

/// Where it keeps its checkpoints.
#[must_use]
pub fn state_dir(dir: &Path) -> PathBuf {
    dir.join("state")
}

/// `redirect uninstall` for the agent of a node, running or not. The CNI chain is the one in the node's directory, if
/// there is one.
pub fn uninstall(
    session: &Session,
    netns: &NetNs,
    dir: &Path,
    arguments: &[&str],
    faults: Option<&Faults>,
) -> Result<Output> {
    let mut command = Command::new(&session.binaries().redirect);
    command.args(["uninstall", "--known-only", "-o", "json"]);
    command
        // Not this host's chain.
        .arg("--cni-conf-dir")
        .arg(dir.join("net.d"))
        .arg("--cni-bin-dir")
        .arg(dir.join("bin"))
        .arg("--pin-dir")
        .arg(pin_dir(session, dir))
        .arg("--state-dir")
        .arg(state_dir(dir))
        .args(arguments);
    if let Some(faults) = faults {
        faults.inject_into(&mut command, Program::Agent)?;
    }
    netns.run(|| command.output())?.context("redirect uninstall")
}

/// The value of the command line option.
#[must_use]
pub fn spelled(placement: Placement) -> &'static str {
    match placement {
        Placement::Pod => "pod",
        Placement::Node => "node",
    }
}

/// Where the agent of a node listens for the plugin and the command line.
#[must_use]
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("agent.sock")
}

/// Where it notifies systemd of its state, if the test listens there in place of systemd.
#[must_use]
pub fn notify_socket(dir: &Path) -> PathBuf {
    dir.join("notify.sock")
}

/// Where it listens for the proxy.
#[must_use]
pub fn zds_socket(dir: &Path) -> PathBuf {
    dir.join("zds.sock")
}

fn query<T: DeserializeOwned>(binary: &Path, socket: &Path, what: &str) -> Result<T> {
    let output = Command::new(binary).arg(what).arg("--socket").arg(socket).args(["-o", "json"]).output()?;
    if !output.status.success() {
        bail!("redirect {what}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("redirect {what} -o json"))
}
