//! The shared state of a test process: its cgroup, the binaries under test, and the final check.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use redirect_protocol::placement::Placement;
use tempfile::TempDir;

use crate::cgroup::{self, Cgroup, PREFIX};
use crate::kernel::Objects;
use crate::proxy::ProxyKind;
use crate::wait;

/// The binaries under test.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// `redirect`.
    pub redirect: PathBuf,
    /// `redirect-cni`.
    pub plugin: PathBuf,
    /// The node proxy; the same as `redirect` for the embedded one.
    pub proxy: PathBuf,
    /// What kind of proxy that is.
    pub kind: ProxyKind,
    /// The applications of [`crate::testbed`] as a program.
    pub testbed: PathBuf,
}

impl Binaries {
    /// The binaries in `REDIRECT_BIN`, `REDIRECT_CNI_BIN` and `REDIRECT_PROXY_BIN`, by default the release build of
    /// this workspace.
    pub fn from_env() -> Result<Self> {
        let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let release =
            Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join(triple).join("release");
        let named = |variable, default: PathBuf| std::env::var_os(variable).map_or(default, PathBuf::from);
        let redirect = named("REDIRECT_BIN", release.join("redirect"));
        let proxy = named("REDIRECT_PROXY_BIN", redirect.clone());
        Ok(Self {
            plugin: named("REDIRECT_CNI_BIN", release.join("redirect-cni")),
            kind: ProxyKind::of(&proxy)?,
            proxy,
            testbed: named("REDIRECT_TESTBED_BIN", testbed()),
            redirect,
        })
    }

    /// Checks that all of them exist.
    pub fn check(&self) -> Result<()> {
        for path in [&self.redirect, &self.plugin, &self.proxy] {
            if !path.is_file() {
                return Err(anyhow!("{} is missing: build it with `cargo xtask build`", path.display()));
            }
        }
        Ok(())
    }
}

/// Cargo puts it beside the programs; tests are one directory further down.
fn testbed() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let directories = own.ancestors().skip(1).take(2).map(|directory| directory.join("testbed"));
    directories.into_iter().find(|path| path.is_file()).unwrap_or_else(|| "testbed".into())
}

/// A run of tests or of the demo.
#[derive(Clone, Debug)]
pub struct Session {
    placement: Placement,
    binaries: Arc<Binaries>,
    plugins: PathBuf,
    run: Arc<Run>,
}

/// Puts the plugin where the chain finds it.
fn offer(plugin: &Path, directory: &Path) -> Result<()> {
    if let Ok(plugin) = plugin.canonicalize() {
        symlink(plugin, directory.join(crate::cni::REDIRECT))?;
    }
    Ok(())
}

/// State that exists once per run.
#[derive(Debug)]
struct Run {
    directory: TempDir,
    home: PathBuf,
    nodes: Mutex<Numbers>,
    made: Mutex<Vec<Objects>>,
    // Fields are dropped in this order: the inner cgroup goes before the outer one.
    applications: Cgroup,
    cgroup: Cgroup,
}

impl Session {
    /// Moves this process, and with it every application in the pods, to a cgroup of its own.
    pub fn start(binaries: Binaries) -> Result<Arc<Self>> {
        cgroup::sweep()?;
        sweep_directories()?;
        sweep_pins()?;
        let directory =
            tempfile::Builder::new().prefix(&format!("{PREFIX}{}-", std::process::id())).tempdir()?;
        let plugins = directory.path().to_owned();
        offer(&binaries.plugin, &plugins)?;
        let home = cgroup::current()?;
        let cgroup = Cgroup::for_this_process()?;
        let applications = cgroup.child("applications")?;
        cgroup::enter(applications.path())?;
        let run =
            Run { directory, home, nodes: Mutex::default(), made: Mutex::default(), applications, cgroup };
        Ok(Arc::new(Self {
            placement: Placement::Pod,
            binaries: Arc::new(binaries),
            plugins,
            run: Arc::new(run),
        }))
    }

    /// The same run; its further nodes have proxies with this placement.
    #[must_use]
    pub fn placed(&self, placement: Placement) -> Arc<Self> {
        Arc::new(Self { placement, ..self.clone() })
    }

    /// The same run; its further nodes have another build of agent and plugin.
    pub fn with_build(&self, redirect: PathBuf, plugin: PathBuf) -> Result<Arc<Self>> {
        let plugins = self.directory().join("other-build");
        fs::create_dir(&plugins).with_context(|| plugins.display().to_string())?;
        offer(&plugin, &plugins)?;
        let binaries = Binaries { redirect, plugin, ..self.binaries().clone() };
        binaries.check()?;
        Ok(Arc::new(Self { binaries: Arc::new(binaries), plugins, ..self.clone() }))
    }

