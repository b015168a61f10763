//! The BPF file system, which holds pins.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// The usual mount point.
const BPFFS: &str = "/sys/fs/bpf";

/// Where a pin directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bpffs {
    /// On a mounted bpffs.
    Mounted,
    /// On the bpffs that the agent will mount.
    Mountable,
}

/// What to do where there is none.
pub const NO_BPFFS_REMEDY: &str = "choose a directory below /sys/fs/bpf (--pin-dir), with a bpffs there (mount -t bpf bpf \
                                   /sys/fs/bpf on the node, which the chart does with mountBpffs=true); in a container, \
                                   mount the host's at the same path";

/// The bpffs of a pin directory that may not exist yet. `None`: nothing there would outlive the agent.
pub fn bpffs(directory: &Path) -> io::Result<Option<Bpffs>> {
    let usual = Path::new(BPFFS);
    let there = directory.ancestors().find_map(|path| statfs(path).ok());
    if there.is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(Some(Bpffs::Mounted));
    }
    if !directory.starts_with(usual) {
        return Ok(None);
    }
    // In a container, a mount would end with the container. A mount's number is valid in one mount namespace
    // only.
    let mounts = |process: &str| -> io::Result<BTreeSet<String>> {
        let table = fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
        Ok(table.lines().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect())
    };
    Ok((!mounts("self")?.is_disjoint(&mounts("1")?)).then_some(Bpffs::Mountable))
}

/// Mounts a bpffs at its usual place, unless it is mounted already.
pub fn ensure_bpffs() -> anyhow::Result<()> {
    let there = statfs(BPFFS).with_context(|| format!("cannot examine {BPFFS}"))?;
    if there.filesystem_type() == BPF_FS_MAGIC { Ok(()) } else { mount_bpffs() }
}

/// Mounts a bpffs at its usual place.
pub fn mount_bpffs() -> anyhow::Result<()> {
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=700"))
        .with_context(|| format!("cannot mount a bpffs on {BPFFS}"))?;
    tracing::info!("mounted a bpffs on {BPFFS}");
    Ok(())
}
