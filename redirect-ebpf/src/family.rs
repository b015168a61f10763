//! The two address families, as a value ([`Family`]) and as types ([`Ipv4`], [`Ipv6`]) for code that is written once
//! and compiled for both.

use core::fmt;
use core::hash::Hash;

/// An IP address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Family {
    /// IPv4, including v4-mapped IPv6 addresses (`::ffff:a.b.c.d`), which are IPv4 on the wire.
    Ipv4 = 0,
    /// IPv6.
    Ipv6 = 1,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The display name: `IPv4` or `IPv6`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An address in network byte order.
pub trait Address: Copy + Eq + Hash + fmt::Debug {
    /// A multicast address, for our own lookups: the kernel drops packets from it before it looks for their socket.
    const NOBODY: Self;
}

impl Address for [u8; 4] {
    const NOBODY: Self = [224, 0, 0, 0];
}

impl Address for [u8; 16] {
    const NOBODY: Self = [0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
}

/// An address family as a type, with everything that differs between the two.
pub trait Ip: Copy + 'static {
    /// An address in network byte order.
    type Address: Address;

    /// The family as a value.
    const FAMILY: Family;

    /// The Ethernet protocol number of the family's packets.
    const ETHER_TYPE: u16;

    /// The address in 16 bytes; IPv4 in v4-mapped form.
    fn widen(address: Self::Address) -> [u8; 16];

    /// Whether Istio's rules treat the address as loopback: 127.0.0.1 and ::1, not the rest of 127.0.0.0/8, and the
    /// unspecified address, which the kernel replaces with them.
    fn is_loopback(address: Self::Address) -> bool;

    /// Whether a DNS server at the address is on this host: all of 127.0.0.0/8, for stub resolvers such as 127.0.0.53.
    /// Istio exempts whatever leaves through `lo`.
    fn is_local_resolver(address: Self::Address) -> bool;

    /// Whether it is the source of an interface that has no address yet, or a link-local address, which no IPAM
    /// assigns.
    fn is_unassigned(address: Self::Address) -> bool;

    /// Whether a packet with this source can only come from the receiving host itself: the kernel accepts such a source on
    /// `lo` only.
    fn is_of_this_host(address: Self::Address) -> bool;

    /// Whether the address is a multicast or broadcast group, to which TCP can't connect. 240.0.0.0/4 is none: Linux and
    /// some clouds use it as unicast.
    fn is_group(address: Self::Address) -> bool;

    /// Whether the address is an IPv6 link-local one. IPv4 link-local unicast does not count: cloud metadata servers live
    /// there, and Istio captures connections to them.
    fn is_link_local(address: Self::Address) -> bool;

    /// Whether the address is valid on its link only.
    #[inline(always)]
    fn is_link_scoped(address: Self::Address) -> bool {
        Self::is_group(address) || Self::is_link_local(address)
    }
}

/// IPv4 as a type.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4;

/// IPv6 as a type.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6;

impl Ip for Ipv4 {
    type Address = [u8; 4];
    const FAMILY: Family = Family::Ipv4;
    const ETHER_TYPE: u16 = 0x0800;

    #[inline(always)]
    fn widen([a, b, c, d]: Self::Address) -> [u8; 16] {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    }

    #[inline(always)]
    fn is_loopback(address: Self::Address) -> bool {
        matches!(u32::from_be_bytes(address), 0 | 0x7f00_0001)
    }

    #[inline(always)]
    fn is_local_resolver([first, ..]: Self::Address) -> bool {
        first == 127
    }

    #[inline(always)]
    fn is_unassigned(address: Self::Address) -> bool {
        address == [0; 4]
    }

    #[inline(always)]
    fn is_of_this_host([first, ..]: Self::Address) -> bool {
        first == 127
    }

    #[inline(always)]
    fn is_group(address: Self::Address) -> bool {
        address[0] & 0xf0 == 224 || address == [255; 4]
    }

