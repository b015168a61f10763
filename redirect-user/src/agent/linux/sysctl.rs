//! Sysctls of the network namespace that the calling thread is in: `/proc/sys/net` shows each thread its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use redirect_ebpf::Family;

use super::super::facts::Sysctl;

pub(super) const ALL: [Sysctl; 4] = [
    Sysctl::TcpFwmarkAccept,
    Sysctl::FwmarkReflect(Family::Ipv4),
    Sysctl::FwmarkReflect(Family::Ipv6),
    Sysctl::TcpMigrateReq,
];

fn path(sysctl: Sysctl) -> PathBuf {
    Path::new("/proc/sys").join(sysctl.name().replace('.', "/"))
}

/// A sysctl that the kernel does not have (IPv6 is off) is not on.
pub(super) fn is_on(sysctl: Sysctl) -> io::Result<bool> {
    match fs::read_to_string(path(sysctl)) {
        Ok(value) => Ok(value.trim() != "0"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns what it was before.
pub(super) fn turn_on(sysctl: Sysctl) -> anyhow::Result<String> {
    use anyhow::Context as _;
    let path = path(sysctl);
    let before = fs::read_to_string(&path).with_context(|| format!("{} can't be read", path.display()))?;
    fs::write(&path, "1")
        .with_context(|| format!("{} can't be written: is /proc/sys read-only?", path.display()))?;
    Ok(before)
}

pub(super) fn restore(sysctl: Sysctl, before: &str) -> io::Result<()> {
    fs::write(path(sysctl), before.trim())
}

/// Whether IPv6 can go through an interface: the kernel has it, the interface can carry it (it needs an MTU of 1280
/// bytes), and it is not turned off there.
pub(super) fn ipv6_enabled(interface: &str) -> bool {
    let path = Path::new("/proc/sys/net/ipv6/conf").join(interface).join("disable_ipv6");
    fs::read_to_string(path).is_ok_and(|value| value.trim() == "0")
}
