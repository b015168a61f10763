//! Checks from inside a pod that its connections are captured, in every family in which it has an address.
//!
//! It connects to documentation addresses (RFC 5737, RFC 3849). No network has them, so only a proxy on the path can accept
//! the connection. The proxy's further handling of it does not matter here.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use redirect_ebpf::Family;
use serde::Serialize;

/// The finding about one family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// Whether connections of the family are captured; `None`: the pod has no address of it.
    pub captured: Option<bool>,
    /// The evidence.
    pub detail: String,
}

/// Checks both families.
pub(crate) fn validate(port: u16, patience: Duration) -> io::Result<Vec<Finding>> {
    let own = families()?;
    Ok(thread::scope(|scope| {
        let looks = Family::ALL.map(|family| {
            let has = own.contains(&family);
            scope.spawn(move || look(family, has, port, patience))
        });
        let findings = looks.into_iter().zip(Family::ALL).map(|(look, family)| {
            look.join().unwrap_or_else(|_| finding(family, Some(false), "the check failed".into()))
        });
        findings.collect()
    }))
}

/// The families of this network namespace's addresses, except loopback and link-local ones.
fn families() -> io::Result<BTreeSet<Family>> {
    let addresses = getifaddrs().map_err(io::Error::from)?;
    let up = addresses.filter(|of| {
        of.flags.contains(InterfaceFlags::IFF_UP) && !of.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    Ok(up
        .filter_map(|of| {
            let address = of.address?;
            match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(_), _) => Some(Family::Ipv4),
                (_, Some(v6)) if !v6.ip().is_unicast_link_local() => Some(Family::Ipv6),
                _ => None,
            }
        })
        .collect())
}

/// An address that no network uses.
const fn nowhere(family: Family) -> IpAddr {
    match family {
        Family::Ipv4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        Family::Ipv6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    }
}

fn look(family: Family, has: bool, port: u16, patience: Duration) -> Finding {
    if !has {
        return finding(family, None, "the pod has no address of this family".into());
    }
    let to = SocketAddr::new(nowhere(family), port);
    let result = TcpStream::connect_timeout(&to, patience);
    match result.err().filter(|error| !was_accepted(error)) {
        None => finding(
            family,
            Some(true),
            format!("a proxy accepted the connection to {to}, an address that no network has"),
        ),
        Some(error) => {
            finding(family, Some(false), format!("no proxy accepted the connection to {to}: {error}"))
        }
    }
}

/// A proxy accepts, fails to reach the destination, and may close before we check. A handshake that is answered with a
/// reset gives "refused" instead; a close without an error has no error number.
fn was_accepted(error: &io::Error) -> bool {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => true,
        io::ErrorKind::TimedOut => false,
        _ => error.raw_os_error().is_none(),
    }
}

fn finding(family: Family, captured: Option<bool>, detail: String) -> Finding {
    Finding { family: family.name().into(), captured, detail }
}
