//! What the programs cost each packet, as the kernel measures it. Not a limit, but figures to look at.

use anyhow::Result;
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_PROXY};
use redirect_ebpf::family::Family;
use redirect_ebpf::packet::ACK;

use crate::bench::{Bench, PROGRAMS, Proxy};
use crate::packets::{From, Packet};
use crate::{Shared, trial};

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    PROGRAMS
        .map(|program| trial(shared, format!("programs::{program}::cost"), move |bench| cost(bench, program)))
        .into()
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
