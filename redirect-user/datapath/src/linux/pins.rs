//! State that outlives the agent: maps and links, pinned in a directory of a bpffs.
//!
//! ```text
//!  /sys/fs/bpf/ambient-redirect/
//!      maps-v1/PODS-1-8-4-1024-1 …       each map by name and layout
//!      links/outbound_ipv4 …             on the root of the cgroup2 hierarchy
//!      links/probe-CGROUP                on the kubelet's cgroup
//!      links/noted_listener-COOKIE …     on a pod's namespace
//!      links/inbound_ipv4-COOKIE-INDEX … on an interface of a pod, with `--tc tcx`
//! ```
//!
//! The name of a map's pin contains its layout (sizes, capacity, and the meaning of its contents: [`LAYOUT`]). A map of
//! another layout is created next to the old one and filled, and the new programs use it from the moment they replace the
//! old ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use redirect_ebpf::maps::{LAYOUT, Pod, PodAddress, PodFlags};

use crate::facts::Lookup;
use redirect_linux::bpffs::{Bpffs, NO_BPFFS_REMEDY, bpffs, mount_bpffs};
use redirect_linux::link::{Link, Place, Program, State};

/// Where maps and links are pinned.
pub const DEFAULT_DIRECTORY: &str = "/sys/fs/bpf/ambient-redirect";

/// How long an agent waits for its predecessor to end.
const PREDECESSOR: Duration = Duration::from_secs(5);

/// The subdirectory of the links.
pub(super) const LINKS: &str = "links";

/// The pin directory, locked so that no second agent works on it.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    _lock: File,
}

/// Another agent holds the directory.
#[derive(Debug, thiserror::Error)]
#[error("another agent uses {}: stop it first", .0.display())]
pub struct InUse(pub PathBuf);

impl Pins {
    /// Creates the directory if necessary, and locks it.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        match bpffs(directory).with_context(|| format!("cannot examine the pin directory {shown}"))? {
            Some(Bpffs::Mounted) => {}
            Some(Bpffs::Mountable) => mount_bpffs()?,
            None => bail!("the pin directory {shown} is not on a bpffs: {NO_BPFFS_REMEDY}"),
        }
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(directory).with_context(|| format!("cannot create the pin directory {shown}"))?;
        let waited = Instant::now();
        let lock = loop {
            match Self::lock(directory)? {
                Some(lock) => break lock,
                None if waited.elapsed() < PREDECESSOR => thread::sleep(Duration::from_millis(50)),
                None => return Err(InUse(directory.into()).into()),
            }
        };
        let pins = Self { directory: directory.into(), _lock: lock };
        for path in [pins.links(), pins.maps()] {
            make(&path).with_context(|| format!("{} can't be made", path.display()))?;
        }
        Ok(pins)
    }

    /// Locks an existing directory; `None` if there is none.
    pub fn open_existing(directory: &Path, force: bool) -> anyhow::Result<Option<Self>> {
        let lock = match Self::lock(directory) {
            Ok(Some(lock)) => lock,
            Ok(None) if force => File::open(directory)?,
            Ok(None) => return Err(InUse(directory.into()).into()),
            Err(error) if is_not_found(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(Self { directory: directory.into(), _lock: lock }))
    }

    /// `None`: another agent has it.
    fn lock(directory: &Path) -> anyhow::Result<Option<File>> {
        let name = || format!("pin directory {}", directory.display());
        let file = File::open(directory).with_context(name)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(name),
        }
    }

    pub(super) fn links(&self) -> PathBuf {
        self.directory.join(LINKS)
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.directory.join(format!("maps-v{LAYOUT}"))
    }

    /// The cookies of the namespaces that have a link.
    pub fn cookies(&self) -> BTreeSet<u64> {
        let entries = fs::read_dir(self.links()).into_iter().flatten().flatten();
        entries.filter_map(|entry| cookie_of_lookup(entry.file_name().to_str()?)).collect()
    }

    /// The pins of a map: one per layout and capacity.
    fn maps_named(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(self.maps()).into_iter().flatten().flatten();
        let start = format!("{name}-");
        entries
            .filter(move |entry| entry.file_name().to_string_lossy().starts_with(&start))
            .map(|entry| entry.path())
    }

    /// The indices of the host's devices that lead to pods.
    pub fn devices(&self) -> BTreeSet<u32> {
        let indices = self.maps_named("INTERFACES").filter_map(|pin| {
            let map = Map::HashMap(MapData::from_pin(pin).ok()?);
            let map = BpfHashMap::<_, u32, PodAddress>::try_from(map).ok()?;
            Some(map.keys().flatten().collect::<Vec<_>>())
        });
        indices.flatten().collect()
    }

    /// Stops the capture of new connections of all pods, so that the order of the removal does not matter.
    pub fn release(&self) -> anyhow::Result<()> {
        for pin in self.maps_named("PODS") {
            let map = Map::HashMap(MapData::from_pin(pin)?);
            let mut pods = BpfHashMap::<_, u64, Pod>::try_from(map)?;
            for cookie in pods.keys().collect::<Result<Vec<_>, _>>()? {
                let pod = pods.get(&cookie, 0)?;
                let flags = PodFlags(pod.flags).released().0;
                pods.insert(cookie, Pod { flags, ..pod }, 0)?;
            }
        }
        Ok(())
    }

    /// Removes the maps that no program uses any more: every one but these.
    pub(super) fn remove_other_maps(&self, current: &[PathBuf]) -> anyhow::Result<()> {
        let maps = self.maps();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path != maps && is_of_maps(&path) {
                tracing::info!(path = %path.display(), "removing maps of another layout");
                fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
            }
        }
        for entry in fs::read_dir(&maps)? {
            let path = entry?.path();
            if !current.contains(&path) {
                tracing::info!(path = %path.display(), "removing a map of another layout");
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }

    /// Removes the pins of agents of any version, and returns them. If other files are in the directory, they and the
    /// directory stay.
    pub fn remove(self) -> anyhow::Result<Vec<PathBuf>> {
        remove_ours(&self.directory).with_context(|| format!("pin directory {}", self.directory.display()))
    }

    /// The pin directories of other running agents, on every bpffs that is mounted here.
    pub fn of_others(own: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let own = own.canonicalize().unwrap_or_else(|_| own.into());
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
        let roots = mounts.lines().filter_map(bpffs_of_mount);
        let directories: BTreeSet<PathBuf> = roots.flat_map(|root| below(&root, DEPTH)).collect();
        let others =
            directories.into_iter().filter(|directory| *directory != own && is_pin_directory(directory));
        // A directory that has been removed meanwhile is skipped.
        Ok(others.filter(|directory| matches!(Self::lock(directory), Ok(None))).collect())
    }
}