    /// Where the proxies of nodes are.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// The binaries under test.
    #[must_use]
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The cgroup that holds every process of the session.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.run.cgroup
    }

    /// The cgroup of this process and of the applications.
    #[must_use]
    pub fn applications(&self) -> &Cgroup {
        &self.run.applications
    }

    /// A directory for files of the session.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.run.directory.path()
    }

    /// Where the plugins of the chain are.
    #[must_use]
    pub fn plugin_directories(&self) -> Vec<PathBuf> {
        let installed = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"].map(PathBuf::from);
        let installed = installed.into_iter().filter(|path| path.is_dir());
        [self.plugins.clone()].into_iter().chain(installed).collect()
    }

    /// Where agents pin what outlives them.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        pins()
    }

    /// A number for a node, from which its address ranges are derived; released when dropped.
    pub(crate) fn next_node(&self) -> Result<NodeNumber> {
        let mut numbers = self.run.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        // Not immediately a released number: others may still know its addresses.
        let next = numbers.next;
        let free = (next..=u8::MAX).chain(0..next).find(|number| !numbers.taken.contains(number));
        let number = free.context("too many nodes at once")?;
        numbers.next = number.wrapping_add(1);
        numbers.taken.insert(number);
        Ok(NodeNumber { number, run: self.run.clone() })
    }

    /// Records an agent's objects, for [`Session::leftovers`].
    pub(crate) fn remember(&self, objects: Objects) {
        self.run.made.lock().unwrap_or_else(PoisonError::into_inner).push(objects);
    }

    /// Everything that should be gone once every node is, but is not: BPF objects, cgroups, pins, processes.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for objects in self.run.made.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            left.extend(objects.wait_until_gone().err().map(|error| format!("{error:#}")));
        }
        let mut others = Ok(Vec::new());
        // Processes that were just told to end, such as the helpers of a container runtime, may take a
        // moment.
        wait::for_cleanup(wait::SOON, || {
            others = self.outside_the_kernel();
            others.as_ref().is_ok_and(Vec::is_empty)
        });
        left.extend(others?);
        Ok(left)
    }

    fn outside_the_kernel(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for entry in fs::read_dir(self.cgroup().path())?.flatten().filter(|entry| entry.path().is_dir()) {
            if entry.path() != self.applications().path() {
                left.push(format!("cgroup {}", entry.path().display()));
            }
        }
        let pins = fs::read_dir(self.pins()).into_iter().flatten().flatten();
        left.extend(pins.map(|entry| format!("pins {}", entry.path().display())));
        let others = self.applications().processes()?.into_iter().filter(|&pid| pid != std::process::id());
        left.extend(others.map(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            format!("process {pid} ({})", command.replace('\0', " ").trim_end())
        }));
        Ok(left)
    }
}

/// The numbers of nodes.
#[derive(Debug, Default)]
struct Numbers {
    next: u8,
    taken: BTreeSet<u8>,
}

/// A number that no other node has while this value lives.
#[derive(Debug)]
pub(crate) struct NodeNumber {
    number: u8,
    run: Arc<Run>,
}

impl NodeNumber {
    pub(crate) fn get(&self) -> u8 {
        self.number
    }
}

impl Drop for NodeNumber {
    fn drop(&mut self) {
        let mut numbers = self.run.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.taken.remove(&self.number);
    }
}

/// The usual bpffs. Agents mount one if there is none.
const BPFFS: &str = "/sys/fs/bpf";

/// Removes the pins of tests that were killed.
fn sweep_pins() -> Result<()> {
    for entry in fs::read_dir(BPFFS)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(process) = name.strip_prefix(PREFIX)
            && !Path::new("/proc").join(process).exists()
        {
            // Another test may be cleaning up as well.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Removes the directories of tests that were killed.
fn sweep_directories() -> Result<()> {
    for entry in fs::read_dir(tempfile::env::temp_dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((process, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            // Another test may be cleaning up as well.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// The pin directory of this process's agents.
fn pins() -> PathBuf {
    Path::new(BPFFS).join(format!("{PREFIX}{}", std::process::id()))
}

impl Drop for Run {
    fn drop(&mut self) {
        // It exists if any agent ran; nodes leave it empty.
        let _ = fs::remove_dir(pins());
        if let Err(error) = cgroup::enter(&self.home).context("leave the session's cgroup") {
            eprintln!("{error:#}");
        }
    }
}
