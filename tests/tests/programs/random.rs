//! Packets that nobody crafted.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_PROXY};
use redirect_ebpf::family::Family;

use crate::bench::{Bench, PROGRAMS, Proxy};
use crate::packets::{DESTINATION, From, HOP_BY_HOP, Packet, authentication, extension, fragment};
use crate::{Shared, trial};

/// How many packets each program is to have, if there is time for them.
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

/// No packet makes a program return or count anything but what it should, and none is changed.
fn random_packets(bench: &Bench, program: &str) -> Result<()> {
    let seeds = seeds();
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut left = PACKETS;
    // From the first packet on: the programs may be at another test's disposal until then.
    let mut began = None;
    let many = bench.run_many(program, Proxy::Listens, |packet| {
        left = left.checked_sub(1)?;
        if left % 1024 == 1023 && began.get_or_insert_with(Instant::now).elapsed() > TIME {
            return None;
        }
        let seed = &seeds[noise.below(seeds.len())];
        if noise.below(4) == 0 {
            noise.bytes(packet);
            // Else nearly all of it would be of no protocol at all.
            packet[12..14].copy_from_slice(&seed[12..14]);
        } else {
            packet.clear();
            packet.extend(seed);
            for _ in 0..noise.below(6) {
                let place = 14 + noise.below(packet.len() - 14);
                packet[place] = noise.next() as u8;
            }
            // The kernel has no test runs on packets without a whole IP header, unless it is hidden behind a tag.
            let least = if matches!(packet[12], 0x81 | 0x88) { 15 } else { 54 };
            packet.truncate(least + noise.below(1 + packet.len().saturating_sub(least)));
        }
        Some([0, MARK_CAPTURE, MARK_PROXY, noise.next() as u32][noise.below(4)])
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

/// Pseudo-random numbers (xorshift), the same in each run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    /// Fills a packet of random length.
    fn bytes(&mut self, packet: &mut Vec<u8>) {
        packet.clear();
        for _ in 0..7 + self.below(24) {
            packet.extend(self.next().to_ne_bytes());
        }
    }
}
