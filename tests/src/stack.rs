//! The three ways in which an application can speak IP, and the kinds of pods.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use redirect_ebpf::Family;
use serde::{Deserialize, Serialize};
use socket2::Domain;

/// How a socket speaks IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stack {
    /// An `AF_INET` socket.
    V4,
    /// An `AF_INET6` socket with IPv6 addresses.
    V6,
    /// An `AF_INET6` socket with v4-mapped addresses (`::ffff:a.b.c.d`), as Java and Go use them: IPv4 on the wire.
    Mapped,
}

impl Stack {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// The family on the wire.
    #[must_use]
    pub fn family(self) -> Family {
        match self {
            Self::V4 | Self::Mapped => Family::Ipv4,
            Self::V6 => Family::Ipv6,
        }
    }

    /// The socket's domain.
    #[must_use]
    pub fn domain(self) -> Domain {
        match self {
            Self::V4 => Domain::IPV4,
            Self::V6 | Self::Mapped => Domain::IPV6,
        }
    }

    /// An address as this stack spells it.
    #[must_use]
    pub fn spell(self, address: SocketAddr) -> SocketAddr {
        match (self, address.ip().to_canonical()) {
            (Self::Mapped, IpAddr::V4(ip)) => SocketAddr::from((ip.to_ipv6_mapped(), address.port())),
            (_, ip) => SocketAddr::from((ip, address.port())),
        }
    }

    /// The loopback address.
    #[must_use]
    pub fn loopback(self) -> IpAddr {
        match self.family() {
            Family::Ipv4 => IpAddr::from([127, 0, 0, 1]),
            Family::Ipv6 => IpAddr::from(Ipv6Addr::LOCALHOST),
        }
    }

    /// A word for names of tests.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "v4_mapped",
        }
    }
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Mapped => "v4-mapped",
        })
    }
}

/// The families of a pod's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// Both.
    Dual,
    /// IPv4 alone.
    V4Only,
    /// IPv6 alone.
    V6Only,
}

impl Families {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Dual, Self::V4Only, Self::V6Only];

    /// Whether a pod of this kind has an address of the family.
    #[must_use]
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::Dual => true,
            Self::V4Only => family == Family::Ipv4,
            Self::V6Only => family == Family::Ipv6,
        }
    }

    /// The families, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(move |&family| self.has(family))
    }

    /// The stacks with which such a pod can reach others.
    pub fn stacks(self) -> impl Iterator<Item = Stack> {
        Stack::ALL.into_iter().filter(move |stack| self.has(stack.family()))
    }

    /// A word for the names of tests.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Dual => "dual",
            Self::V4Only => "v4_only",
            Self::V6Only => "v6_only",
        }
    }
}

/// The address with a v4-mapped one as IPv4, for comparisons.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::from((address.ip().to_canonical(), address.port()))
}
