//! Packets that no socket would send, from raw sockets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::wire::{Frame, Wire};
use crate::xdp;

/// TCP.
const TCP: u8 = 6;
/// The fragment header of IPv6.
const FRAGMENT: u8 = 44;

/// A SYN, its IP header included.
pub(crate) fn syn(source: IpAddr, source_port: u16, to: SocketAddr, sequence: u32) -> Vec<u8> {
    packet(source, to.ip(), TCP, &syn_segment(source, source_port, to, sequence))
}

/// The SYN up to its acknowledgement number: its flags are missing.
pub(crate) fn cut_syn(source: IpAddr, source_port: u16, to: SocketAddr) -> Vec<u8> {
    let segment = syn_segment(source, source_port, to, 1);
    packet(source, to.ip(), TCP, &segment[..12])
}

/// Another segment with these flags, its IP header included.
pub(crate) fn segment(source: IpAddr, source_port: u16, to: SocketAddr, flags: u8, sequence: u32) -> Vec<u8> {
    let mut segment = syn_segment(source, source_port, to, sequence);
    segment[13] = flags;
    segment[16..18].copy_from_slice(&[0; 2]);
    let checksum = checksum(source, to.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    packet(source, to.ip(), TCP, &segment)
}

/// The SYN without its IP header; the options make it long enough to be cut in two.
fn syn_segment(source: IpAddr, source_port: u16, to: SocketAddr, sequence: u32) -> Vec<u8> {
    let mut segment = Vec::with_capacity(32);
    segment.extend(source_port.to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    // Acknowledgement; eight words of header, SYN; window; checksum, urgent pointer; a maximum segment size.
    segment.extend([0, 0, 0, 0, 0x80, 0x02, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0x05, 0x00]);
    // No operation.
    segment.extend([1; 8]);
    let checksum = checksum(source, to.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}

/// The SYN in two fragments: the first ends behind `first` bytes of the TCP header, a multiple of eight.
pub(crate) fn fragmented_syn(
    source: IpAddr,
    source_port: u16,
    to: SocketAddr,
    identification: u16,
    first: usize,
) -> [Vec<u8>; 2] {
    let segment = syn_segment(source, source_port, to, 1);
    let (head, tail) = segment.split_at(first);
    [(0, true, head), (first, false, tail)].map(|(offset, more, part)| match to.ip() {
        IpAddr::V4(_) => {
            let mut packet = packet(source, to.ip(), TCP, part);
            packet[4..6].copy_from_slice(&identification.to_be_bytes());
            let field = (offset as u16 / 8) | if more { 0x2000 } else { 0 };
            packet[6..8].copy_from_slice(&field.to_be_bytes());
            packet
        }
        IpAddr::V6(_) => {
            let mut payload = vec![TCP, 0];
            payload.extend((offset as u16 | u16::from(more)).to_be_bytes());
            payload.extend(u32::from(identification).to_be_bytes());
            payload.extend(part);
            packet(source, to.ip(), FRAGMENT, &payload)
        }
    })
}

/// A packet with its IP header.
fn packet(source: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u16;
    let mut packet = match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => ipv4_header(source, to, protocol, 20 + length),
        (IpAddr::V6(source), IpAddr::V6(to)) => ipv6_header(source, to, protocol, length),
        _ => unreachable!("addresses of one family"),
    };
    packet.extend(payload);
    packet
}

/// The kernel fills in the checksum.
fn ipv4_header(source: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: u16) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    let mut header = vec![0x45, 0, high, low, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    header.extend(source.octets());
    header.extend(to.octets());
    header
}

fn ipv6_header(source: Ipv6Addr, to: Ipv6Addr, next_header: u8, length: u16) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, high, low, next_header, 64];
    header.extend(source.octets());
    header.extend(to.octets());
    header
}

/// An IPv4 packet with so many words of options (no operation), its checksum included.
pub(crate) fn ipv4_with_options(source: IpAddr, to: IpAddr, words: usize, segment: &[u8]) -> Vec<u8> {
    let mut packet = packet(source, to, TCP, segment);
    packet[0] += words as u8;
    packet.splice(20..20, vec![1; 4 * words]);
    let length = packet.len() as u16;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    filled(packet)
}

