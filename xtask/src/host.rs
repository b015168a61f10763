//! Requirements of a host before programs are loaded into its kernel. Everything that is missing is reported at
//! once, with its remedy.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Checks this host.
pub(crate) fn check() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let checks = [
        (
            nix::unistd::geteuid().is_root(),
            "not root: loading programs and creating network namespaces need it",
            "run it as root, for instance: sudo -E env PATH=\"$PATH\" cargo xtask …",
        ),
        (
            Path::new(BTF).exists(),
            "the kernel does not describe its types: /sys/kernel/btf/vmlinux is not there",
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y, as distributions build them; in a container, mount /sys",
        ),
        (
            cgroup2(&mounts).is_some(),
            "no cgroup v2 hierarchy is mounted",
            "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2",
        ),
    ];
    let problems: Vec<String> = checks
        .into_iter()
        .filter(|(fine, ..)| !fine)
        .map(|(_, problem, remedy)| format!("  {problem}\n    remedy: {remedy}"))
        .collect();
    if !problems.is_empty() {
        bail!("this host cannot run the data path:\n{}", problems.join("\n"));
    }
    Ok(())
}

/// Where cgroup v2 is mounted, from `/proc/self/mountinfo`.
fn cgroup2(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next()? != "cgroup2" {
            return None;
        }
        // 41 31 0:38 <root> <mount point> <options>
        mount.split(' ').nth(4).map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_among_the_mounts() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let shared =
            "35 24 0:30 / /sys/fs/cgroup ro,nosuid shared:9 master:4 - cgroup2 cgroup rw,nsdelegate\n";
        let version_1 = "32 31 0:29 / /mnt/cgroup2 rw,relatime - cgroup cgroup2 rw,cpu\n";
        let cases = [
            (hybrid, Some("/sys/fs/cgroup/unified")),
            (shared, Some("/sys/fs/cgroup")),
            (version_1, None),
            ("", None),
        ];
        for (mountinfo, expected) in cases {
            assert_eq!(cgroup2(mountinfo).as_deref(), expected.map(Path::new), "{mountinfo}");
        }
    }
}
