//! `inbound_*` and `loopback_*`.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Reason;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_DELIVERY, MARK_PROXY, PORT_TUNNEL};
use redirect_ebpf::family::Family;
use redirect_ebpf::packet::{ACK, RST, SYN};

use crate::bench::{Bench, Fate, Proxy};
use crate::packets::{
    DESTINATION, From, HOP_BY_HOP, ICMP, ICMPV6, Packet, ROUTING, UDP, authentication, extension, fragment,
};
use crate::{Shared, trial};

/// A program, with packets for it.
#[derive(Clone, Copy, Debug)]
struct Subject {
    program: &'static str,
    family: Family,
    from: From,
    mark: u32,
}

const SUBJECTS: [Subject; 4] = [
    Subject { program: "inbound_ipv4", family: Family::Ipv4, from: From::Peer, mark: 0 },
    Subject { program: "inbound_ipv6", family: Family::Ipv6, from: From::Peer, mark: 0 },
    Subject { program: "loopback_ipv4", family: Family::Ipv4, from: From::Pod, mark: MARK_CAPTURE },
    Subject { program: "loopback_ipv6", family: Family::Ipv6, from: From::Pod, mark: MARK_CAPTURE },
];

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    type Test = fn(&Bench, Subject) -> Result<()>;
    let tests: [(&str, Test); 9] = [
        ("plain_syn", plain_syn),
        ("headers_before_tcp", headers_before_tcp),
        ("tags", tags),
        ("truncated", truncated),
        ("fragments", fragments),
        ("established_or_stray", established_or_stray),
        ("other_protocols", other_protocols),
        ("other_family", other_family),
        ("endless_headers", endless_headers),
    ];
    let mut trials: Vec<Trial> = SUBJECTS
        .into_iter()
        .flat_map(|subject| tests.map(|(name, test)| (subject, name, test)))
        .map(|(subject, name, test)| {
            trial(shared, format!("programs::{}::{name}", subject.program), move |bench| test(bench, subject))
        })
        .collect();
    for subject in SUBJECTS {
        let name = if subject.from == From::Peer { "tunnel_port" } else { "other_marks" };
        let test: Test = if subject.from == From::Peer { tunnel_port } else { other_marks };
        trials.push(trial(shared, format!("programs::{}::{name}", subject.program), move |bench| {
            test(bench, subject)
        }));
    }
    trials
}

impl Subject {
    fn syn(self) -> Packet {
        Packet::syn(self.family, self.from)
    }

    /// The fate of a packet that opens a connection, with and without a proxy.
    fn is_new(self, bench: &Bench, packet: &Packet) -> Result<()> {
        self.expect(bench, Proxy::Listens, packet, Fate::Captured)?;
        self.expect(bench, Proxy::Absent, packet, Fate::Dropped(Reason::NoListener))
    }

    /// The fate of a packet, with and without a proxy.
    fn always(self, bench: &Bench, packet: &Packet, fate: Fate) -> Result<()> {
        self.expect(bench, Proxy::Listens, packet, fate)?;
        self.expect(bench, Proxy::Absent, packet, fate)
    }

    fn expect(self, bench: &Bench, proxy: Proxy, packet: &Packet, fate: Fate) -> Result<()> {
        let actual = bench.run(self.program, proxy, &packet.bytes(), self.mark)?;
        ensure!(actual == fate, "{actual:?}, not {fate:?}, proxy {proxy:?}: {packet:?}");
        Ok(())
    }
}

fn plain_syn(bench: &Bench, subject: Subject) -> Result<()> {
    subject.is_new(bench, &subject.syn())
}

