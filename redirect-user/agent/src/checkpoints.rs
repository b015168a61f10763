//! Checkpoints of pods and proxies, from which the next agent identifies the pods that it finds enrolled.
//!
//! A checkpoint is only a hint: the agent observes whether its namespace still exists and what it contains. The files are on a
//! tmpfs, because everything that they describe ends with a reboot.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use redirect_datapath::facts::Sysctl;
use redirect_datapath::linux::EarlyDemuxNote;
use redirect_linux::netns::NetNs;
use redirect_protocol::input::read_file;
use redirect_protocol::pod::{PodIdentity, PodSettings};
use redirect_protocol::wire::Attachment;

/// The default directory of checkpoints.
pub const DEFAULT_DIRECTORY: &str = "/run/ambient-redirect/state";

/// The directory of checkpoints.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    directory: PathBuf,
}

/// The checkpoint of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The progress of its enrollment.
    pub phase: Phase,
    /// Its identity.
    pub identity: PodIdentity,
    /// The cookie of its network namespace, unique until the node reboots.
    pub netns_cookie: u64,
    /// The namespace's inode.
    pub netns_inode: u64,
    /// The path of the namespace.
    pub netns_path: Option<PathBuf>,
    /// Its attachments from the CNI plugin, with their addresses.
    pub attachments: Vec<(Attachment, Vec<IpAddr>)>,
    /// Its addresses in Kubernetes.
    pub declared: Vec<IpAddr>,
    /// The containers found in its namespace.
    pub containers: BTreeSet<String>,
    /// Its settings.
    pub settings: PodSettings,
    /// Sysctls that were on before it was enrolled.
    pub foreign: BTreeSet<Sysctl>,
    /// Whether it may have connections from before its enrollment. Checkpoints of earlier builds lack this.
    #[serde(default = "unknown")]
    pub earlier_connections: bool,
    /// Whether it ran before, and has been captured only recently.
    #[serde(default)]
    pub recent: bool,
    /// Whether the pod leaves the mesh, and its new connections go directly.
    #[serde(default)]
    pub leaving: bool,
}

const fn unknown() -> bool {
    true
}

/// The progress of an enrollment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The enrollment has not been acknowledged to anyone.
    Begun,
    /// The pod was enrolled.
    Done,
}

const PROXIES: &str = "proxies.json";

/// The maximum size of a checkpoint. Kubernetes limits a pod's annotations, which contain exclusions, to 256
/// KiB.
const LONGEST: usize = 4 << 20;

/// The maximum number of checkpoints: as many pods as an agent may enroll.
const MOST: usize = redirect_protocol::wire::MAX_ATTACHMENTS;

/// Exists if placement `node` has turned the sysctl off.
const EARLY_DEMUX: &str = "early-demux-was-on";

