//! Finds the TCP or UDP header of a packet: VLAN tags, IPv4 options, IPv6 extension headers, fragments.

use crate::decide::Protocol;
use crate::family::{Family, Ip, Ipv4, Ipv6};
use crate::maps::Tuple;

/// TCP flag: synchronize.
pub const SYN: u8 = 0x02;
/// TCP flag: reset.
pub const RST: u8 = 0x04;
/// TCP flag: acknowledgement.
pub const ACK: u8 = 0x10;

/// The bytes of a packet, counted from behind its Ethernet header (and behind the VLAN tags that the kernel has already
/// taken off).
pub trait Packet {
    /// `N` bytes at `offset`; `None` if the packet is shorter.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// The Ethernet protocol number of the data at offset 0.
    fn ether_type(&self) -> u16;

    /// Returns the number unchanged, but hides its value from the verifier. All paths through a chain of headers then look
    /// the same to it. Without that, Linux 6.1 follows every path to its end: more than a million instructions.
    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        number
    }
}

/// The result of parsing a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<A> {
    /// A packet with a whole TCP header.
    Tcp(Segment<A>),
    /// The first fragment of a TCP segment. Its flags may be in a later fragment, so it may open a connection.
    Fragment(Segment<A>),
    /// A UDP datagram, or the first fragment of one.
    Datagram(Segment<A>),
    /// Not subject to capture: another family, another protocol, or a later fragment, which is harmless without the first
    /// one.
    NotOurs,
    /// Undecidable: the headers end too early, contradict themselves, or exceed the parser's limits. The kernel may still
    /// find a connection in it, so the gates drop it.
    Unknown,
}

/// Addresses, ports and flags of a TCP segment, or of a UDP datagram, which has no flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<A> {
    /// Source address.
    pub source: A,
    /// Destination address.
    pub destination: A,
    /// Source port, network order.
    pub source_port: [u8; 2],
    /// Destination port, network order.
    pub destination_port: [u8; 2],
    /// [`SYN`], [`ACK`], [`RST`] and the others; zero in all but [`Parsed::Tcp`].
    pub flags: u8,
    /// Where the IP header begins.
    pub network_offset: u32,
    /// Where the TCP or UDP header begins.
    pub transport_offset: u32,
}

const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const IPPROTO_ICMPV6: u8 = 58;

/// The length of an ICMP error's header; the quoted packet follows.
const ICMP_HEADER: u32 = 8;

/// 802.1Q and 802.1ad.
const VLAN_TYPES: [u16; 2] = [0x8100, 0x88a8];

/// Two tags (QinQ) are the practical maximum. The kernel strips any number of priority tags (VLAN 0) and finds IP behind
/// them, so a packet with more tags is [`Parsed::Unknown`], not [`Parsed::NotOurs`].
const MAX_VLAN_TAGS: u32 = 2;

/// Longer chains of extension headers are legal and useless; the packet is treated as malformed.
const MAX_EXTENSION_HEADERS: u32 = 8;

/// Whether a packet is certainly not of family `I`, by its type alone.
#[inline(always)]
pub fn is_of_another_family<I: Ip>(packet: &impl Packet) -> bool {
    let ether_type = packet.ether_type();
    ether_type != I::ETHER_TYPE && !VLAN_TYPES.contains(&ether_type)
}

/// How much of a packet is present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Its beginning, in an ICMP error: of a TCP header only the ports are guaranteed, as in a first fragment.
    Quoted,
}

/// A family whose headers can be walked.
pub trait Parse: Ip {
    /// The minimum length of the IP header.
    const HEADER: u32;

    /// The offset of the source address in the IP header.
    const SOURCE: u32;

    /// The offset of the destination address in the IP header.
    const DESTINATION: u32;

    /// The fast path: the TCP segment or UDP datagram of a packet without tags, options, extension headers and fragments, as
    /// nearly all are. `None` for others: use [`parse`].
    fn plain(packet: &impl Packet, protocol: Protocol) -> Option<Segment<Self::Address>>;