/// How deep to search a bpffs for pin directories.
const DEPTH: usize = 2;

/// The mount point, if the line of `mountinfo` describes a bpffs:
/// `… mount-point options … - bpf source options`.
fn bpffs_of_mount(line: &str) -> Option<PathBuf> {
    let (mount, source) = line.split_once(" - ")?;
    source.starts_with("bpf ").then(|| mount.split(' ').nth(4).map(PathBuf::from)).flatten()
}

/// A directory and its subdirectories, without following links.
fn below(directory: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    if depth > 0 {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        found.extend(directories.flat_map(|entry| below(&entry.path(), depth - 1)));
    }
    found
}

fn is_pin_directory(directory: &Path) -> bool {
    let names: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
    names.iter().any(|entry| entry.file_name() == LINKS)
        && names.iter().any(|entry| is_of_maps(&entry.path()))
}

/// Links go first: programs keep their maps. Pins with other names, and anything behind a symbolic link, are not ours.
fn remove_ours(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let mut entries =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    entries.retain(|path| path.symlink_metadata().is_ok_and(|found| found.is_dir()));
    entries.retain(|path| path.ends_with(LINKS) || is_of_maps(path));
    entries.sort();
    for path in entries {
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::remove_file(entry.path())?;
                removed.push(entry.path());
            }
        }
        remove_if_empty(&path)?;
    }
    remove_if_empty(directory)?;
    Ok(removed)
}

fn remove_if_empty(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        // The root of a mount can't be removed, and need not be.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) =>
        {
            Ok(())
        }
        removed => removed,
    }
}

fn is_of_maps(path: &Path) -> bool {
    let version =
        path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("maps-v"));
    version.is_some_and(|version| !version.is_empty() && version.bytes().all(|digit| digit.is_ascii_digit()))
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The name of a link on a namespace's socket lookup.
pub(super) fn lookup_name(lookup: Lookup, netns_cookie: u64) -> String {
    format!("{}-{netns_cookie}", lookup.program())
}

/// The namespace of the link with this name, if it is one on a socket lookup.
pub(super) fn cookie_of_lookup(name: &str) -> Option<u64> {
    let (program, cookie) = name.split_once('-')?;
    let known = Lookup::ALL.map(Lookup::program).contains(&program) || program == Lookup::FORMER;
    known.then(|| cookie.parse().ok()).flatten()
}

/// The names of all links on the socket lookup of a namespace, those of earlier builds included.
pub(super) fn lookup_names(netns_cookie: u64) -> [String; 3] {
    let [listener, guard] = Lookup::ALL.map(|lookup| lookup_name(lookup, netns_cookie));
    [listener, guard, format!("{}-{netns_cookie}", Lookup::FORMER)]
}

/// The pinned links.
#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
    links: BTreeMap<String, Link>,
}