fn headers_before_tcp(bench: &Bench, subject: Subject) -> Result<()> {
    match subject.family {
        Family::Ipv4 => {
            for words in 1..=10 {
                subject.is_new(bench, &Packet { options: vec![1; words * 4], ..subject.syn() })?;
            }
        }
        Family::Ipv6 => {
            let chains = [
                vec![extension(HOP_BY_HOP, 0)],
                vec![extension(ROUTING, 2)],
                vec![extension(DESTINATION, 0)],
                vec![extension(DESTINATION, 127)],
                vec![authentication()],
                vec![fragment(0, false)],
                vec![
                    extension(HOP_BY_HOP, 0),
                    extension(DESTINATION, 1),
                    extension(ROUTING, 2),
                    fragment(0, false),
                    authentication(),
                    extension(DESTINATION, 0),
                ],
                vec![extension(DESTINATION, 0); 8],
            ];
            for extensions in chains {
                subject.is_new(bench, &Packet { extensions, ..subject.syn() })?;
            }
        }
    }
    Ok(())
}

fn tags(bench: &Bench, subject: Subject) -> Result<()> {
    for tags in [vec![0x8100], vec![0x88a8], vec![0x88a8, 0x8100], vec![0x8100, 0x8100]] {
        subject.is_new(bench, &Packet { tags, ..subject.syn() })?;
    }
    // The parser reads no deeper; but the kernel does, if the tags have VLAN 0.
    for deeper in 3..6 {
        let packet = Packet { tags: vec![0x8100; deeper], ..subject.syn() };
        subject.always(bench, &packet, Fate::Dropped(Reason::Malformed))?;
    }
    Ok(())
}

/// Truncated after every byte: a packet that is too short for its headers is dropped, and none is taken for a
/// connection.
fn truncated(bench: &Bench, subject: Subject) -> Result<()> {
    const ETHERNET: usize = 14;
    let mut packets = vec![subject.syn()];
    if subject.family == Family::Ipv4 {
        packets.push(Packet { options: vec![1; 40], ..subject.syn() });
    } else {
        let extensions = vec![extension(HOP_BY_HOP, 0), authentication(), fragment(0, false)];
        packets.push(Packet { extensions, ..subject.syn() });
    }
    packets.push(Packet { tags: vec![0x88a8, 0x8100], ..subject.syn() });
    for packet in packets {
        let whole = packet.bytes();
        // The flags, the fourteenth byte of the TCP header, are the last relevant byte.
        let needed = whole.len() - 6;
        // The kernel refuses test runs on packets without a whole IP header, unless a tag hides that.
        let header = if subject.family == Family::Ipv4 { 20 } else { 40 };
        let first = ETHERNET + if packet.tags.is_empty() { header } else { 1 };
        for length in first..whole.len() {
            let fate = if length < needed { Fate::Dropped(Reason::Malformed) } else { Fate::Captured };
            let actual = bench.run(subject.program, Proxy::Listens, &whole[..length], subject.mark)?;
            ensure!(
                actual == fate,
                "{actual:?}, not {fate:?}, at {length} of {} bytes: {packet:?}",
                whole.len()
            );
        }
    }
    Ok(())
}

fn fragments(bench: &Bench, subject: Subject) -> Result<()> {
    let with = |offset: u16, more: bool, payload: Option<Vec<u8>>| match subject.family {
        Family::Ipv4 => {
            let fragment = (offset / 8) | if more { 0x2000 } else { 0 };
            Packet { fragment, payload, ..subject.syn() }
        }
        Family::Ipv6 => Packet { extensions: vec![fragment(offset, more)], payload, ..subject.syn() },
    };
    let whole = Packet { fragment: 0, ..subject.syn() }.bytes();
    let tiny = whole[whole.len() - 20..whole.len() - 12].to_vec();
    // The first one, whole and as small as possible: it has the ports, and the flags may be in the next one.
    subject.always(bench, &with(0, true, None), Fate::Dropped(Reason::Fragmented))?;
    subject.always(bench, &with(0, true, Some(tiny)), Fate::Dropped(Reason::Fragmented))?;
    // Too short for the ports.
    subject.always(bench, &with(0, true, Some(vec![0; 3])), Fate::Dropped(Reason::Malformed))?;
    // Later ones lead nowhere without the first, whatever their contents.
    for offset in [8, 16, 1480] {
        for more in [true, false] {
            subject.always(bench, &with(offset, more, None), Fate::Untouched)?;
        }
    }
    Ok(())
}

