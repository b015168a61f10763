//! Cgroups (version 2) of the test process, of the proxies and of the agents' programs.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait;

/// The names of cgroups and directories of tests start with this, followed by the process ID.
pub(crate) const PREFIX: &str = "ambient-redirect-test-";

/// A cgroup that is removed with this value.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup under which everything of this process is.
    pub fn for_this_process() -> Result<Self> {
        Self::create(mount_point()?.join(format!("{PREFIX}{}", std::process::id())))
    }

    /// A cgroup beside that one, for processes that no agent of this session handles.
    pub fn beside_this_process(name: &str) -> Result<Self> {
        Self::create(mount_point()?.join(format!("{PREFIX}{}-{name}", std::process::id())))
    }

    /// A cgroup inside this one.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::create(self.path.join(name))
    }

    fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("make cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that moves a process here when its ID, or `0` for the writer itself, is written to it.
    pub fn entrance(&self) -> Result<File> {
        entrance(&self.path)
    }

    /// The CPU time of its processes so far, including ended ones.
    pub fn cpu_time(&self) -> Result<Duration> {
        let path = self.path.join("cpu.stat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let microseconds = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
        Ok(Duration::from_micros(microseconds.with_context(|| format!("usage_usec in {}", path.display()))?))
    }

    /// Kills every process in it and in those inside it, and removes these.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
            .with_context(|| format!("kill {}", self.path.display()))?;
        for inner in fs::read_dir(&self.path)?.flatten().filter(|entry| entry.path().is_dir()) {
            wait::for_cleanup(Duration::from_secs(5), || fs::remove_dir(inner.path()).is_ok());
        }
        Ok(())
    }

    /// The processes in it.
    pub fn processes(&self) -> Result<Vec<u32>> {
        processes(&self.path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just reaped may still be listed for a moment.
        let mut last = None;
        let removed = wait::for_cleanup(Duration::from_secs(1), || {
            last = fs::remove_dir(&self.path).err();
            last.is_none()
        });
        if !removed {
            eprintln!("left behind: cgroup {}: {last:?}", self.path.display());
        }
    }
}

/// Where the cgroup2 file system is mounted; it need not be `/sys/fs/cgroup`.
pub fn mount_point() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    table
        .lines()
        .find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            file_system.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
        })
        .context("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The cgroup of this process.
pub fn current() -> Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    let path =
        table.lines().find_map(|line| line.strip_prefix("0::/")).context("this process is in no cgroup2")?;
    Ok(mount_point()?.join(path))
}

/// Moves this process.
pub fn enter(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), "0").with_context(|| format!("enter cgroup {}", path.display()))
}

/// Removes the leftovers of killed tests: empty cgroups named after processes that have ended.
pub fn sweep() -> Result<()> {
    for entry in fs::read_dir(mount_point()?)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(process) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else {
            continue;
        };
        if Path::new("/proc").join(process).exists() {
            continue;
        }
        for child in fs::read_dir(entry.path())?.flatten().filter(|child| child.path().is_dir()) {
            // Fails if the cgroup still has processes, which is intended.
            let _ = fs::remove_dir(child.path());
        }
        let _ = fs::remove_dir(entry.path());
    }
    Ok(())
}

fn entrance(path: &Path) -> Result<File> {
    let path = path.join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("open {}", path.display()))
}

fn processes(path: &Path) -> Result<Vec<u32>> {
    let path = path.join("cgroup.procs");
    let list = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
}