    /// Finds the TCP or UDP header behind the IP header at `offset`.
    fn parse_at(packet: &impl Packet, offset: u32, extent: Extent) -> Parsed<Self::Address>;

    /// The offset of the quoted packet, if the packet with its IP header at `offset` is an ICMP error.
    fn quoted_at(packet: &impl Packet, offset: u32) -> Option<u32>;

    /// The address at `offset`.
    fn load(packet: &impl Packet, offset: u32) -> Option<Self::Address>;
}

/// Parses a packet as one of family `I`.
#[inline(always)]
pub fn parse<I: Parse>(packet: &impl Packet) -> Parsed<I::Address> {
    match network_header::<I>(packet) {
        Ok(offset) => I::parse_at(packet, offset, Extent::Whole),
        Err(other) => other,
    }
}

/// The TCP segment that an ICMP error quotes, with its ends swapped, as its receiver would send it: so it leads to the
/// socket that has to receive the error.
#[inline(always)]
pub fn complained_of<I: Parse>(packet: &impl Packet) -> Option<Segment<I::Address>> {
    let quoted = I::quoted_at(packet, network_header::<I>(packet).ok()?)?;
    match I::parse_at(packet, quoted, Extent::Quoted) {
        Parsed::Fragment(segment) => Some(segment.reversed()),
        _ => None,
    }
}

/// The source address of a packet of family `I`, whatever its protocol.
#[inline(always)]
pub fn source<I: Parse>(packet: &impl Packet) -> Option<I::Address> {
    I::load(packet, network_header::<I>(packet).ok()? + I::SOURCE)
}

/// The offset of the IP header, or the result for a packet that is not of family `I`.
#[inline(always)]
fn network_header<I: Parse>(packet: &impl Packet) -> Result<u32, Parsed<I::Address>> {
    let mut ether_type = packet.ether_type();
    let mut offset = 0;
    for _ in 0..MAX_VLAN_TAGS {
        if !VLAN_TYPES.contains(&ether_type) {
            break;
        }
        let Some([_, _, high, low]) = packet.load::<4>(offset) else { return Err(Parsed::Unknown) };
        ether_type = u16::from_be_bytes([high, low]);
        offset += 4;
    }
    if ether_type == I::ETHER_TYPE {
        Ok(offset)
    } else if VLAN_TYPES.contains(&ether_type) {
        Err(Parsed::Unknown)
    } else {
        Err(Parsed::NotOurs)
    }
}

impl Parse for Ipv4 {
    const HEADER: u32 = 20;
    const SOURCE: u32 = 12;
    const DESTINATION: u32 = 16;

    #[inline(always)]
    fn plain(packet: &impl Packet, protocol: Protocol) -> Option<Segment<[u8; 4]>> {
        if packet.ether_type() != Self::ETHER_TYPE {
            return None;
        }
        let header = packet.load::<{ Self::HEADER as usize }>(0)?;
        let whole = [header[6] & 0x3f, header[7]] == [0, 0];
        if header[0] != 0x45 || !whole || header[9] != number(protocol) {
            return None;
        }
        let source = [header[12], header[13], header[14], header[15]];
        let destination = [header[16], header[17], header[18], header[19]];
        plain_segment(packet, protocol, Self::HEADER, (source, destination))
    }

    #[inline(always)]
    fn parse_at(packet: &impl Packet, offset: u32, extent: Extent) -> Parsed<[u8; 4]> {
        let Some(header) = packet.load::<20>(offset) else { return Parsed::Unknown };
        let length = u32::from(header[0] & 0xf) * 4;
        if header[0] >> 4 != 4 || length < 20 {
            return Parsed::Unknown;
        }
        let protocol = header[9];
        if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
            return Parsed::NotOurs;
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        if fragment & 0x1fff != 0 {
            return Parsed::NotOurs;
        }
        let addresses = (
            [header[12], header[13], header[14], header[15]],
            [header[16], header[17], header[18], header[19]],
        );
        let fragmented = extent == Extent::Quoted || fragment & 0x2000 != 0;
        transport(
            packet,
            protocol,
            addresses,
            Place { network: offset, transport: offset + length, fragmented },
        )
    }

