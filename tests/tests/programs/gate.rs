//! The socket lookup of a pod, after the TC programs: which packets reach which listener.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_DELIVERY, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL, PROXY_PORTS};
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::{ConfigFlags, Tuple};
use redirect_ebpf::packet::ACK;

use crate::bench::{Bench, Counted, Fate, Proxy};
use crate::lookup::{Outcome, Query, address, query_of_syn};
use crate::packets::{From, PEER_IPV4, PEER_IPV6, POD_IPV4, POD_IPV6, Packet};
use crate::{Shared, trial};

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    type Test = fn(&Bench, Family) -> Result<()>;
    let tests: [(&str, Test); 8] = [
        ("unseen_connections_are_refused", unseen),
        ("a_batch_goes_to_the_proxy", batch),
        ("a_batch_without_a_proxy_is_refused", batch_without_proxy),
        ("deliveries_are_let_in", deliveries),
        ("connections_within_the_pod", within),
        ("the_proxys_ports", proxy_ports),
        ("strays_are_not_counted", strays),
        ("other_protocols", other_protocols),
    ];
    Family::ALL
        .into_iter()
        .flat_map(|family| tests.map(|(name, test)| (family, name, test)))
        .map(|(family, name, test)| {
            let word = if family == Family::Ipv4 { "ipv4" } else { "ipv6" };
            trial(shared, format!("programs::gate_{word}::{name}"), move |bench| test(bench, family))
        })
        .collect()
}

fn inbound(family: Family) -> &'static str {
    if family == Family::Ipv4 { "inbound_ipv4" } else { "inbound_ipv6" }
}

/// No other test has this source port.
fn syn(family: Family, source_port: u16) -> Packet {
    Packet { source_port, ..Packet::syn(family, From::Peer) }
}

fn query(packet: &Packet) -> Query {
    query_of_syn(packet.family, &packet.bytes()).expect("it opens a connection")
}

fn expect(bench: &Bench, query: &Query, outcome: Outcome, counted: &[Counted]) -> Result<()> {
    let actual = bench.look_up(query)?;
    ensure!(
        actual == (outcome, counted.to_vec()),
        "{actual:?}, not {outcome:?} and {counted:?}, of {query:?}"
    );
    Ok(())
}

fn captured(family: Family) -> Counted {
    (family, Direction::Inbound, Verdict::Captured, Reason::Enrolled)
}

fn unseen(bench: &Bench, family: Family) -> Result<()> {
    let refused = (family, Direction::Inbound, Verdict::Dropped, Reason::Uncaptured);
    for port in [1, 80, PORT_TUNNEL, 0xffff] {
        let packet = Packet { port, ..syn(family, 50_000) };
        expect(bench, &query(&packet), Outcome::Refused, &[refused])?;
    }
    // A source port of zero is legal, and not only our own lookups use it.
    expect(bench, &query(&syn(family, 0)), Outcome::Refused, &[refused])
}

/// The kernel runs TC for all packets of a batch before the stack has the first.
fn batch(bench: &Bench, family: Family) -> Result<()> {
    let batch: Vec<Packet> = (50_100..50_108).map(|port| syn(family, port)).collect();
    let run = |packet: &Packet| bench.run_alone(inbound(family), Proxy::Listens, &packet.bytes(), 0);
    for packet in &batch {
        ensure!(run(packet)? == Fate::Untouched, "counted before the proxy has it");
    }
    for packet in &batch {
        expect(bench, &query(packet), Outcome::Chosen, &[captured(family)])?;
    }
    // With SYN cookies there are two lookups for one connection.
    for packet in batch.iter().rev() {
        expect(bench, &query(packet), Outcome::Chosen, &[])?;
    }
    // The SYN is retransmitted, and counts again.
    run(&batch[0])?;
    expect(bench, &query(&batch[0]), Outcome::Chosen, &[captured(family)])
}

