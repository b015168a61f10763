//! Crafted packets.

use std::net::IpAddr;

use redirect_ebpf::family::Family;
use redirect_ebpf::packet::SYN;

/// The pod's addresses.
pub(crate) const POD_IPV4: [u8; 4] = [10, 0, 0, 2];
pub(crate) const POD_IPV6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// The peer's addresses.
pub(crate) const PEER_IPV4: [u8; 4] = [192, 0, 2, 1];
pub(crate) const PEER_IPV6: [u8; 16] = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Protocol numbers.
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;

/// IPv6 extension headers.
pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const AUTHENTICATION: u8 = 51;
pub(crate) const DESTINATION: u8 = 60;

/// The sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// The peer, to the pod.
    Peer,
    /// The pod, to the peer.
    Pod,
}

/// A packet builder; by default a plain SYN to port 80.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) family: Family,
    pub(crate) from: From,
    pub(crate) tags: Vec<u16>,
    /// IPv4 options, a multiple of four bytes.
    pub(crate) options: Vec<u8>,
    /// The flags and the offset of an IPv4 fragment.
    pub(crate) fragment: u16,
    /// IPv6 extension headers: their type, and their bytes behind the "next header" field.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    pub(crate) protocol: u8,
    pub(crate) source_port: u16,
    pub(crate) port: u16,
    pub(crate) flags: u8,
    /// Instead of the peer's address.
    pub(crate) peer_ipv6: [u8; 16],
    pub(crate) peer_ipv4: [u8; 4],
    /// Instead of the pod's and the peer's addresses.
    pub(crate) ends: Option<(IpAddr, IpAddr)>,
    /// The data after the TCP header.
    pub(crate) data: Vec<u8>,
    /// The payload of the IP header, instead of a TCP header.
    pub(crate) payload: Option<Vec<u8>>,
}

impl Packet {
    pub(crate) fn syn(family: Family, from: From) -> Self {
        Self {
            family,
            from,
            tags: Vec::new(),
            options: Vec::new(),
            fragment: 0,
            extensions: Vec::new(),
            protocol: TCP,
            source_port: 40_000,
            port: 80,
            flags: SYN,
            peer_ipv6: PEER_IPV6,
            peer_ipv4: PEER_IPV4,
            ends: None,
            data: Vec::new(),
            payload: None,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in &self.tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 7]);
        }
        match self.family {
            Family::Ipv4 => self.ipv4(&mut bytes),
            Family::Ipv6 => self.ipv6(&mut bytes),
        }
        bytes
    }

    fn ipv4(&self, bytes: &mut Vec<u8>) {
        bytes.extend([0x08, 0x00]);
        let payload = self.payload();
        let header = 20 + self.options.len();
        bytes.extend([0x40 | (header / 4) as u8, 0]);
        bytes.extend(((header + payload.len()) as u16).to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([64, self.protocol, 0, 0]);
        let (source, destination) = match self.ends {
            Some((IpAddr::V4(source), IpAddr::V4(destination))) => (source.octets(), destination.octets()),
            _ => self.ends(POD_IPV4, self.peer_ipv4),
        };
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(&self.options);
        bytes.extend(payload);
    }

    fn ipv6(&self, bytes: &mut Vec<u8>) {
        bytes.extend([0x86, 0xdd]);
        let mut payload = Vec::new();
        let following = self.extensions.iter().map(|(kind, _)| *kind).skip(1).chain([self.protocol]);
        for ((_, rest), next) in self.extensions.iter().zip(following) {
            payload.push(next);
            payload.extend(rest);
        }
        payload.extend(self.payload());
        bytes.extend([0x60, 0, 0, 0]);
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.push(self.extensions.first().map_or(self.protocol, |(kind, _)| *kind));
        bytes.push(64);
        let (source, destination) = match self.ends {
            Some((IpAddr::V6(source), IpAddr::V6(destination))) => (source.octets(), destination.octets()),
            _ => self.ends(POD_IPV6, self.peer_ipv6),
        };
        bytes.extend(source);
        bytes.extend(destination);
        bytes.extend(payload);
    }

    fn ends<A>(&self, pod: A, peer: A) -> (A, A) {
        match self.from {
            From::Pod => (pod, peer),
            From::Peer => (peer, pod),
        }
    }

    fn payload(&self) -> Vec<u8> {
        if let Some(payload) = &self.payload {
            return payload.clone();
        }
        let mut header = self.source_port.to_be_bytes().to_vec();
        header.extend(self.port.to_be_bytes());
        header.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        header.extend(&self.data);
        header
    }
}

/// A fragment header of IPv6: the offset in bytes, and whether more follow.
pub(crate) fn fragment(offset: u16, more: bool) -> (u8, Vec<u8>) {
    let [high, low] = (offset | u16::from(more)).to_be_bytes();
    (FRAGMENT, vec![0, high, low, 0, 0, 0, 9])
}

/// An extension header of eight bytes plus a multiple of eight.
pub(crate) fn extension(kind: u8, more: u8) -> (u8, Vec<u8>) {
    let mut bytes = vec![0; 7 + 8 * usize::from(more)];
    bytes[0] = more;
    (kind, bytes)
}

/// An authentication header of 24 bytes: its length is counted in words, less two.
pub(crate) fn authentication() -> (u8, Vec<u8>) {
    let mut bytes = vec![0; 23];
    bytes[0] = 4;
    (AUTHENTICATION, bytes)
}
