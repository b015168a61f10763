//! `redirect install` on a directory of real plugins: the chain in it works at any time.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::agent::notify_socket;
use redirect_tests::cni::{Chain, REDIRECT};
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Families, Node, NodeOptions, Pod, Stack};
use tempfile::TempDir;

use crate::context::{Context, for_every_kind, trial};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "install::captures", captures);
    trials.push(trial(context, "install::removed", removed));
    trials.push(trial(context, "install::killed", killed));
    trials.push(trial(context, "install::by_the_agent", by_the_agent));
    trials.push(trial(context, "install::ready_for_systemd", ready_for_systemd));
    trials.push(trial(context, "install::ready_without_a_chain", ready_without_a_chain));
    trials
}

/// The directories of a node after the primary CNI has run: Debian's plugins, and a chain of them.
pub(crate) struct Directories {
    directory: TempDir,
    node: Arc<Node>,
}

const CONFIGURATION: &str = "10-primary.conflist";

impl Directories {
    pub(crate) fn new(node: &Arc<Node>, families: Families) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("cni-").tempdir_in(node.session().directory())?;
        let directories = Self { directory, node: node.clone() };
        fs::create_dir(directories.configurations())?;
        fs::create_dir(directories.plugins())?;
        for kind in ["bridge", "host-local"] {
            let places = node.session().plugin_directories().into_iter().map(|place| place.join(kind));
            let plugin = places.into_iter().find(|path| path.exists()).context("Debian's plugins")?;
            symlink(plugin, directories.plugins().join(kind))?;
        }
        directories.write_primary(families)?;
        Ok(directories)
    }

    /// The primary CNI's start.
    fn write_primary(&self, families: Families) -> Result<()> {
        let chain = self.node.chain(families, &[]).without(REDIRECT);
        Ok(fs::write(self.configurations().join(CONFIGURATION), chain.list().to_string())?)
    }

    pub(crate) fn configurations(&self) -> PathBuf {
        self.directory.path().join("net.d")
    }

    pub(crate) fn plugins(&self) -> PathBuf {
        self.directory.path().join("bin")
    }

    fn arguments(&self) -> Vec<String> {
        [
            ("--cni-conf-dir", self.configurations().as_path()),
            ("--cni-bin-dir", &self.plugins()),
            ("--cni-agent-socket", &self.node.agent_socket()),
            ("--cni-plugin", &self.node.session().binaries().plugin),
        ]
        .into_iter()
        .flat_map(|(name, value): (_, &Path)| [name.to_owned(), value.display().to_string()])
        .collect()
    }

    /// Arguments for an agent that keeps the plugin in this chain.
    pub(crate) fn agent_arguments(&self) -> Vec<String> {
        [vec!["--install-cni".to_owned()], self.arguments()].concat()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.node.session().binaries().redirect);
        command.arg("install").args(self.arguments()).args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.command(arguments).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(output)
    }

    /// The current chain as a runtime sees it, with only the directories' contents.
    pub(crate) fn chain(&self) -> Result<Chain> {
        Chain::of_directory(&self.configurations(), vec![self.plugins()])
    }

    pub(crate) fn pod(&self, name: &str, families: Families) -> Result<Pod> {
        Pod::through(&self.node, self.node.numbered(name, families), self.chain()?)
    }

    pub(crate) fn is_chained(&self) -> bool {
        self.chain().is_ok_and(|chain| chain.types() == ["bridge", REDIRECT])
    }
}

