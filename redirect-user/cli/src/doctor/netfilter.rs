//! Finds netfilter rules of other mesh agents in the namespaces of enrolled pods: Istio's chains, in iptables and nftables.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

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
        let pod = &found.record.identity;
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
        // Asking for a table that is not there would make it.
        let tables = match fs::read_to_string(format!("/proc/thread-self/net/{}", family.tables)) {
            // A kernel without iptables-legacy, or where nobody has used it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            tables => tables?,
        };
        for table in tables.lines() {
            names.extend(istio_s(&family.entries(table)?));
        }
    }
    Ok(names)
}

/// Strings among bytes that are named as Istio names its chains.
fn istio_s(bytes: &[u8]) -> impl Iterator<Item = String> + '_ {
    let texts = bytes.split(|byte| *byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    texts.filter_map(|text| {
        let name = text.get(text.find("ISTIO_")?..)?;
        name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_').then(|| name.to_owned())
    })
}

/// What iptables-legacy reads.
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

    /// All entries of a table, as the kernel has them.
    fn entries(&self, table: &str) -> io::Result<Vec<u8>> {
        const GET_INFO: libc::c_int = 64;
        const GET_ENTRIES: libc::c_int = 65;
        /// Where entries begin in `struct ipt_get_entries`.
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
        // SAFETY: the call takes numbers alone.
        let socket = unsafe {
            libc::socket(self.family as libc::c_int, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW)
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(socket) })
    }
}

/// A dump of all chains; empty where the kernel has no nftables.
fn of_nftables() -> io::Result<BTreeSet<String>> {
    const GET_CHAIN: u16 = 10 << 8 | 4;
    const DUMP_REQUEST: u16 = 0x301;
    const LENGTH: u32 = 20;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = match socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter) {
        Ok(socket) => socket,
        Err(Errno::EPROTONOSUPPORT) => return Ok(BTreeSet::new()),
        Err(error) => return Err(error.into()),
    };
    // The header of the message, and that of netfilter: any family.
    let mut request = Vec::with_capacity(LENGTH as usize);
    request.extend(LENGTH.to_ne_bytes());
    request.extend(GET_CHAIN.to_ne_bytes());
    request.extend(DUMP_REQUEST.to_ne_bytes());
    request.extend([0; 12]);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut names = BTreeSet::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        if rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some(answer) = answer(&mut rest) {
            match answer? {
                Answer::Part(content) => names.extend(istio_s(content)),
                Answer::End => return Ok(names),
            }
        }
    }
}

/// What netlink says.
#[derive(Debug, PartialEq, Eq)]
enum Answer<'a> {
    /// A message of what was asked for.
    Part(&'a [u8]),
    /// There is no more, or nothing of the kind in this kernel.
    End,
}

/// Takes a message off a packet.
fn answer<'a>(packet: &mut &'a [u8]) -> Option<io::Result<Answer<'a>>> {
    const HEADER: usize = 16;
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    let &[a, b, c, d, low, high, ..] = *packet else { return None };
    let length = u32::from_ne_bytes([a, b, c, d]) as usize;
    let Some(content) = packet.get(HEADER..length) else {
        *packet = &[];
        return Some(Err(io::ErrorKind::InvalidData.into()));
    };
    *packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    let kind = u16::from_ne_bytes([low, high]);
    if !matches!(kind, ERROR | DONE) {
        return Some(Ok(Answer::Part(content)));
    }
    // Both begin with the negative number of an error, or with zero.
    let number = content.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    Some(match Errno::from_raw(-number) {
        // nfnetlink does not know nftables.
        Errno::EINVAL if kind == ERROR => Ok(Answer::End),
        _ if number == 0 => Ok(Answer::End),
        error => Err(error.into()),
    })
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

    fn message(kind: u16, content: &[u8]) -> Vec<u8> {
        let mut message = ((16 + content.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(content);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    #[test]
    fn an_error_is_not_the_end_of_a_list() {
        let end = |number: i32| (-number).to_ne_bytes();
        let packet = [message(0xa03, b"chain"), message(3, &end(0))].concat();
        let mut rest = &packet[..];
        assert_eq!(answer(&mut rest).unwrap().unwrap(), Answer::Part(b"chain"));
        assert_eq!(answer(&mut rest).unwrap().unwrap(), Answer::End);
        assert!(answer(&mut rest).is_none());
        for (kind, number, fine) in [
            (2, libc::EINVAL, true),
            (2, libc::EPERM, false),
            (3, libc::EINVAL, false),
            (3, libc::ENOMEM, false),
            (2, 0, true),
        ] {
            let packet = message(kind, &end(number));
            assert_eq!(answer(&mut &packet[..]).unwrap().is_ok(), fine, "{kind}, {number}");
        }
        assert!(answer(&mut &message(0xa03, b"cut short")[..20]).unwrap().is_err());
    }
}