impl Checkpoints {
    /// Creates the directory if necessary.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let checkpoints = Self { directory: directory.into() };
        DirBuilder::new().recursive(true).mode(0o700).create(checkpoints.pods())?;
        Ok(checkpoints)
    }

    /// The checkpoints of a directory that may not exist.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.into() }
    }

    fn pods(&self) -> PathBuf {
        self.directory.join("pods")
    }

    fn file(&self, netns_cookie: u64) -> PathBuf {
        self.pods().join(format!("{netns_cookie}.json"))
    }

    /// Every pod's checkpoint; none if the directory does not exist. A checkpoint that can't be parsed is logged and skipped. One
    /// that can't be read is an error, because its pod would not be managed.
    pub fn read(&self) -> io::Result<Vec<Checkpoint>> {
        let entries = match fs::read_dir(self.pods()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?.collect::<io::Result<Vec<_>>>()?,
        };
        let paths = entries.into_iter().map(|entry| entry.path());
        let files = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        files.take(MOST).filter_map(|path| read(&path).transpose()).collect()
    }

    /// Writes a pod's checkpoint atomically.
    pub fn write(&self, checkpoint: &Checkpoint) -> Result<(), Failed> {
        write(&self.file(checkpoint.netns_cookie), checkpoint)
    }

    /// Removes a pod's checkpoint.
    pub fn remove(&self, netns_cookie: u64) -> Result<(), Failed> {
        let path = self.file(netns_cookie);
        gone(fs::remove_file(&path)).map_err(|source| Failed::Remove { path, source })
    }

    /// The cgroups of node proxies.
    #[must_use]
    pub fn proxies(&self) -> Vec<u64> {
        let path = self.directory.join(PROXIES);
        if path.exists() { read(&path).ok().flatten().unwrap_or_default() } else { Vec::new() }
    }

    /// Records the cgroups of node proxies.
    pub fn set_proxies(&self, cgroups: &[u64]) {
        if let Err(error) = write(&self.directory.join(PROXIES), cgroups) {
            tracing::warn!(%error, "the next agent will not know the node proxies' cgroups");
        }
    }

    /// The note that the sysctl was on that placement `node` turns off.
    #[must_use]
    pub fn early_demux(&self) -> EarlyDemuxNote {
        EarlyDemuxNote::at(self.directory.join(EARLY_DEMUX))
    }

    /// Removes all checkpoints, even while an agent writes there. If other files are in the directory, they and the directory
    /// stay.
    pub fn remove_all(&self) -> io::Result<()> {
        const ATTEMPTS: usize = 20;
        // Renamed first, so that a concurrent writer finds no directory.
        let (pods, moved) = (self.pods(), self.directory.join("pods.removed"));
        if pods.is_symlink() || moved.is_symlink() {
            return Ok(());
        }
        for _ in 0..ATTEMPTS {
            match gone(fs::rename(&pods, &moved)) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                renamed => renamed?,
            }
            if self.remove_ours(&moved)? {
                return Ok(());
            }
        }
        // It contains other files.
        gone(fs::rename(&moved, &pods))
    }

    /// Returns whether nothing is left.
    fn remove_ours(&self, pods: &Path) -> io::Result<bool> {
        let is_record = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "json" || kind == "new");
        let written = fs::read_dir(pods).into_iter().flatten().flatten().map(|entry| entry.path());
        let ours = written.filter(is_record);
        let names = [PROXIES, EARLY_DEMUX].map(|name| self.directory.join(name));
        let unfinished = names.clone().map(|path| path.with_extension("new"));
        for path in ours.chain(names).chain(unfinished) {
            gone(fs::remove_file(&path))?;
        }
        for directory in [pods, &self.directory] {
            match gone(fs::remove_dir(directory)) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => return Ok(false),
                removed => removed?,
            }
        }
        Ok(true)
    }
}

/// A missing file is no error.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// `None`: it can't be parsed.
fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let parsed = match read_file(path, LONGEST) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::from),
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::FileTooLarge].contains(&error.kind()) => {
            Err(error)
        }
        Err(error) => {
            let remedy = "start the agent again, or remove the file and restart its pod";
            return Err(io::Error::other(format!("{}: {error}; {remedy}", path.display())));
        }
    };
    let shown = path.display();
    Ok(parsed.inspect_err(|error| tracing::warn!(path = %shown, %error, "cannot read checkpoint")).ok())
}

/// The error of a checkpoint's change.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// It could not be written.
    #[error("cannot write checkpoint {}: {source}; is its file system full?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It could not be removed.
    #[error("cannot remove checkpoint {}: {source}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The agent is shutting down.
    #[error("checkpoint is not written any more: the agent ends")]
    Ending,
}

fn write<T: Serialize + ?Sized>(path: &Path, content: &T) -> Result<(), Failed> {
    let unfinished = path.with_extension("new");
    let written = serde_json::to_vec(content)
        .map_err(io::Error::other)
        .and_then(|text| fs::write(&unfinished, text))
        .and_then(|()| fs::rename(&unfinished, path));
    written.map_err(|source| {
        // Frees its space; the next attempt overwrites it.
        _ = fs::remove_file(&unfinished);
        Failed::Write { path: path.into(), source }
    })
}

