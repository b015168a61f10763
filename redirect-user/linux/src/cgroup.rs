//! Finds the cgroup ID of a process, by which the kernel side identifies it.
//!
//! The programs see a process's cgroup as a number: the inode of its directory in the cgroup2 hierarchy, which is what
//! `bpf_get_current_cgroup_id` returns. Processes are named by path in `/proc/<pid>/cgroup`.
//!
//! Both that file and `/proc/self/mountinfo` are written relative to the **reader's** cgroup namespace. An agent in a
//! container usually has its own, in which other pods show up as `/../../…`. So a thread that has joined the cgroup
//! namespace of process 1 reads them: the host's, if the agent shares the host's PID namespace.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};

/// The reason why a cgroup was not found.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The whole cgroup2 hierarchy is not mounted.
    #[error(
        "the cgroup2 hierarchy is not mounted: mount the host's /sys/fs/cgroup into the agent's container at the same path"
    )]
    NotMounted,
    /// The process is in no cgroup of the cgroup2 hierarchy.
    #[error("process {0} has no cgroup in the cgroup2 hierarchy: does the node run with cgroup_no_v2?")]
    NoCgroup(i32),
    /// The process's cgroup is not visible to the agent.
    #[error("the cgroup {path} of process {pid} is not visible to the agent: set hostPID: true for it")]
    NotVisible {
        /// The process.
        pid: i32,
        /// Its cgroup, as the kernel shows it to the agent.
        path: String,
    },
    /// A file could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The thread that does the look-up could not be started.
    #[error("cannot start a thread to look up cgroups: {0}")]
    Thread(io::Error),
}

impl From<CgroupError> for io::Error {
    fn from(error: CgroupError) -> Self {
        Self::other(error)
    }
}

/// A cgroup of the cgroup2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CgroupPath {
    /// From the hierarchy's root, starting with `/`.
    pub path: String,
    /// The cgroup's directory.
    pub directory: PathBuf,
}

impl CgroupPath {
    /// Whether this is the root of the hierarchy. Every process is below it, so it identifies none.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.path == "/"
    }
}

/// Where the whole cgroup2 hierarchy is mounted. Blocks for some system calls.
pub fn mount() -> Result<PathBuf, CgroupError> {
    in_host_view(mount_here)
}

/// The cgroup of a process. Blocks for some system calls.
pub fn of_process(pid: i32) -> Result<CgroupPath, CgroupError> {
    in_host_view(move || {
        let path =
            parse_membership(&read(format!("/proc/{pid}/cgroup"))?).ok_or(CgroupError::NoCgroup(pid))?;
        if path.split('/').any(|component| component == "..") {
            return Err(CgroupError::NotVisible { pid, path });
        }
        let directory = mount_here()?.join(path.trim_start_matches('/'));
        Ok(CgroupPath { path, directory })
    })
}

/// The cgroup ID of this directory, as the kernel side sees it.
pub fn id(directory: &Path) -> Result<u64, CgroupError> {
    let metadata = fs::metadata(directory)
        .map_err(|error| CgroupError::Read { path: directory.to_path_buf(), error })?;
    Ok(metadata.ino())
}

fn mount_here() -> Result<PathBuf, CgroupError> {
    parse_mount(&read("/proc/thread-self/mountinfo")?).ok_or(CgroupError::NotMounted)
}

fn read(path: impl Into<PathBuf>) -> Result<String, CgroupError> {
    let path = path.into();
    fs::read_to_string(&path).map_err(|error| CgroupError::Read { path, error })
}

/// Runs the look-up on a thread of its own, in the cgroup namespace of process 1. Falls back to the agent's own
/// view if the thread can't join it (no privilege, or not the host's PID namespace).
pub fn in_host_view<T: Send, E: Send + From<CgroupError>>(
    look_up: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("cgroup-lookup".into()).spawn_scoped(scope, || {
            if let Err(error) = join_host_namespace() {
                tracing::debug!(%error, "resolving cgroups in the agent's own cgroup namespace");
            }
            look_up()
        });
        thread.map_err(|error| E::from(CgroupError::Thread(error)))?.join().expect("a panic ends the process")
    })
}

fn join_host_namespace() -> io::Result<()> {
    let host = File::open("/proc/1/ns/cgroup")?;
    let (host_metadata, own) = (host.metadata()?, fs::metadata("/proc/thread-self/ns/cgroup")?);
    if (host_metadata.dev(), host_metadata.ino()) != (own.dev(), own.ino()) {
        setns(host, CloneFlags::CLONE_NEWCGROUP)?;
    }
    Ok(())
}

/// The path in a `/proc/<pid>/cgroup`: the line of hierarchy 0, which has no controller list.
fn parse_membership(text: &str) -> Option<String> {
    // The kernel marks a cgroup that was removed while its last process was dying; the path before the mark is
    // still right.
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(path.strip_suffix(" (deleted)").unwrap_or(path).to_owned())
}

/// The mount point, in a `mountinfo`, of the cgroup2 hierarchy's root.
fn parse_mount(text: &str) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        // "id parent major:minor root mount-point options [optional fields] - type source super-options"
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (root == "/" && after.split(' ').next() == Some("cgroup2")).then(|| PathBuf::from(unescape(point)))
    })
}

/// Decodes the octal escapes of `mountinfo`.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use redirect_testing::skip;

    #[test]
    fn the_line_of_hierarchy_zero_counts() {
        assert_eq!(parse_membership("0::/kubepods/pod1/c1\n").as_deref(), Some("/kubepods/pod1/c1"));
        assert_eq!(parse_membership("9:name=systemd:/\n0::/\n").as_deref(), Some("/"));
        assert_eq!(parse_membership("0::/a (deleted)\n").as_deref(), Some("/a"));
        assert_eq!(parse_membership("9:name=systemd:/\n"), None);
    }

    #[test]
    fn the_mount_of_the_whole_hierarchy_counts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw shared:8 - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let container = "31 30 0:27 /kubepods/a /sys/fs/cgroup rw - cgroup2 cgroup rw\n\
                         32 30 0:27 / /host/sys/fs\\040cgroup rw - cgroup2 cgroup rw,nsdelegate\n";
        assert_eq!(parse_mount(container), Some("/host/sys/fs cgroup".into()));
        assert_eq!(parse_mount("32 30 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw\n"), None);
    }

    #[test]
    fn the_test_process_is_in_a_cgroup_whose_id_is_its_inode() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let cgroup = match of_process(pid) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                skip("the_test_process_is_in_a_cgroup_whose_id_is_its_inode", error);
                return;
            }
        };
        assert!(cgroup.path.starts_with('/'));
        assert!(cgroup.directory.starts_with(mount().unwrap()));
        let members = fs::read_to_string(cgroup.directory.join("cgroup.procs")).unwrap();
        assert!(members.lines().any(|line| line == pid.to_string()), "{cgroup:?} does not list {pid}");
        assert_eq!(id(&cgroup.directory).unwrap(), fs::metadata(&cgroup.directory).unwrap().ino());
    }
}
