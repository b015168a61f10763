//! Required mounts of kernel file systems.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::{Cause, Check, Requirements};
use crate::bpffs::{self, Bpffs, NO_BPFFS_REMEDY};
use crate::cgroup::{self, CgroupError};

const BTF: &str = "/sys/kernel/btf/vmlinux";

pub(super) fn checks(requirements: &Requirements) -> Vec<Check> {
    vec![btf(), cgroup2(requirements.cgroup.as_deref()), bpffs(&requirements.pin_dir)]
}

fn btf() -> Check {
    match File::open(BTF) {
        Ok(_) => Check::ok("BTF", BTF),
        Err(error) if error.kind() != ErrorKind::NotFound => Check::fail(
            "BTF",
            Cause::Untried,
            format!("cannot open {BTF}: {error}"),
            "run it as root, with the host's /sys",
        ),
        Err(error) => Check::fail(
            "BTF",
            Cause::Btf,
            format!("the kernel has no BTF: {BTF}: {error}"),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions build them; in a container, mount the host's /sys",
        ),
    }
}

fn cgroup2(chosen: Option<&Path>) -> Check {
    const REMEDY: &str = "mount it: mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2; in a container, mount the \
                          host's /sys/fs/cgroup at the same path";
    let fail = |detail| Check::fail("cgroup2", Cause::Cgroup, detail, REMEDY);
    let root = match chosen.map_or_else(cgroup::mount, |path| Ok(path.to_path_buf())) {
        Ok(root) => root,
        Err(CgroupError::NotMounted) if has_version_1() => {
            return fail("the cgroup2 hierarchy is not mounted, only version 1".into());
        }
        Err(error) => return fail(error.to_string()),
    };
    let shown = root.display();
    match kind(&root) {
        // To attach programs, it suffices to open the directory for reading, so a read-only mount will do.
        Some(CGROUP2_SUPER_MAGIC) => Check::ok("cgroup2", shown.to_string()),
        Some(_) => fail(format!("{shown} is not in a cgroup2 hierarchy")),
        None => fail(format!("cannot read {shown}")),
    }
}

fn has_version_1() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.contains(" - cgroup "))
}

fn bpffs(pin_dir: &Path) -> Check {
    let shown = pin_dir.display();
    let fail = |detail| Check::fail("bpffs", Cause::Bpffs, detail, NO_BPFFS_REMEDY);
    match bpffs::bpffs(pin_dir) {
        Ok(Some(Bpffs::Mounted)) => Check::ok("bpffs", shown.to_string()),
        Ok(Some(Bpffs::Mountable)) => Check::ok("bpffs", format!("the agent will mount one for {shown}")),
        Ok(None) => fail(format!("the pin directory {shown} is not on a bpffs")),
        Err(error) => fail(format!("cannot examine the pin directory {shown}: {error}")),
    }
}

fn kind(path: &Path) -> Option<FsType> {
    statfs(path).ok().map(|found| found.filesystem_type())
}