fn batch_without_proxy(_: &Bench, family: Family) -> Result<()> {
    let bench = Bench::new()?.configured(ConfigFlags::REFUSE)?;
    let batch: Vec<Packet> = (50_200..50_208).map(|port| syn(family, port)).collect();
    for packet in &batch {
        let fate = bench.run_alone(inbound(family), Proxy::Absent, &packet.bytes(), 0)?;
        ensure!(fate == Fate::Refused(Reason::NoListener), "{fate:?}");
    }
    batch.iter().try_for_each(|packet| expect(&bench, &query(packet), Outcome::Refused, &[]))
}

fn deliveries(bench: &Bench, family: Family) -> Result<()> {
    let loopback = if family == Family::Ipv4 { "loopback_ipv4" } else { "loopback_ipv6" };
    let delivered = syn(family, 50_300);
    bench.run_alone(loopback, Proxy::Listens, &delivered.bytes(), MARK_DELIVERY)?;
    for _ in 0..2 {
        expect(bench, &query(&delivered), Outcome::Passed, &[])?;
    }
    // No other mark admits one, nor does a segment that opens none.
    for (port, mark, flags) in [(50_301, 0, delivered.flags), (50_302, MARK_DELIVERY, ACK)] {
        let packet = Packet { flags, ..syn(family, port) };
        bench.run_alone(loopback, Proxy::Listens, &packet.bytes(), mark)?;
        let (outcome, _) = bench.look_up(&query(&syn(family, port)))?;
        ensure!(outcome == Outcome::Refused, "mark {mark:#x}, flags {flags:#x}");
    }
    Ok(())
}

fn between(
    family: Family,
    source: ([u8; 4], [u8; 16]),
    destination: ([u8; 4], [u8; 16]),
    port: u16,
) -> Query {
    let tuple = Tuple {
        source: address(family, source.0, source.1),
        destination: address(family, destination.0, destination.1),
        source_port: 50_400u16.to_be_bytes(),
        destination_port: port.to_be_bytes(),
    };
    Query { tuple, protocol: libc::IPPROTO_TCP as u32 }
}

const POD: ([u8; 4], [u8; 16]) = (POD_IPV4, POD_IPV6);
const PEER: ([u8; 4], [u8; 16]) = (PEER_IPV4, PEER_IPV6);
const LOOPBACK: ([u8; 4], [u8; 16]) = ([127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

fn within(bench: &Bench, family: Family) -> Result<()> {
    for (source, destination) in [(POD, POD), (LOOPBACK, LOOPBACK), (LOOPBACK, POD), (PEER, PEER)] {
        expect(bench, &between(family, source, destination, 80), Outcome::Passed, &[])?;
    }
    // A captured connection that found no listener must not reach the application's.
    expect(bench, &between(family, POD, PEER, 80), Outcome::Refused, &[])?;
    expect(bench, &between(family, PEER, LOOPBACK, 80), Outcome::Refused, &[])?;
    // With `route_localnet` the kernel accepts packets to loopback from any interface, and nothing here identifies the pod with
    // their source. A test run has no interface; the `local::` tests cover `lo`.
    expect(bench, &between(family, POD, LOOPBACK, 80), Outcome::Refused, &[])
}

fn proxy_ports(bench: &Bench, family: Family) -> Result<()> {
    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        for source in [POD, LOOPBACK, PEER] {
            expect(bench, &between(family, source, POD, port), Outcome::Refused, &[])?;
        }
    }
    // A packet may have the source port of the programs' own lookups, and arrive on an interface without our programs.
    for port in PROXY_PORTS {
        let mut packet = between(family, PEER, POD, port);
        packet.tuple.source_port = [0; 2];
        ensure!(bench.look_up(&packet)?.0 == Outcome::Refused, "port {port}");
    }
    Ok(())
}

fn strays(bench: &Bench, family: Family) -> Result<()> {
    let stray = Packet { flags: ACK, ..syn(family, 50_500) };
    bench.run_alone(inbound(family), Proxy::Listens, &stray.bytes(), 0)?;
    expect(bench, &query(&syn(family, 50_500)), Outcome::Refused, &[])
}

fn other_protocols(bench: &Bench, family: Family) -> Result<()> {
    let datagram = Query { protocol: libc::IPPROTO_UDP as u32, ..query(&syn(family, 50_600)) };
    expect(bench, &datagram, Outcome::Passed, &[])
}