/// An IPv6 packet with extension headers of these types, eight bytes each.
pub(crate) fn ipv6_with_extensions(source: IpAddr, to: IpAddr, kinds: &[u8], segment: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (place, kind) in kinds.iter().enumerate() {
        let next = kinds.get(place + 1).copied().unwrap_or(TCP);
        payload.push(next);
        // Options are padded by one of four bytes; an authentication header's length is counted otherwise; a fragment header is of
        // the only fragment.
        payload.extend(match *kind {
            FRAGMENT => [0, 0, 0, 0, 0, 0, 9],
            51 => [0, 0, 0, 0, 0, 0, 0],
            43 => [0, 0, 0, 0, 0, 0, 0],
            _ => [0, 1, 4, 0, 0, 0, 0],
        });
    }
    payload.extend(segment);
    packet(source, to, kinds.first().copied().unwrap_or(TCP), &payload)
}

/// With the checksum of its IPv4 header, which the kernel fills in only for sockets of its own.
pub(crate) fn filled(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        packet[10..12].copy_from_slice(&[0; 2]);
        let sum = internet_checksum(&packet[..header]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// TCP's checksum, with the addresses.
pub(crate) fn checksum(source: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for address in [source, to] {
        match address {
            IpAddr::V4(v4) => bytes.extend(v4.octets()),
            IpAddr::V6(v6) => bytes.extend(v6.octets()),
        }
    }
    bytes.extend([0, TCP]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    internet_checksum(&bytes)
}

/// A raw socket in the calling thread's namespace that sends packets with their IP header.
pub(crate) fn socket(to: IpAddr) -> io::Result<Socket> {
    // The protocol "raw" is for sending only, and the header is part of the packet.
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    if to.is_ipv6() {
        socket.set_header_included_v6(true)?;
    }
    Ok(socket)
}

/// Sends one packet from the namespace of the calling thread.
pub(crate) fn send_marked(packet: &[u8], to: IpAddr, mark: u32) -> Result<()> {
    send_by(&socket(to)?, packet, to, mark)
}

/// The same with a socket that is bound to the source, like sockets of connections, so that the kernel routes
/// accordingly.
pub(crate) fn send_bound(packet: &[u8], from: IpAddr, to: IpAddr, mark: u32) -> Result<()> {
    let socket = socket(to)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    send_by(&socket, packet, to, mark)
}

fn send_by(socket: &Socket, packet: &[u8], to: IpAddr, mark: u32) -> Result<()> {
    socket.set_mark(mark)?;
    ensure!(socket.send_to(packet, &SocketAddr::new(to, 0).into())? == packet.len());
    Ok(())
}

/// The kind of socket that sends a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A packet socket.
    Packet,
    /// A packet socket that skips the queueing discipline, and with it TC.
    PastQdisc,
    /// An AF_XDP socket.
    Xdp,
}

/// How a frame is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ethernet {
    way: Way,
    /// Priority tags (VLAN 0) before the packet.
    tags: usize,
    /// The EtherType that the sender declares, instead of the packet's own.
    protocol: Option<u16>,
}

impl Ethernet {
    /// Past TC, behind tags.
    pub(crate) const fn past_qdisc(tags: usize) -> Self {
        Self { way: Way::PastQdisc, tags, protocol: None }
    }

    /// By an AF_XDP socket.
    pub(crate) const fn by_xdp() -> Self {
        Self { way: Way::Xdp, tags: 0, protocol: None }
    }

    /// An IP packet that its sender declares to be ARP.
    pub(crate) const fn of_arp() -> Self {
        Self { way: Way::Packet, tags: 0, protocol: Some(0x0806) }
    }

    /// Sends a packet with its IP header from `eth0` of the calling thread's namespace, with these link addresses.
    pub(crate) fn send(self, ends: ([u8; 6], [u8; 6]), packet: &[u8]) -> Result<()> {
        const TAGGED: u16 = 0x8100;
        let kind: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        let mut bytes = [ends.0, ends.1].concat();
        for _ in 0..self.tags {
            bytes.extend(TAGGED.to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(kind.to_be_bytes());
        bytes.extend(filled(packet.to_vec()));
        let protocol = self.protocol.unwrap_or(if self.tags == 0 { kind } else { TAGGED });
        let wire = match self.way {
            Way::Xdp => return xdp::send("eth0", &bytes),
            Way::PastQdisc => Wire::here()?.past_qdisc()?,
            Way::Packet => Wire::here()?,
        };
        wire.send(&[Frame { bytes, protocol }])
    }
}

/// The checksum of bytes whose checksum field is zero.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(u16::from_be_bytes([high, 0])),
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