fn captures(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let directories = Directories::new(&node, families)?;
    ensure!(directories.command(&["--check"]).output()?.status.code() == Some(1), "--check before");
    directories.run(&[])?;
    directories.run(&["--check"])?;
    let pod = directories.pod("installed", families)?;
    let other = node.plain("other", Families::Dual)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

/// Earlier pods can be deleted, later pods are not captured.
fn removed(context: &Context) -> Result<()> {
    let node = context.node()?;
    let directories = Directories::new(&node, Families::Dual)?;
    directories.run(&[])?;
    let before = directories.pod("before", Families::Dual)?;
    directories.run(&["--remove"])?;
    ensure!(directories.chain()?.types() == ["bridge"], "{:?}", directories.chain()?);
    ensure!(!directories.plugins().join(REDIRECT).exists(), "the plugin is still there");

    let after = directories.pod("after", Families::Dual)?;
    ensure!(node.report(&after)?.is_none(), "a pod is captured without the plugin");
    // The current chain can delete earlier pods; here another copy of the plugin informs the agent.
    let sandbox = before.sandbox().clone();
    before.end_without_del()?;
    node.chain(Families::Dual, &[]).only(REDIRECT).del(node.netns(), &sandbox, None)
}

/// Whenever the installer is killed, pods start, and the next run completes.
fn killed(context: &Context) -> Result<()> {
    let node = context.node()?;
    let directories = Directories::new(&node, Families::Dual)?;
    let started = Instant::now();
    directories.run(&[])?;
    let whole = started.elapsed();
    const KILLS: u32 = 12;
    let original: OsString = format!("{CONFIGURATION}.before-ambient-redirect").into();
    for kill in 0..KILLS {
        directories.run(&["--remove"])?;
        let mut child = directories.command(&[]).stdout(Stdio::null()).spawn()?;
        std::thread::sleep(whole * kill / KILLS);
        child.kill()?;
        child.wait()?;
        let types = directories.chain()?.types().len();
        directories.pod("survivor", Families::Dual).with_context(|| format!("a chain of {types} plugins"))?;
        directories.run(&[])?;
        ensure!(directories.is_chained(), "after kill {kill}");
        let names = fs::read_dir(directories.configurations())?.map(|entry| Ok(entry?.file_name()));
        let mut names = names.collect::<Result<Vec<_>>>()?;
        names.sort();
        ensure!(names == [CONFIGURATION.into(), original.clone()], "after kill {kill}: {names:?}");
    }
    Ok(())
}

/// The agent itself keeps the plugin in the chain, and leaves it for its successor.
fn by_the_agent(context: &Context) -> Result<()> {
    let node = Node::with(
        &context.session()?,
        NodeOptions { agent: false, proxy: false, ..NodeOptions::default() },
    )?;
    let directories = Directories::new(&node, Families::Dual)?;
    let configuration = directories.configurations().join(CONFIGURATION);
    fs::set_permissions(&configuration, fs::Permissions::from_mode(0o600))?;
    node.start_agent(&directories.agent_arguments())?;
    wait::until_true("chain with the plugin", SOON, || Ok(directories.is_chained()))?;
    ensure!(fs::metadata(&configuration)?.permissions().mode() & 0o7777 == 0o600, "permissions");

    node.start_proxy()?;
    let other = node.plain("other", Families::Dual)?;
    for stack in Stack::ALL {
        let pod = directories.pod("installed", Families::Dual)?;
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    directories.write_primary(Families::Dual)?;
    wait::until_true("repaired chain", Duration::from_secs(10), || Ok(directories.is_chained()))?;
    node.stop_agent()?;
    ensure!(
        directories.is_chained(),
        "the agent took the plugin out of the chain although another may follow"
    );
    Ok(())
}

/// The notifications to systemd.
struct Systemd {
    socket: UnixDatagram,
    received: Vec<String>,
}

impl Systemd {
    fn listen(node: &Node) -> Result<Self> {
        let socket = UnixDatagram::bind(notify_socket(node.dir()))?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, received: Vec::new() })
    }

    /// Whether a line with this prefix has arrived.
    fn has(&mut self, line: &str) -> bool {
        let mut buffer = [0; 4096];
        while let Ok(size) = self.socket.recv(&mut buffer) {
            self.received.extend(String::from_utf8_lossy(&buffer[..size]).lines().map(str::to_owned));
        }
        self.received.iter().any(|received| received.starts_with(line))
    }

    fn wait_for(&mut self, line: &str) -> Result<()> {
        let waited = wait::until_true(line, SOON, || Ok(self.has(line)));
        waited.with_context(|| format!("systemd received {:?}", self.received))
    }
}

/// The unit starts before container runtimes: it is ready only when the chain has the plugin.
fn ready_for_systemd(context: &Context) -> Result<()> {
    let node = Node::with(
        &context.session()?,
        NodeOptions { agent: false, proxy: false, ..NodeOptions::default() },
    )?;
    let mut systemd = Systemd::listen(&node)?;
    let directories = Directories::new(&node, Families::Dual)?;
    // Container runtimes accept this one, but it is too old for the plugin.
    let configuration = directories.configurations().join(CONFIGURATION);
    let old = fs::read_to_string(&configuration)?;
    let version = node.chain(Families::Dual, &[]).list()["cniVersion"].clone();
    fs::write(&configuration, old.replace(&version.to_string(), "\"0.2.0\""))?;
    node.start_agent(&directories.agent_arguments())?;
    systemd.wait_for("STATUS=not in place")?;
    ensure!(!systemd.has("READY=1"), "ready without the plugin in the chain: {:?}", systemd.received);

    directories.write_primary(Families::Dual)?;
    systemd.wait_for("READY=1")?;
    ensure!(directories.is_chained(), "ready, and the chain has no plugin");
    ensure!(!systemd.has("STOPPING=1"), "{:?}", systemd.received);
    node.stop_agent()?;
    systemd.wait_for("STOPPING=1")
}

/// Without a chain no container has a network. The chain may be installed by a container, which must not have to
/// wait.
fn ready_without_a_chain(context: &Context) -> Result<()> {
    let node = Node::with(
        &context.session()?,
        NodeOptions { agent: false, proxy: false, ..NodeOptions::default() },
    )?;
    let mut systemd = Systemd::listen(&node)?;
    let directories = Directories::new(&node, Families::Dual)?;
    fs::remove_file(directories.configurations().join(CONFIGURATION))?;
    node.start_agent(&directories.agent_arguments())?;
    systemd.wait_for("READY=1")
}
