//! Sysctls of the network namespace that the calling thread is in: `/proc/sys/net` shows each thread its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use anyhow::Context as _;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use redirect_ebpf::constants::PROXY_PORTS;

use super::ports::Ports;
use crate::facts::Sysctl;

/// The sysctl directory of a namespace, opened once: the kernel searches those of all namespaces one after the other.
#[derive(Debug)]
pub(super) struct Sysctls(OwnedFd);

impl Sysctls {
    /// That of the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(open("/proc/sys/net", flags, Mode::empty())?))
    }

    fn file(&self, path: &str, access: OFlag) -> io::Result<File> {
        Ok(openat(&self.0, path, access | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }

    /// The first digit of its value.
    fn read(&self, path: &str) -> io::Result<u8> {
        let mut value = [0];
        self.file(path, OFlag::O_RDONLY)?.read_exact(&mut value)?;
        Ok(value[0])
    }

    fn write(&self, sysctl: Sysctl, value: &[u8]) -> io::Result<()> {
        self.file(&path(sysctl), OFlag::O_WRONLY)?.write_all(value)
    }

    /// The sysctls that are on. One that the kernel lacks (IPv6 disabled) is not on.
    pub(super) fn that_are_on(&self) -> io::Result<BTreeSet<Sysctl>> {
        let mut on = BTreeSet::new();
        let reserved = self.reserved_ports()?;
        if PROXY_PORTS.iter().all(|port| reserved.contains(*port)) {
            on.insert(Sysctl::ReservedPorts);
        }
        for sysctl in Sysctl::ALL.into_iter().filter(|sysctl| *sysctl != Sysctl::ReservedPorts) {
            match self.read(&path(sysctl)) {
                Ok(b'0') => {}
                Ok(_) => {
                    on.insert(sysctl);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(on)
    }

    /// The kernel returns a list in the first read only, up to the buffer's size.
    fn reserved_ports(&self) -> io::Result<Ports> {
        let mut text = vec![0; 4096];
        loop {
            let length = self.file(&path(Sysctl::ReservedPorts), OFlag::O_RDONLY)?.read(&mut text)?;
            if length < text.len() {
                text.truncate(length);
                return String::from_utf8(text).map_err(io::Error::other)?.parse().map_err(io::Error::other);
            }
            text.resize(2 * length, 0);
        }
    }

    /// Changes the list of reserved ports. Foreign entries stay.
    fn change_reserved_ports(&self, change: impl Fn(&mut Ports, u16)) -> io::Result<()> {
        let mut ports = self.reserved_ports()?;
        PROXY_PORTS.iter().for_each(|port| change(&mut ports, *port));
        self.write(Sysctl::ReservedPorts, ports.to_string().as_bytes())
    }

    pub(super) fn turn_on(&self, sysctl: Sysctl) -> anyhow::Result<()> {
        let result = match sysctl {
            Sysctl::ReservedPorts => self.change_reserved_ports(Ports::insert),
            _ => self.write(sysctl, b"1"),
        };
        result.with_context(|| format!("cannot write {}: is /proc/sys read-only?", sysctl.name()))
    }

    pub(super) fn turn_off(&self, sysctl: Sysctl) -> io::Result<()> {
        match sysctl {
            Sysctl::ReservedPorts => self.change_reserved_ports(Ports::remove),
            _ => self.write(sysctl, b"0"),
        }
    }

    /// Whether IPv6 can use an interface: the kernel supports it, the interface can carry it (it needs an MTU of 1280
    /// bytes), and it is not disabled there.
    pub(super) fn ipv6_enabled(&self, interface: &str) -> io::Result<bool> {
        match self.read(&format!("ipv6/conf/{interface}/disable_ipv6")) {
            Ok(value) => Ok(value == b'0'),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Whether IPv6 is on in the calling thread's namespace.
pub(super) fn has_ipv6() -> io::Result<bool> {
    Sysctls::open()?.ipv6_enabled("lo")
}

/// The path relative to the directory.
fn path(sysctl: Sysctl) -> String {
    sysctl.name().trim_start_matches("net.").replace('.', "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_below_the_directory() {
        assert_eq!(path(Sysctl::TcpFwmarkAccept), "ipv4/tcp_fwmark_accept");
    }
}
