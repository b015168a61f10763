//! Finds netfilter rules of other mesh agents in the namespaces of enrolled pods: Istio's chains, in iptables and nftables.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::sys::socket::AddressFamily;
use redirect_linux::netlink::nftables::Nftables;

use super::{Check, Requirements};

const NAME: &str = "netfilter rules in pods";

pub(super) fn checks(requirements: &Requirements) -> Vec<Check> {
    let unread =
        |detail| Check::warn(NAME, detail, "run it as root, in the host's network and PID namespaces");
    let pods = match super::enrolled(requirements) {
        Ok(pods) => pods,
        Err(error) => return vec![unread(format!("cannot read the enrolled pods: {error}"))],
    };
    let mut checks = Vec::new();
    let mut fine = 0;
    for found in pods {
        let Some(netns) = found.netns else { continue };
        let pod = &found.checkpoint.identity;
        match netns.run(chains).and_then(|chains| chains) {
            Ok(chains) if chains.is_empty() => fine += 1,
            Ok(chains) => {
                let names: Vec<_> = chains.into_iter().collect();
                checks.push(Check::warn(
                    NAME,
                    format!(
                        "pod {pod} also has those of another mesh agent ({}): connections may be \
                         redirected twice",
                        names.join(", ")
                    ),
                    "restart the pod once istio-cni is gone, or remove its rules",
                ));
            }
            Err(error) => checks.push(unread(format!("cannot read those of pod {pod}: {error}"))),
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(NAME, format!("none of other mesh agents in {fine} enrolled pods")));
    }
    checks
}

/// The names of Istio's chains in the calling thread's namespace.
fn chains() -> io::Result<BTreeSet<String>> {
    let mut names = of_nftables()?;
    for family in [Legacy::IPV4, Legacy::IPV6] {
        // Querying a table that does not exist would create it.
        let tables = match fs::read_to_string(format!("/proc/thread-self/net/{}", family.tables)) {
            // A kernel without iptables-legacy, or one where it has not been used.
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            tables => tables?,
        };
        for table in tables.lines() {
            names.extend(istio_s(&family.entries(table)?));
        }
    }
    Ok(names)
}

/// The strings among bytes that look like names of Istio's chains.
fn istio_s(bytes: &[u8]) -> impl Iterator<Item = String> + '_ {
    let texts = bytes.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    texts.filter_map(|text| {
        let name = text.get(text.find("ISTIO_")?..)?;
        name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_').then(|| name.to_owned())
    })
}

/// A reader of iptables-legacy.
struct Legacy {
    family: AddressFamily,
    level: libc::c_int,
    tables: &'static str,
}

/// `struct ipt_getinfo` and `struct ip6t_getinfo`.
#[repr(C)]
struct Info {
    name: [u8; 32],
    hooks: [u32; 12],
    size: u32,
}

impl Legacy {
    const IPV4: Self = Self { family: AddressFamily::Inet, level: libc::SOL_IP, tables: "ip_tables_names" };
    const IPV6: Self =
        Self { family: AddressFamily::Inet6, level: libc::SOL_IPV6, tables: "ip6_tables_names" };

    /// All entries of a table, in the kernel's format.
    fn entries(&self, table: &str) -> io::Result<Vec<u8>> {
        const GET_INFO: libc::c_int = 64;
        const GET_ENTRIES: libc::c_int = 65;
        /// The offset of the entries in `struct ipt_get_entries`.
        const START: usize = 40;
        let socket = self.socket()?;
        let mut info = Info { name: [0; 32], hooks: [0; 12], size: 0 };
        let name = table.as_bytes().get(..31.min(table.len())).unwrap_or_default();
        info.name[..name.len()].copy_from_slice(name);
        let get = |option, value: *mut libc::c_void, mut length: libc::socklen_t| {
            // SAFETY: the value lives for the length of the call, and its size is right.
            let result =
                unsafe { libc::getsockopt(socket.as_raw_fd(), self.level, option, value, &raw mut length) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        get(GET_INFO, (&raw mut info).cast(), size_of::<Info>() as libc::socklen_t)?;
        let mut entries = vec![0; START + info.size as usize];
        entries[..32].copy_from_slice(&info.name);
        entries[32..36].copy_from_slice(&info.size.to_ne_bytes());
        get(GET_ENTRIES, entries.as_mut_ptr().cast(), entries.len() as libc::socklen_t)?;
        Ok(entries)
    }

    fn socket(&self) -> io::Result<OwnedFd> {
        // SAFETY: the call takes integers only.
        let socket = unsafe {
            libc::socket(self.family as libc::c_int, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW)
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just created the descriptor, and we alone own it.
        Ok(unsafe { OwnedFd::from_raw_fd(socket) })
    }
}

/// None if the kernel has no nftables.
fn of_nftables() -> io::Result<BTreeSet<String>> {
    match Nftables::open().and_then(|mut nftables| nftables.chains()) {
        // The kernel has no nfnetlink, or nfnetlink has no nftables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPROTONOSUPPORT | libc::EINVAL)) => {
            Ok(BTreeSet::new())
        }
        chains => Ok(chains?.iter().flat_map(|chain| istio_s(chain.as_bytes())).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_found_among_other_bytes() {
        let found: Vec<_> =
            istio_s(b"\x10\0\0ISTIO_OUTPUT\0\0OUTPUT\0-j ISTIO_x y\0\xff\xfeISTIO_A\0").collect();
        assert_eq!(found, ["ISTIO_OUTPUT"]);
    }
}