    #[inline(always)]
    fn is_link_local(_: Self::Address) -> bool {
        false
    }
}

impl Ip for Ipv6 {
    type Address = [u8; 16];
    const FAMILY: Family = Family::Ipv6;
    const ETHER_TYPE: u16 = 0x86dd;

    #[inline(always)]
    fn widen(address: Self::Address) -> [u8; 16] {
        address
    }

    #[inline(always)]
    fn is_loopback(address: Self::Address) -> bool {
        u128::from_be_bytes(address) <= 1
    }

    #[inline(always)]
    fn is_local_resolver(address: Self::Address) -> bool {
        Self::is_loopback(address)
    }

    #[inline(always)]
    fn is_unassigned(address: Self::Address) -> bool {
        address == [0; 16] || (address[0] == 0xfe && address[1] & 0xc0 == 0x80)
    }

    #[inline(always)]
    fn is_of_this_host(address: Self::Address) -> bool {
        u128::from_be_bytes(address) == 1
    }

    #[inline(always)]
    fn is_group([first, ..]: Self::Address) -> bool {
        first == 0xff
    }

    #[inline(always)]
    fn is_link_local([first, second, ..]: Self::Address) -> bool {
        first == 0xfe && second & 0xc0 == 0x80
    }
}

/// The IPv4 address inside a v4-mapped IPv6 address (`::ffff:a.b.c.d`), if it is one.
#[must_use]
#[inline(always)]
pub fn v4_mapped(address: [u8; 16]) -> Option<[u8; 4]> {
    let bits = u128::from_be_bytes(address);
    if bits >> 32 == 0xffff { Some((bits as u32).to_be_bytes()) } else { None }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn v6(text: &str) -> [u8; 16] {
        text.parse::<Ipv6Addr>().unwrap().octets()
    }

    #[test]
    fn loopback_is_one_address_per_family() {
        assert!(Ipv4::is_loopback([127, 0, 0, 1]));
        assert!(!Ipv4::is_loopback([127, 0, 0, 2]));
        assert!(Ipv4::is_loopback([0, 0, 0, 0]));
        assert!(Ipv6::is_loopback(v6("::1")));
        assert!(Ipv6::is_loopback(v6("::")));
        assert!(!Ipv6::is_loopback(v6("::2")));
    }

    #[test]
    fn link_scope() {
        assert!(Ipv4::is_link_scoped([224, 0, 0, 1]));
        assert!(Ipv4::is_link_scoped([255, 255, 255, 255]));
        assert!(!Ipv4::is_link_scoped([169, 254, 169, 254]));
        assert!(Ipv4::is_link_scoped([239, 255, 255, 255]));
        for unicast in [[223, 255, 255, 255], [240, 0, 0, 1], [247, 1, 2, 3], [255, 255, 255, 254]] {
            assert!(!Ipv4::is_link_scoped(unicast), "{unicast:?}");
        }
        assert!(Ipv6::is_link_scoped(v6("fe80::1")));
        assert!(Ipv6::is_link_scoped(v6("febf::1")));
        assert!(Ipv6::is_link_scoped(v6("ff02::1")));
        assert!(!Ipv6::is_link_scoped(v6("fec0::1")));
        assert!(!Ipv6::is_link_scoped(v6("fd00::1")));
    }

    #[test]
    fn v4_mapped_addresses_are_found_and_no_others() {
        let mapped = Ipv4Addr::new(10, 1, 2, 3).to_ipv6_mapped().octets();
        assert_eq!(v4_mapped(mapped), Some([10, 1, 2, 3]));
        assert_eq!(Ipv4::widen([10, 1, 2, 3]), mapped);
        for text in ["::1", "::a01:203", "64:ff9b::a01:203", "::ffff:0:a01:203", "fd00::ffff:a01:203"] {
            assert_eq!(v4_mapped(v6(text)), None, "{text}");
        }
    }
}