/// A checkpoint, and its namespace if that still exists.
#[derive(Clone, Debug)]
pub struct Found {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The namespace.
    pub netns: Option<NetNs>,
}

/// Finds the namespaces of checkpoints: by their paths, then among those of all processes and mounts. Fails if it can't identify
/// a namespace that may be a pod's: to treat it as ended would leave our changes in it.
pub fn find(checkpoints: Vec<Checkpoint>) -> io::Result<Vec<Found>> {
    let mut everywhere = None;
    let find = |checkpoint: Checkpoint| {
        let its_own = |path: &Path| -> io::Result<Option<NetNs>> {
            let Ok(netns) = NetNs::open(path) else { return Ok(None) };
            let is_it =
                netns.inode()? == checkpoint.netns_inode && netns.cookie()? == checkpoint.netns_cookie;
            Ok(is_it.then_some(netns))
        };
        let search = || -> io::Result<Option<NetNs>> {
            for path in checkpoint.netns_path.iter().flat_map(|path| places(path)) {
                if let Some(netns) = its_own(&path)? {
                    return Ok(Some(netns));
                }
            }
            let everywhere = everywhere.get_or_insert_with(namespaces);
            everywhere.get(&checkpoint.netns_inode).map_or(Ok(None), |path| its_own(path))
        };
        let netns = { search }().map_err(|error| {
            let pod = &checkpoint.identity;
            io::Error::new(error.kind(), format!("pod {pod}: cannot identify its network namespace: {error}"))
        })?;
        Ok(Found { netns, checkpoint })
    };
    checkpoints.into_iter().map(find).collect()
}

/// A path as the agent sees it, and as the host does.
fn places(path: &Path) -> [PathBuf; 2] {
    [path.to_owned(), host_path(path)]
}

fn host_path(path: &Path) -> PathBuf {
    Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path))
}

/// Every network namespace of the node that has a process or a mount, by inode, with a path to it.
#[must_use]
pub fn namespaces() -> BTreeMap<u64, PathBuf> {
    let mut found = HashMap::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes.filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit()) {
        let path = process.path().join("ns/net");
        if let Ok(link) = fs::read_link(&path)
            && let Some(inode) = inode(&link.to_string_lossy())
        {
            found.entry(inode).or_insert(path);
        }
    }
    for (process, host) in [("self", false), ("1", true)] {
        let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
        for line in table.lines() {
            // "id parent major:minor root mount-point …"; the root of a namespace's mount is its name.
            let mut fields = line.split(' ').skip(3);
            let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
            if let Some(inode) = inode(root) {
                let point = Path::new(point);
                found.entry(inode).or_insert_with(|| if host { host_path(point) } else { point.into() });
            }
        }
    }
    found.into_iter().collect()
}

