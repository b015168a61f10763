//! The cost of the programs: the run time per packet, which is only printed, and the verifier's work.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_PROXY};
use redirect_ebpf::family::Family;
use redirect_ebpf::packet::ACK;

use crate::bench::{Bench, PROGRAMS, Proxy};
use crate::packets::{From, Packet};
use crate::{Shared, trial};

/// Every kernel gives up at a million. Older ones process more than this one, Linux 6.1 up to two hundred times as much;
/// tests in virtual machines cover those (`cargo xtask test --vm smoke`).
pub(crate) const VERIFIED: u32 = 150_000;

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    let each = PROGRAMS.into_iter();
    each.flat_map(|program| {
        [
            trial(shared, format!("programs::{program}::cost"), move |bench| cost(bench, program)),
            trial(shared, format!("programs::{program}::is_verified_with_room_to_spare"), move |bench| {
                let verified = bench.size(program)?.verified;
                ensure!(verified <= VERIFIED, "the verifier followed {verified} instructions");
                println!("{program}: {verified} instructions verified");
                Ok(())
            }),
        ]
    })
    .collect()
}

fn cost(bench: &Bench, program: &str) -> Result<()> {
    let (own, other) = match program.ends_with('4') {
        true => (Family::Ipv4, Family::Ipv6),
        false => (Family::Ipv6, Family::Ipv4),
    };
    let from = if program.starts_with("inbound") { From::Peer } else { From::Pod };
    let opens = |family| Packet::syn(family, from);
    for (what, packet) in [
        ("SYN", opens(own)),
        ("segment of no connection", Packet { flags: ACK, ..opens(own) }),
        ("SYN of the other family", opens(other)),
    ] {
        for (mark, marked) in [(0, "no mark"), (MARK_CAPTURE, "captured"), (MARK_PROXY, "the proxy's")] {
            let time = bench.time(program, Proxy::Listens, &packet.bytes(), mark)?;
            println!("{program}: {what}, {marked}: {} ns", time.as_nanos());
        }
    }
    Ok(())
}
