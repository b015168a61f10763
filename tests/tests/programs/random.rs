//! Random packets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastrand::Rng;
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_PROXY};
use redirect_ebpf::family::Family;

use crate::bench::{Bench, PROGRAMS, Proxy};
use crate::packets::{DESTINATION, From, HOP_BY_HOP, Packet, authentication, extension, fragment};
use crate::{Shared, trial};

/// The number of packets for each program, if time allows.
const PACKETS: u64 = 1_000_000;
const TIME: Duration = Duration::from_secs(3);

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    PROGRAMS
        .map(|program| {
            trial(shared, format!("programs::{program}::random_packets"), move |bench| {
                random_packets(bench, program)
            })
        })
        .into()
}

/// On no packet does a program return or count anything unexpected, or change the packet.
fn random_packets(bench: &Bench, program: &str) -> Result<()> {
    let seeds = seeds();
    let mut random = Rng::with_seed(0x9e37_79b9_7f4a_7c15);
    let mut left = PACKETS;
    // From the first packet on: before, another test may be using the programs.
    let mut began = None;
    let many = bench.run_many(program, Proxy::Listens, |packet| {
        left = left.checked_sub(1)?;
        if left % 1024 == 1023 && began.get_or_insert_with(Instant::now).elapsed() > TIME {
            return None;
        }
        let seed = &seeds[random.usize(..seeds.len())];
        if random.u8(..4) == 0 {
            bytes(&mut random, packet);
            // Otherwise nearly every packet would have an unknown protocol.
            packet[12..14].copy_from_slice(&seed[12..14]);
        } else {
            packet.clear();
            packet.extend(seed);
            for _ in 0..random.usize(..6) {
                let place = random.usize(14..packet.len());
                packet[place] = random.u8(..);
            }
            // The kernel refuses test runs on packets without a whole IP header, unless a tag hides that.
            let least = if matches!(packet[12], 0x81 | 0x88) { 15 } else { 54 };
            packet.truncate(least + random.usize(..=packet.len().saturating_sub(least)));
        }
        Some([0, MARK_CAPTURE, MARK_PROXY, random.u32(..)][random.usize(..4)])
    })?;
    println!("{program}: {many}");
    ensure!(many.packets > 0);
    ensure!(many.counted >= many.dropped, "dropped without being counted: {many}");
    ensure!(many.counted <= many.packets, "counted more than once: {many}");
    Ok(())
}

/// Valid packets to start from.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for family in Family::ALL {
        for from in [From::Peer, From::Pod] {
            let syn = Packet::syn(family, from);
            let extensions = vec![
                extension(HOP_BY_HOP, 0),
                authentication(),
                fragment(0, false),
                extension(DESTINATION, 1),
            ];
            seeds.push(syn.bytes());
            seeds.push(Packet { tags: vec![0x88a8, 0x8100], ..syn.clone() }.bytes());
            seeds.push(Packet { options: vec![1; 24], extensions, ..syn.clone() }.bytes());
            seeds.push(Packet { fragment: 0x2000, extensions: vec![fragment(0, true)], ..syn }.bytes());
        }
    }
    seeds
}

/// A packet of random length.
fn bytes(random: &mut Rng, packet: &mut Vec<u8>) {
    packet.resize(8 * random.usize(7..31), 0);
    random.fill(packet);
}
