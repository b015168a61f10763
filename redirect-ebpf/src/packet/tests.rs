//! Builds packets byte by byte, so that the parser is checked against the RFCs and not against itself.

use proptest::prelude::*;

use super::*;

struct Bytes {
    ether_type: u16,
    bytes: Vec<u8>,
}

impl Packet for Bytes {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.bytes.get(offset as usize..)?.first_chunk().copied()
    }

    fn ether_type(&self) -> u16 {
        self.ether_type
    }
}

const V4: ([u8; 4], [u8; 4]) = ([10, 0, 0, 1], [10, 0, 0, 2]);
const V6: ([u8; 16], [u8; 16]) = ([0xfd; 16], [0xfc; 16]);

fn tcp(flags: u8) -> Vec<u8> {
    let mut header =
        vec![0x30, 0x39, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    header.extend_from_slice(b"payload");
    header
}

fn ipv4(options: &[u8], fragment: u16, protocol: u8, payload: &[u8]) -> Bytes {
    let [high, low] = fragment.to_be_bytes();
    let words = 5 + options.len() / 4;
    let mut bytes = vec![0x40 | words as u8, 0, 0, 0, 0, 1, high, low, 64, protocol, 0, 0];
    bytes.extend(V4.0);
    bytes.extend(V4.1);
    bytes.extend(options);
    bytes.extend(payload);
    Bytes { ether_type: Ipv4::ETHER_TYPE, bytes }
}

fn ipv6(next: u8, payload: &[u8]) -> Bytes {
    let mut bytes = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
    bytes.extend(V6.0);
    bytes.extend(V6.1);
    bytes.extend(payload);
    Bytes { ether_type: Ipv6::ETHER_TYPE, bytes }
}

fn tagged(mut inner: Bytes, tags: &[u16]) -> Bytes {
    for &tag in tags.iter().rev() {
        let [high, low] = inner.ether_type.to_be_bytes();
        inner.bytes.splice(0..0, [0, 7, high, low]);
        inner.ether_type = tag;
    }
    inner
}

fn expect_tcp<I: Parse>(packet: &Bytes, flags: u8) -> Segment<I::Address>
where
    I::Address: core::fmt::Debug,
{
    match parse::<I>(packet) {
        Parsed::Tcp(segment) => {
            assert_eq!(segment.flags, flags);
            assert_eq!(segment.source_port, 12345u16.to_be_bytes());
            assert_eq!(segment.destination_port, 80u16.to_be_bytes());
            segment
        }
        other => panic!("expected TCP, got {other:?}"),
    }
}

#[test]
fn plain_headers() {
    let v4 = expect_tcp::<Ipv4>(&ipv4(&[], 0x4000, 6, &tcp(SYN)), SYN);
    assert_eq!((v4.source, v4.destination), V4);
    assert_eq!((v4.network_offset, v4.transport_offset), (0, 20));
    let v6 = expect_tcp::<Ipv6>(&ipv6(6, &tcp(SYN)), SYN);
    assert_eq!((v6.source, v6.destination), V6);
    assert_eq!((v6.network_offset, v6.transport_offset), (0, 40));
    assert_eq!(Ipv4::plain(&ipv4(&[], 0x4000, 6, &tcp(SYN)), Protocol::Tcp), Some(v4));
    assert_eq!(Ipv6::plain(&ipv6(6, &tcp(SYN)), Protocol::Tcp), Some(v6));
    // Shorter than any TCP header.
    let datagram = &tcp(SYN)[..8];
    let v4 = Ipv4::plain(&ipv4(&[], 0x4000, 17, datagram), Protocol::Udp);
    assert_eq!(v4.map(Parsed::Datagram), Some(parse::<Ipv4>(&ipv4(&[], 0x4000, 17, datagram))));
    let v6 = Ipv6::plain(&ipv6(17, datagram), Protocol::Udp);
    assert_eq!(v6.map(Parsed::Datagram), Some(parse::<Ipv6>(&ipv6(17, datagram))));
    for other in
        [ipv4(&[1, 1, 1, 1], 0, 6, &tcp(SYN)), ipv4(&[], 0x2000, 6, &tcp(SYN)), ipv4(&[], 0, 17, &tcp(SYN))]
    {
        assert_eq!(Ipv4::plain(&other, Protocol::Tcp), None);
    }
    assert_eq!(Ipv6::plain(&ipv6(0, &tcp(SYN)), Protocol::Tcp), None);
}

#[test]
fn a_family_ignores_the_other_and_other_protocols() {
    assert_eq!(parse::<Ipv6>(&ipv4(&[], 0, 6, &tcp(SYN))), Parsed::NotOurs);
    assert_eq!(parse::<Ipv4>(&ipv6(6, &tcp(SYN))), Parsed::NotOurs);
    for protocol in [1, 50, 132] {
        assert_eq!(parse::<Ipv4>(&ipv4(&[], 0, protocol, &tcp(SYN))), Parsed::NotOurs);
        assert_eq!(parse::<Ipv6>(&ipv6(protocol, &tcp(SYN))), Parsed::NotOurs);
    }
    assert_eq!(parse::<Ipv6>(&ipv6(58, &tcp(SYN))), Parsed::NotOurs, "neighbour discovery is not touched");
}

#[test]
fn datagrams_have_ports_and_no_flags() {
    fn check<I: Parse<Address: core::fmt::Debug>>(packet: &Bytes) {
        let Parsed::Datagram(segment) = parse::<I>(packet) else { panic!("expected a datagram") };
        assert_eq!(segment.flags, 0);
        assert_eq!(segment.source_port, 12345u16.to_be_bytes());
        assert_eq!(segment.destination_port, 80u16.to_be_bytes());
    }
    // The ports are at the same offset as in TCP. A first fragment has them, a later one does not.
    check::<Ipv4>(&ipv4(&[], 0, 17, &tcp(SYN)));
    check::<Ipv4>(&ipv4(&[], 0x2000, 17, &tcp(SYN)));
    check::<Ipv6>(&ipv6(17, &tcp(SYN)));
    assert_eq!(parse::<Ipv4>(&ipv4(&[], 1, 17, &tcp(SYN))), Parsed::NotOurs);
}

#[test]
fn vlan_tags() {
    for tags in [&[0x8100][..], &[0x88a8, 0x8100], &[0x8100, 0x8100]] {
        expect_tcp::<Ipv4>(&tagged(ipv4(&[], 0, 6, &tcp(SYN)), tags), SYN);
        let segment = expect_tcp::<Ipv6>(&tagged(ipv6(6, &tcp(SYN)), tags), SYN);
        assert_eq!(segment.network_offset, 4 * tags.len() as u32);
    }
    // The kernel finds IP behind any number of priority tags, so more tags than the parser reads must not
    // give `NotOurs`.
    for tags in 3..6 {
        for kind in [0x8100, 0x88a8] {
            let packet = tagged(ipv4(&[], 0, 6, &tcp(SYN)), &vec![kind; tags]);
            assert_eq!(parse::<Ipv4>(&packet), Parsed::Unknown, "{tags} tags");
            assert_eq!(parse::<Ipv6>(&packet), Parsed::Unknown, "{tags} tags");
        }
    }
    let other = Bytes { ether_type: 0x0806, bytes: vec![0; 28] };
    assert_eq!(parse::<Ipv4>(&tagged(other, &[0x8100, 0x8100])), Parsed::NotOurs);
    let bare = Bytes { ether_type: 0x8100, bytes: vec![0, 1] };
    assert_eq!(parse::<Ipv4>(&bare), Parsed::Unknown);
}

#[test]
fn ipv4_options() {
    for words in 1..=10 {
        let segment = expect_tcp::<Ipv4>(&ipv4(&vec![1; words * 4], 0, 6, &tcp(ACK)), ACK);
        assert_eq!(segment.transport_offset, 20 + words as u32 * 4);
    }
    let mut short = ipv4(&[], 0, 6, &tcp(SYN));
    short.bytes[0] = 0x44;
    assert_eq!(parse::<Ipv4>(&short), Parsed::Unknown);
}

#[test]
fn ipv6_extension_headers() {
    let hop_by_hop = |next| vec![next, 0, 0, 0, 0, 0, 0, 0];
    let long_options = |next| {
        let mut header = vec![next, 2];
        header.resize(24, 0);
        header
    };
    let authentication = |next| {
        let mut header = vec![next, 4];
        header.resize(24, 0);
        header
    };
    let chain: Vec<u8> =
        [hop_by_hop(43), long_options(51), authentication(60), hop_by_hop(6), tcp(SYN)].concat();
    let segment = expect_tcp::<Ipv6>(&ipv6(0, &chain), SYN);
    assert_eq!(segment.transport_offset, 40 + 8 + 24 + 24 + 8);

    let mut endless = Vec::new();
    for _ in 0..MAX_EXTENSION_HEADERS + 1 {
        endless.extend(hop_by_hop(60));
    }
    assert_eq!(parse::<Ipv6>(&ipv6(60, &endless)), Parsed::Unknown);

    let mut longest = Vec::new();
    for left in (0..MAX_EXTENSION_HEADERS).rev() {
        longest.extend(hop_by_hop(if left == 0 { 6 } else { 60 }));
    }
    longest.extend(tcp(SYN));
    expect_tcp::<Ipv6>(&ipv6(60, &longest), SYN);
}

#[test]
fn fragments() {
    let tiny = &tcp(SYN)[..8];
    assert!(matches!(parse::<Ipv4>(&ipv4(&[], 0x2000, 6, tiny)), Parsed::Fragment(_)));
    assert_eq!(parse::<Ipv4>(&ipv4(&[], 0x2001, 6, tiny)), Parsed::NotOurs);
    assert_eq!(parse::<Ipv4>(&ipv4(&[], 0x0001, 6, tiny)), Parsed::NotOurs);
    let fragment = |bits: u16| {
        let [high, low] = bits.to_be_bytes();
        let mut header = vec![6, 0, high, low, 0, 0, 0, 9];
        header.extend(tiny);
        header
    };
    assert!(matches!(parse::<Ipv6>(&ipv6(44, &fragment(1))), Parsed::Fragment(_)));
    assert_eq!(parse::<Ipv6>(&ipv6(44, &fragment(8 | 1))), Parsed::NotOurs);
    assert_eq!(parse::<Ipv6>(&ipv6(44, &fragment(8))), Parsed::NotOurs);
    let mut atomic = vec![6, 0, 0, 0, 0, 0, 0, 9];
    atomic.extend(tcp(SYN));
    expect_tcp::<Ipv6>(&ipv6(44, &atomic), SYN);
}

#[test]
fn truncated_headers_are_unknown_at_every_length() {
    for whole in [ipv4(&[1; 8], 0, 6, &tcp(SYN)[..14]).bytes, ipv4(&[], 0, 6, &tcp(SYN)[..14]).bytes] {
        for length in 0..whole.len() {
            let cut = Bytes { ether_type: Ipv4::ETHER_TYPE, bytes: whole[..length].to_vec() };
            assert_eq!(parse::<Ipv4>(&cut), Parsed::Unknown, "{length}");
        }
    }
    let whole = ipv6(60, &[&[6, 0, 0, 0, 0, 0, 0, 0], &tcp(SYN)[..14]].concat()).bytes;
    for length in 0..whole.len() {
        let cut = Bytes { ether_type: Ipv6::ETHER_TYPE, bytes: whole[..length].to_vec() };
        assert_eq!(parse::<Ipv6>(&cut), Parsed::Unknown, "{length}");
    }
}

#[test]
fn flags() {
    let with = |flags| expect_tcp::<Ipv4>(&ipv4(&[], 0, 6, &tcp(flags)), flags);
    assert!(with(SYN).opens());
    assert!(with(SYN | 0xc0).opens(), "ECN set-up");
    assert!(!with(SYN | ACK).opens());
    assert!(!with(SYN | RST).opens());
    assert!(with(ACK).may_hold_cookie());
    assert!(with(ACK | 0x08).may_hold_cookie());
    assert!(!with(ACK | RST).may_hold_cookie());
    assert!(!with(SYN | ACK).may_hold_cookie());
}

proptest! {
    #[test]
    fn random_bytes_never_panic(ether_type in prop_oneof![Just(0x0800u16), Just(0x86dd), Just(0x8100)],
                                bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let packet = Bytes { ether_type, bytes };
        agrees::<Ipv4>(&packet);
        agrees::<Ipv6>(&packet);
    }

    #[test]
    fn plain_segments_are_what_they_are_otherwise(place in 0usize..80, byte in any::<u8>(), length in 0usize..80) {
        let packets = [ipv4(&[], 0x4000, 6, &tcp(SYN)), ipv4(&[1, 1, 1, 1], 0, 6, &tcp(SYN)), ipv6(6, &tcp(SYN))];
        for mut packet in packets {
            if let Some(changed) = packet.bytes.get_mut(place) {
                *changed = byte;
            }
            packet.bytes.truncate(length);
            agrees::<Ipv4>(&packet);
            agrees::<Ipv6>(&packet);
        }
    }
}

/// The fast path and the full parser return the same result.
fn agrees<I: Parse<Address: PartialEq + core::fmt::Debug>>(packet: &Bytes) {
    let whole = parse::<I>(packet);
    if let Some(segment) = I::plain(packet, Protocol::Tcp) {
        assert_eq!(whole, Parsed::Tcp(segment));
    }
    if let Some(segment) = I::plain(packet, Protocol::Udp) {
        assert_eq!(whole, Parsed::Datagram(segment));
    }
}

/// An ICMP error that quotes the first `length` bytes of a TCP packet from 12345 to 80.
fn complaint<I: Parse>(kind: u8, quoted: &Bytes, length: usize) -> Bytes {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(&quoted.bytes[..length]);
    match I::FAMILY {
        Family::Ipv4 => ipv4(&[], 0, 1, &message),
        Family::Ipv6 => ipv6(58, &message),
    }
}

#[test]
fn icmp_errors_lead_to_whom_they_concern() {
    fn check<I: Parse<Address: PartialEq + core::fmt::Debug>>(
        quoted: &Bytes,
        header: usize,
        errors: &[u8],
        (source, destination): (I::Address, I::Address),
    ) {
        for kind in 0..=255 {
            // The ports and the sequence number are always quoted.
            for length in [header + 8, quoted.bytes.len()] {
                let found = complained_of::<I>(&complaint::<I>(kind, quoted, length));
                assert_eq!(found.is_some(), errors.contains(&kind), "{kind}");
                if let Some(found) = found {
                    assert_eq!((found.source, found.destination), (destination, source));
                    assert_eq!(found.source_port, 80u16.to_be_bytes());
                    assert_eq!(found.destination_port, 12345u16.to_be_bytes());
                }
            }
            assert!(complained_of::<I>(&complaint::<I>(kind, quoted, header + 3)).is_none());
        }
        assert!(complained_of::<I>(quoted).is_none());
    }
    check::<Ipv4>(&ipv4(&[], 0, 6, &tcp(ACK)), 20, &[3, 11, 12], V4);
    check::<Ipv4>(&ipv4(&[1; 8], 0x4000, 6, &tcp(ACK)), 28, &[3, 11, 12], V4);
    check::<Ipv6>(&ipv6(6, &tcp(ACK)), 40, &[1, 2, 3, 4], V6);
}
