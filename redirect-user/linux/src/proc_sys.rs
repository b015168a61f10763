//! Container runtimes mount `/proc/sys` read-only. The sysctls of pods' namespaces are below it.

use std::io;

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};

const PATH: &str = "/proc/sys";

/// Makes it writable, in this process's mount namespace.
pub fn make_writable() -> io::Result<()> {
    if !statvfs(PATH)?.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(());
    }
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(None::<&str>, PATH, None::<&str>, flags, None::<&str>)?)
}