impl Links {
    /// Finds the existing ones.
    pub(super) fn find(pins: &Pins) -> anyhow::Result<Self> {
        let directory = pins.links();
        let mut links = BTreeMap::new();
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            match Link::open(&path) {
                Ok(link) if !name.ends_with(UNFINISHED) => {
                    links.insert(name.to_owned(), link);
                }
                // Not a link, or an unfinished one.
                _ => fs::remove_file(&path).with_context(|| path.display().to_string())?,
            }
        }
        Ok(Self { directory, links })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.links.keys().map(String::as_str)
    }

    /// `None`: there is no such link. One that is no longer pinned counts as elsewhere.
    pub(super) fn state(&self, name: &str, program: &Program, place: Place<'_>) -> io::Result<Option<State>> {
        let Some(link) = self.links.get(name) else { return Ok(None) };
        let state = link.state(program, place)?;
        let pinned = self.directory.join(name).exists();
        Ok(Some(if pinned { state } else { State::Elsewhere }))
    }

    /// Whether the link's target still exists.
    pub(super) fn is_attached(&self, name: &str) -> bool {
        self.links.get(name).is_some_and(|link| link.is_attached().unwrap_or(false))
    }

    /// Ensures that the link with this name attaches the program to the place: updates the existing link if it has another
    /// program, or creates one.
    pub(super) fn ensure(&mut self, name: &str, program: &Program, place: Place<'_>) -> io::Result<()> {
        match self.links.get(name) {
            Some(link) => match link.state(program, place)? {
                State::Current => {}
                State::Stale => link.update(program)?,
                State::Elsewhere => return self.replace(name, program, place),
            },
            None => return self.replace(name, program, place),
        }
        self.pin(name)
    }

    fn replace(&mut self, name: &str, program: &Program, place: Place<'_>) -> io::Result<()> {
        let link = Link::create(program, place)?;
        let unfinished = self.directory.join(format!("{name}{UNFINISHED}"));
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        link.pin(&unfinished)?;
        if let Err(error) = fs::rename(&unfinished, self.directory.join(name)) {
            // Its pin would keep the link alive.
            fs::remove_file(&unfinished)?;
            return Err(error);
        }
        self.links.insert(name.to_owned(), link);
        Ok(())
    }

    /// Restores a link's pin that was removed.
    fn pin(&self, name: &str) -> io::Result<()> {
        let pin = self.directory.join(name);
        match self.links.get(name) {
            Some(link) if !pin.exists() => {
                fs::create_dir_all(&self.directory)?;
                link.pin(&pin)
            }
            _ => Ok(()),
        }
    }

    /// Detaches the link with this name, if it exists.
    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        let Some(link) = self.links.get(name) else { return Ok(()) };
        link.detach()?;
        match fs::remove_file(self.directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.links.remove(name);
        Ok(())
    }
}

/// The suffix of the pins of links that are not yet in their final place.
const UNFINISHED: &str = "-new";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The files in a directory, by their relative paths.
    fn files(directory: &Path) -> BTreeSet<PathBuf> {
        let all = below(directory, 5);
        let entries = all.iter().flat_map(|directory| fs::read_dir(directory).unwrap().flatten());
        let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
        files.map(|entry| entry.path().strip_prefix(directory).unwrap().to_owned()).collect()
    }

    #[test]
    fn only_what_agents_pin_is_removed() {
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("precious"), "").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let ours = ["links/outbound_ipv4", "links/probe-17", "maps-v1/PODS-1-8-12-1024-1", "maps-v12/OLD"];
        let others = ["tc/globals/cilium_lxc", "cilium_state", "maps-vx/a", "maps-v/a", "links/deeper/a"];
        for file in ours.iter().chain(&others) {
            let path = directory.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        symlink(elsewhere.path(), directory.join("maps-v3")).unwrap();
        symlink(elsewhere.path().join("precious"), directory.join("links/linked")).unwrap();

        let removed: BTreeSet<PathBuf> = remove_ours(directory).unwrap().into_iter().collect();
        assert_eq!(removed, ours.iter().map(|file| directory.join(file)).collect());
        assert_eq!(files(directory), others.iter().map(PathBuf::from).collect());
        assert!(elsewhere.path().join("precious").exists());
    }

    #[test]
    fn a_directory_with_nothing_else_goes_as_well() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("pins");
        for folder in ["links", "maps-v1"] {
            fs::create_dir_all(directory.join(folder)).unwrap();
            fs::write(directory.join(folder).join("a"), "").unwrap();
        }
        assert_eq!(remove_ours(&directory).unwrap().len(), 2);
        assert!(!directory.exists());
    }

    #[test]
    fn mounts_of_a_bpffs_are_told_from_others() {
        let cases = [
            ("30 23 0:27 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700", Some("/sys/fs/bpf")),
            ("31 23 0:28 / /bpf rw - tmpfs bpf rw", None),
            ("nonsense", None),
        ];
        for (line, expected) in cases {
            assert_eq!(bpffs_of_mount(line).as_deref(), expected.map(Path::new), "{line}");
        }
    }
}