/// The number in `net:[4026531840]`.
fn inode(name: &str) -> Option<u64> {
    name.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use ipnet::IpNet;
    use redirect_ebpf::{Direction, Family};

    use super::*;
    use redirect_protocol::pod::Exclusion;

    fn checkpoint() -> Checkpoint {
        let network: IpNet = "fd00:1::/64".parse().unwrap();
        Checkpoint {
            earlier_connections: false,
            recent: false,
            leaving: false,
            phase: Phase::Done,
            identity: PodIdentity { uid: "../odd uid".into(), name: "pod".into(), ..PodIdentity::default() },
            netns_cookie: 7,
            netns_inode: 8,
            netns_path: Some("/run/netns/pod".into()),
            attachments: vec![(
                Attachment { container_id: "c".into(), interface: "eth0".into() },
                vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            )],
            declared: Vec::new(),
            containers: ["c".to_owned()].into(),
            settings: PodSettings {
                bypass_inbound: true,
                dns: Some(false),
                any_source: Some(true),
                exclusions: [
                    Exclusion::Port(Direction::Inbound, 9090),
                    Exclusion::Network(Direction::Outbound, network),
                ]
                .into(),
                virtual_interfaces: vec!["tap0".into()],
            },
            foreign: [Sysctl::FwmarkReflect(Family::Ipv6)].into(),
        }
    }

    #[test]
    fn everything_is_removed_although_an_agent_writes() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        for _ in 0..50 {
            let checkpoints = Checkpoints::open(&state).unwrap();
            let over = AtomicBool::new(false);
            let write = |number: u64| {
                let mut checkpoint = checkpoint();
                checkpoint.identity.uid = number.to_string();
                while !over.load(Ordering::Relaxed) {
                    _ = checkpoints.write(&checkpoint);
                }
            };
            let removed = std::thread::scope(|scope| {
                let write = &write;
                (0..4).for_each(|number| drop(scope.spawn(move || write(number))));
                let removed = checkpoints.remove_all();
                over.store(true, Ordering::Relaxed);
                removed
            });
            removed.unwrap();
            assert!(!state.exists());
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(&directory.path().join("state")).unwrap();
        checkpoints.write(&checkpoint()).unwrap();
        checkpoints.set_proxies(&[5, 6]);
        assert!(!checkpoints.early_demux().is_there());
        checkpoints.early_demux().write();
        assert_eq!(checkpoints.read().unwrap(), [checkpoint()]);
        assert_eq!(checkpoints.proxies(), [5, 6]);
        assert!(checkpoints.early_demux().is_there());
        checkpoints.remove(7).unwrap();
        checkpoints.remove(7).unwrap();
        assert!(checkpoints.read().unwrap().is_empty());
        checkpoints.remove_all().unwrap();
        checkpoints.remove_all().unwrap();
        assert!(checkpoints.proxies().is_empty());
    }

    #[test]
    fn only_records_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(directory.path()).unwrap();
        checkpoints.write(&checkpoint()).unwrap();
        checkpoints.set_proxies(&[5]);
        fs::write(directory.path().join("pods/notes.txt"), "").unwrap();
        fs::create_dir(directory.path().join("others")).unwrap();
        fs::write(directory.path().join("others/8.json"), "").unwrap();
        checkpoints.remove_all().unwrap();
        assert!(checkpoints.read().unwrap().is_empty() && checkpoints.proxies().is_empty());
        assert!(directory.path().join("pods/notes.txt").exists());
        assert!(directory.path().join("others/8.json").exists());
    }

    #[test]
    fn records_behind_a_link_are_not_removed() {
        let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(elsewhere.path().join("8.json"), "").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), directory.path().join("pods")).unwrap();
        Checkpoints::at(directory.path()).remove_all().unwrap();
        assert!(elsewhere.path().join("8.json").exists());
    }

    #[test]
    fn half_written_and_foreign_files_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(directory.path()).unwrap();
        checkpoints.write(&checkpoint()).unwrap();
        fs::write(directory.path().join("pods/8.json"), "{").unwrap();
        fs::write(directory.path().join("pods/9.new"), "{}").unwrap();
        // A file without an end.
        std::os::unix::fs::symlink("/dev/zero", directory.path().join("pods/10.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", directory.path().join(PROXIES)).unwrap();
        assert_eq!(checkpoints.read().unwrap().len(), 1);
        assert!(checkpoints.proxies().is_empty());
    }

    #[test]
    fn a_namespace_is_found_by_its_inode_and_cookie_not_by_its_path() {
        let own = NetNs::current().unwrap();
        let Ok(netns_cookie) = own.cookie() else { return };
        let living = Checkpoint {
            netns_cookie,
            netns_inode: own.inode().unwrap(),
            netns_path: Some("/nowhere".into()),
            ..checkpoint()
        };
        let another = Checkpoint { netns_path: Some("/proc/self/ns/net".into()), ..checkpoint() };
        let reused = Checkpoint { netns_cookie: 1 << 60, ..living.clone() };
        let found = find(vec![living, another, reused]).unwrap();
        let found: Vec<bool> = found.iter().map(|found| found.netns.is_some()).collect();
        assert_eq!(found, [true, false, false]);
    }
}