/// Segments that open no connection are left to the stack: they belong to existing connections, or are
/// answered by a reset.
fn established_or_stray(bench: &Bench, subject: Subject) -> Result<()> {
    const FIN: u8 = 1;
    for flags in [ACK, SYN | ACK, RST, RST | ACK, SYN | RST, FIN | ACK, 0, FIN, 0xff] {
        subject.always(bench, &Packet { flags, ..subject.syn() }, Fate::Untouched)?;
    }
    // Further flags, such as ECN's, make no difference.
    for flags in [SYN | 0x40, SYN | 0xc0, SYN | FIN] {
        subject.is_new(bench, &Packet { flags, ..subject.syn() })?;
    }
    Ok(())
}

fn other_protocols(bench: &Bench, subject: Subject) -> Result<()> {
    let neighbour_solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
    for (protocol, payload) in [
        (UDP, None),
        (ICMP, Some(vec![8, 0, 0, 0, 0, 0, 0, 0])),
        (ICMPV6, Some(neighbour_solicitation)),
        (132, None),
        (47, None),
        (59, Some(Vec::new())),
        (255, None),
    ] {
        subject.always(bench, &Packet { protocol, payload, ..subject.syn() }, Fate::Untouched)?;
    }
    Ok(())
}

fn other_family(bench: &Bench, subject: Subject) -> Result<()> {
    let family = if subject.family == Family::Ipv4 { Family::Ipv6 } else { Family::Ipv4 };
    let other = Packet::syn(family, subject.from);
    for tags in [vec![], vec![0x8100]] {
        subject.always(bench, &Packet { tags, ..other.clone() }, Fate::Untouched)?;
    }
    // ARP, and a made-up type.
    for kind in [[0x08, 0x06], [0x12, 0x34]] {
        let mut bytes = other.bytes();
        bytes[12..14].copy_from_slice(&kind);
        let fate = bench.run(subject.program, Proxy::Listens, &bytes, subject.mark)?;
        ensure!(fate == Fate::Untouched, "{fate:?} of {kind:02x?}");
    }
    Ok(())
}

fn endless_headers(bench: &Bench, subject: Subject) -> Result<()> {
    let packet = match subject.family {
        Family::Ipv4 => {
            // A header with a length below the minimum.
            let mut bytes = subject.syn().bytes();
            bytes[14] = 0x44;
            let fate = bench.run(subject.program, Proxy::Listens, &bytes, subject.mark)?;
            ensure!(fate == Fate::Dropped(Reason::Malformed), "{fate:?}");
            return Ok(());
        }
        Family::Ipv6 => Packet { extensions: vec![extension(DESTINATION, 0); 9], ..subject.syn() },
    };
    subject.always(bench, &packet, Fate::Dropped(Reason::Malformed))
}

fn tunnel_port(bench: &Bench, subject: Subject) -> Result<()> {
    let packet = Packet { port: PORT_TUNNEL, ..subject.syn() };
    subject.expect(bench, Proxy::Listens, &packet, Fate::Tunnelled)?;
    subject.expect(bench, Proxy::Absent, &packet, Fate::Dropped(Reason::NoListener))
}

/// On `lo` only packets that are marked for capture are captured.
fn other_marks(bench: &Bench, subject: Subject) -> Result<()> {
    for mark in [0, MARK_DELIVERY, MARK_PROXY, 0xffff_f000] {
        Subject { mark, ..subject }.always(bench, &subject.syn(), Fate::Untouched)?;
    }
    Subject { mark: MARK_CAPTURE | 0xffff_f000, ..subject }.is_new(bench, &subject.syn())
}