    #[inline(always)]
    fn quoted_at(packet: &impl Packet, offset: u32) -> Option<u32> {
        let header: [u8; 20] = packet.load(offset)?;
        let message = offset + u32::from(header[0] & 0xf) * 4;
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        if header[9] != IPPROTO_ICMP || fragment & 0x1fff != 0 {
            return None;
        }
        // Destination unreachable (which includes "fragmentation needed"), time exceeded, parameter problem.
        let [kind] = packet.load(message)?;
        matches!(kind, 3 | 11 | 12).then_some(message + ICMP_HEADER)
    }

    #[inline(always)]
    fn load(packet: &impl Packet, offset: u32) -> Option<[u8; 4]> {
        packet.load(offset)
    }
}

impl Parse for Ipv6 {
    const HEADER: u32 = 40;
    const SOURCE: u32 = 8;
    const DESTINATION: u32 = 24;

    #[inline(always)]
    fn plain(packet: &impl Packet, protocol: Protocol) -> Option<Segment<[u8; 16]>> {
        if packet.ether_type() != Self::ETHER_TYPE {
            return None;
        }
        let header = packet.load::<8>(0)?;
        if header[0] >> 4 != 6 || header[6] != number(protocol) {
            return None;
        }
        let addresses = (packet.load(Self::SOURCE)?, packet.load(Self::DESTINATION)?);
        plain_segment(packet, protocol, Self::HEADER, addresses)
    }

    #[inline(always)]
    fn parse_at(packet: &impl Packet, offset: u32, extent: Extent) -> Parsed<[u8; 16]> {
        let Some(header) = packet.load::<8>(offset) else { return Parsed::Unknown };
        if header[0] >> 4 != 6 {
            return Parsed::Unknown;
        }
        let mut next = header[6];
        let fragmented = extent == Extent::Quoted;
        let mut place = Place { network: offset, transport: offset + Self::HEADER, fragmented };
        for _ in 0..MAX_EXTENSION_HEADERS {
            let Some(kind) = Extension::of(next) else { break };
            let Some(extension) = packet.load::<8>(place.transport) else { return Parsed::Unknown };
            let mut fragmented = place.fragmented;
            let length = match kind {
                Extension::Options => (u32::from(extension[1]) + 1) * 8,
                Extension::Authentication => (u32::from(extension[1]) + 2) * 4,
                Extension::Fragment => {
                    let fragment = u16::from_be_bytes([extension[2], extension[3]]);
                    if fragment & 0xfff8 != 0 {
                        return Parsed::NotOurs;
                    }
                    fragmented |= fragment & 1 != 0;
                    8
                }
            };
            // Offsets do not reach 2^16: each header is 2 KiB at most.
            let reached = packet.forget((place.transport + length) << 1 | u32::from(fragmented));
            place.transport = reached >> 1;
            place.fragmented = reached & 1 != 0;
            next = extension[0];
        }
        if next != IPPROTO_TCP && next != IPPROTO_UDP {
            return if Extension::of(next).is_some() { Parsed::Unknown } else { Parsed::NotOurs };
        }
        let Some(source) = packet.load::<16>(offset + 8) else { return Parsed::Unknown };
        let Some(destination) = packet.load::<16>(offset + 24) else { return Parsed::Unknown };
        transport(packet, next, (source, destination), place)
    }

    #[inline(always)]
    fn quoted_at(packet: &impl Packet, offset: u32) -> Option<u32> {
        let header: [u8; 8] = packet.load(offset)?;
        let message = offset + Self::HEADER;
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        let [kind] = packet.load(message)?;
        (header[6] == IPPROTO_ICMPV6 && matches!(kind, 1..=4)).then_some(message + ICMP_HEADER)
    }

