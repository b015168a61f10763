//! What outlives the agent: maps and links, pinned in a directory of a bpffs.
//!
//! ```text
//!  /sys/fs/bpf/ambient-redirect/
//!      maps-v1/PODS-1-8-4-1024-1 …       each map by name and layout
//!      links/outbound_ipv4 …             on the root of the cgroup2 hierarchy
//!      links/probe-CGROUP                on the kubelet's cgroup
//!      links/listener_lookup-COOKIE …    on a pod's namespace
//!      links/inbound_ipv4-COOKIE-INDEX … on an interface of a pod, with `--tc tcx`
//! ```
//!
//! A map of another layout (other sizes, another capacity, or another meaning: [`LAYOUT`]) has another name, so that it is
//! made beside the old one, filled, and used by the new programs from the moment at which they replace the old ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use redirect_ebpf::maps::LAYOUT;

use crate::facts::Lookup;
use redirect_linux::bpffs::{Bpffs, NO_BPFFS_REMEDY, bpffs, mount_bpffs};
use redirect_linux::link::{Link, Place, Program, State};

/// Where maps and links are pinned.
pub const DEFAULT_DIRECTORY: &str = "/sys/fs/bpf/ambient-redirect";

/// How long an agent waits for the one before it to end.
const PREDECESSOR: Duration = Duration::from_secs(5);

/// The directory, held so that no second agent works on it.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    _lock: File,
}

/// Why the directory can't be had.
#[derive(Debug, thiserror::Error)]
#[error("another agent uses {}: end it first", .0.display())]
pub struct InUse(PathBuf);

impl Pins {
    /// Makes the directory if need be, and takes it.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let shown = directory.display();
        match bpffs(directory).with_context(|| format!("the pin directory {shown} can't be examined"))? {
            Some(Bpffs::Mounted) => {}
            Some(Bpffs::Mountable) => mount_bpffs()?,
            None => bail!("the pin directory {shown} is not on a bpffs: {NO_BPFFS_REMEDY}"),
        }
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(directory).with_context(|| format!("the pin directory {shown} can't be made"))?;
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

    /// Takes a directory that is there; `None` if there is none.
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
        self.directory.join("links")
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.directory.join(format!("maps-v{LAYOUT}"))
    }

    /// The cookies of the namespaces that have a link.
    pub fn cookies(&self) -> BTreeSet<u64> {
        let entries = fs::read_dir(self.links()).into_iter().flatten().flatten();
        entries.filter_map(|entry| cookie_of_lookup(entry.file_name().to_str()?)).collect()
    }

    /// Removes the maps that no program uses any more: every one but these.
    pub(super) fn remove_other_maps(&self, current: &[PathBuf]) -> anyhow::Result<()> {
        let maps = self.maps();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path != maps
                && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("maps-"))
            {
                tracing::info!(path = %path.display(), "maps of another layout are removed");
                fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
            }
        }
        for entry in fs::read_dir(&maps)? {
            let path = entry?.path();
            if !current.contains(&path) {
                tracing::info!(path = %path.display(), "a map of another layout is removed");
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        Ok(())
    }

    /// Removes everything, and returns what there was.
    pub fn remove(self) -> anyhow::Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        remove_tree(&self.directory, &mut removed)
            .with_context(|| format!("pin directory {}", self.directory.display()))?;
        Ok(removed)
    }
}

/// Links go first: programs keep their maps.
fn remove_tree(directory: &Path, removed: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            remove_tree(&path, removed)?;
        } else {
            fs::remove_file(&path)?;
            removed.push(path);
        }
    }
    fs::remove_dir(directory)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The name of a link on a namespace's socket lookup.
pub(super) fn lookup_name(lookup: Lookup, netns_cookie: u64) -> String {
    format!("{}-{netns_cookie}", lookup.program())
}

/// The namespace of the link of this name, if it is one on a socket lookup.
pub(super) fn cookie_of_lookup(name: &str) -> Option<u64> {
    let (program, cookie) = name.split_once('-')?;
    Lookup::ALL.into_iter().find(|lookup| lookup.program() == program)?;
    cookie.parse().ok()
}

/// The pinned links.
#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
    links: BTreeMap<String, Link>,
}

impl Links {
    /// Finds those that are there.
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
                // Something else, or one that was not put in its place.
                _ => fs::remove_file(&path).with_context(|| path.display().to_string())?,
            }
        }
        Ok(Self { directory, links })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.links.keys().map(String::as_str)
    }

    /// `None`: there is no such link. One that is no longer pinned counts as being elsewhere.
    pub(super) fn state(&self, name: &str, program: &Program, place: Place<'_>) -> io::Result<Option<State>> {
        let Some(link) = self.links.get(name) else { return Ok(None) };
        let state = link.state(program, place)?;
        let pinned = self.directory.join(name).exists();
        Ok(Some(if pinned { state } else { State::Elsewhere }))
    }

    /// Whether what the link was attached to still exists.
    pub(super) fn is_attached(&self, name: &str) -> bool {
        self.links.get(name).is_some_and(|link| link.is_attached().unwrap_or(false))
    }

    /// Has the program attached to the place by the link of this name: by the one that there is, whose program is replaced
    /// if it is another, or by a new one.
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
        fs::rename(&unfinished, self.directory.join(name))?;
        self.links.insert(name.to_owned(), link);
        Ok(())
    }

    /// Pins a link again whose pin was removed.
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

    /// Detaches the link, if there is one of this name.
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

/// How the pins of links end that are not yet in their place.
const UNFINISHED: &str = "-new";
