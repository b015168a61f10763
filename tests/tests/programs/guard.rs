//! `egress_*`.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Reason;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_DELIVERY, MARK_PROXY};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::ConfigFlags;
use redirect_ebpf::packet::{ACK, RST, SYN};

use crate::bench::{Bench, Fate, Proxy};
use crate::packets::{From, Packet, UDP, fragment};
use crate::{Shared, trial};

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    type Test = fn(&Bench, &str, Family) -> Result<()>;
    let tests: [(&str, Test); 3] = [
        ("connections_past_the_proxy", connections_past_the_proxy),
        ("what_may_leave", what_may_leave),
        ("malformed_and_fragments", malformed_and_fragments),
    ];
    let subjects = [("egress_ipv4", Family::Ipv4), ("egress_ipv6", Family::Ipv6)];
    subjects
        .into_iter()
        .flat_map(|subject| tests.map(|(name, test)| (subject, name, test)))
        .map(|((program, family), name, test)| {
            trial(shared, format!("programs::{program}::{name}"), move |bench| test(bench, program, family))
        })
        .collect()
}

fn syn(family: Family) -> Packet {
    Packet::syn(family, From::Pod)
}

fn expect(bench: &Bench, program: &str, packet: &Packet, mark: u32, fate: Fate) -> Result<()> {
    for proxy in [Proxy::Listens, Proxy::Absent] {
        let actual = bench.run(program, proxy, &packet.bytes(), mark)?;
        ensure!(actual == fate, "{actual:?}, not {fate:?}, with mark {mark:#x}: {packet:?}");
    }
    Ok(())
}

fn connections_past_the_proxy(bench: &Bench, program: &str, family: Family) -> Result<()> {
    for mark in [0, MARK_CAPTURE, MARK_DELIVERY, 0x0053_9000] {
        for tags in [vec![], vec![0x8100]] {
            let packet = Packet { tags, ..syn(family) };
            expect(bench, program, &packet, mark, Fate::Dropped(Reason::Unmarked))?;
        }
    }
    // The pod need not be the sender: forwarded packets are treated the same.
    let forwarded = Packet { from: From::Peer, ..syn(family) };
    expect(bench, program, &forwarded, 0, Fate::Dropped(Reason::Unmarked))
}

fn what_may_leave(bench: &Bench, program: &str, family: Family) -> Result<()> {
    expect(bench, program, &syn(family), MARK_PROXY, Fate::Untouched)?;
    expect(bench, program, &syn(family), MARK_PROXY | 0x5000, Fate::Untouched)?;
    for flags in [ACK, SYN | ACK, RST, RST | ACK, 0x11] {
        expect(bench, program, &Packet { flags, ..syn(family) }, 0, Fate::Untouched)?;
    }
    expect(bench, program, &Packet { protocol: UDP, ..syn(family) }, 0, Fate::Untouched)?;
    let mut group = [1; 16];
    group[..2].copy_from_slice(&[0xff, 2]);
    let to_group = Packet { peer_ipv6: group, peer_ipv4: [224, 0, 0, 1], ..syn(family) };
    expect(bench, program, &to_group, 0, Fate::Untouched)?;
    let mut link_local = [0; 16];
    link_local[..2].copy_from_slice(&[0xfe, 0x80]);
    // For IPv4, an address just beyond the groups.
    let near = Packet { peer_ipv6: link_local, peer_ipv4: [240, 0, 0, 1], ..syn(family) };
    expect(bench, program, &near, 0, Fate::Dropped(Reason::Unmarked))?;
    if family == Family::Ipv6 {
        let lenient = Bench::new()?.configured(ConfigFlags::LINK_LOCAL)?;
        expect(&lenient, program, &near, 0, Fate::Untouched)?;
    }
    let other = if family == Family::Ipv4 { Family::Ipv6 } else { Family::Ipv4 };
    expect(bench, program, &syn(other), 0, Fate::Untouched)
}

fn malformed_and_fragments(bench: &Bench, program: &str, family: Family) -> Result<()> {
    let first = match family {
        Family::Ipv4 => Packet { fragment: 0x2000, ..syn(family) },
        Family::Ipv6 => Packet { extensions: vec![fragment(0, true)], ..syn(family) },
    };
    expect(bench, program, &first, 0, Fate::Dropped(Reason::Fragmented))?;
    expect(bench, program, &first, MARK_PROXY, Fate::Untouched)?;
    for tags in 3..6 {
        let tagged = Packet { tags: vec![0x8100; tags], ..syn(family) };
        expect(bench, program, &tagged, 0, Fate::Dropped(Reason::Malformed))?;
    }
    let short = Packet { payload: Some(vec![0; 3]), ..syn(family) };
    expect(bench, program, &short, 0, Fate::Dropped(Reason::Malformed))
}