    #[inline(always)]
    fn load(packet: &impl Packet, offset: u32) -> Option<[u8; 16]> {
        packet.load(offset)
    }
}

/// The IPv6 extension headers that may stand before TCP.
#[derive(Clone, Copy)]
enum Extension {
    /// Hop-by-hop options, routing, destination options, mobility, HIP, shim6: length in units of eight bytes.
    Options,
    /// Authentication header: length in units of four bytes.
    Authentication,
    /// Fragment header: fixed length.
    Fragment,
}

impl Extension {
    #[inline(always)]
    const fn of(next_header: u8) -> Option<Self> {
        match next_header {
            0 | 43 | 60 | 135 | 139 | 140 => Some(Self::Options),
            51 => Some(Self::Authentication),
            44 => Some(Self::Fragment),
            _ => None,
        }
    }
}

/// The offsets of a packet's headers, and whether it is the first of several fragments.
#[derive(Clone, Copy)]
struct Place {
    network: u32,
    transport: u32,
    fragmented: bool,
}

#[inline(always)]
const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => IPPROTO_TCP,
        Protocol::Udp => IPPROTO_UDP,
    }
}

/// The segment of a packet whose TCP or UDP header is at `transport`.
#[inline(always)]
fn plain_segment<A>(
    packet: &impl Packet,
    protocol: Protocol,
    transport: u32,
    (source, destination): (A, A),
) -> Option<Segment<A>> {
    let ports = packet.load::<4>(transport)?;
    let flags = match protocol {
        Protocol::Tcp => packet.load::<2>(transport + 12)?[1],
        Protocol::Udp => 0,
    };
    Some(Segment {
        source,
        destination,
        source_port: [ports[0], ports[1]],
        destination_port: [ports[2], ports[3]],
        flags,
        network_offset: 0,
        transport_offset: transport,
    })
}

#[inline(always)]
fn transport<A>(
    packet: &impl Packet,
    protocol: u8,
    (source, destination): (A, A),
    place: Place,
) -> Parsed<A> {
    // A first fragment may end right behind the ports and the sequence number: eight bytes are the minimum.
    let Some(ports) = packet.load::<4>(place.transport) else { return Parsed::Unknown };
    let segment = Segment {
        source,
        destination,
        source_port: [ports[0], ports[1]],
        destination_port: [ports[2], ports[3]],
        flags: 0,
        network_offset: place.network,
        transport_offset: place.transport,
    };
    if protocol == IPPROTO_UDP {
        return Parsed::Datagram(segment);
    }
    if place.fragmented {
        return Parsed::Fragment(segment);
    }
    let Some([_, flags]) = packet.load::<2>(place.transport + 12) else { return Parsed::Unknown };
    Parsed::Tcp(Segment { flags, ..segment })
}

impl<A: Copy> Segment<A> {
    /// The segment's addresses and ports, as in map keys.
    #[inline(always)]
    pub fn tuple<I: Ip<Address = A>>(&self) -> Tuple {
        Tuple {
            source: I::widen(self.source),
            destination: I::widen(self.destination),
            source_port: self.source_port,
            destination_port: self.destination_port,
        }
    }

    /// The segment with source and destination swapped.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..*self
        }
    }

    /// Whether the segment opens a connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }

    /// Whether the segment is a SYN-ACK.
    #[inline(always)]
    pub const fn accepts(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN | ACK
    }

    /// Whether the segment resets a connection.
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        self.flags & RST != 0
    }

    /// Whether the segment could be the last ACK of a handshake with a SYN cookie.
    #[inline(always)]
    pub const fn may_hold_cookie(&self) -> bool {
        self.flags & (SYN | ACK | RST) == ACK
    }
}

/// The family's number in `bpf_fib_lookup` and in socket addresses (`AF_INET`, `AF_INET6`).
#[must_use]
#[inline(always)]
pub const fn address_family(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 2,
        Family::Ipv6 => 10,
    }
}

#[cfg(test)]
mod tests;
