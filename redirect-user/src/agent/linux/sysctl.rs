//! Sysctls of the network namespace that the calling thread is in: `/proc/sys/net` shows each thread its own.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::facts::Sysctl;

fn path(sysctl: Sysctl) -> PathBuf {
    Path::new("/proc/sys").join(sysctl.name().replace('.', "/"))
}

/// Those that are on. A sysctl that the kernel does not have (IPv6 is off) is not on.
pub(super) fn that_are_on() -> io::Result<BTreeSet<Sysctl>> {
    let mut on = BTreeSet::new();
    for sysctl in Sysctl::ALL {
        match fs::read_to_string(path(sysctl)) {
            Ok(value) if value.trim() != "0" => {
                on.insert(sysctl);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(on)
}

pub(super) fn turn_on(sysctl: Sysctl) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let path = path(sysctl);
    fs::write(&path, "1")
        .with_context(|| format!("{} can't be written: is /proc/sys read-only?", path.display()))
}

pub(super) fn turn_off(sysctl: Sysctl) -> io::Result<()> {
    fs::write(path(sysctl), "0")
}

/// Whether IPv6 can go through an interface: the kernel has it, the interface can carry it (it needs an MTU of 1280
/// bytes), and it is not turned off there.
pub(super) fn ipv6_enabled(interface: &str) -> bool {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(interface).join("disable_ipv6");
    fs::read_to_string(path).is_ok_and(|value| value.trim() == "0")
}
