//! No verdict depends on state that a program leaves with its CPU. Programs interleave on a CPU in any order: over the packets of
//! a batch and, with `PREEMPT_RT`, between tasks.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, PerCpuArray, PerCpuValues};
use libtest_mimic::Trial;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use redirect_ebpf::constants::{PORT_INBOUND, PROXY_PORTS};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::Tuple;
use redirect_tests::{Netns, wait};
use socket2::Socket;

use crate::bench::{Bench, listener, object};
use crate::lookup::{Query, address, query_of_syn};
use crate::packets::{From, PEER_IPV4, PEER_IPV6, POD_IPV4, POD_IPV6, Packet};
use crate::{Shared, trial};

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    let mut trials = vec![trial(shared, "programs::processors::maps".to_owned(), |_| maps())];
    for family in Family::ALL {
        let word = if family == Family::Ipv4 { "ipv4" } else { "ipv6" };
        trials.push(trial(shared, format!("programs::processors::lookups_of_others::{word}"), move |_| {
            lookups_of_others(family)
        }));
        trials.push(trial(
            shared,
            format!("programs::processors::listeners_of_two_pods::{word}"),
            move |_| listeners_of_two_pods(family),
        ));
    }
    trials
}

/// The per-CPU maps hold counters, limits of reports, and the flag of our own lookups, which must not be counted.
fn maps() -> Result<()> {
    let object = object(true)?;
    let found: BTreeSet<&str> = object
        .maps()
        .filter(|(_, map)| {
            matches!(map, Map::PerCpuArray(_) | Map::PerCpuHashMap(_) | Map::PerCpuLruHashMap(_))
        })
        .map(|(name, _)| name)
        .collect();
    ensure!(found == BTreeSet::from(["ASKING", "COUNTERS", "DIAGNOSTICS", "FLOW_STATE"]), "{found:?}");
    Ok(())
}

/// A connection reaches the socket lookup while a TC program performs its own lookup on the same CPU.
fn lookups_of_others(family: Family) -> Result<()> {
    let bench = Bench::new()?;
    let ask_all = || -> Result<Vec<_>> {
        let ends = [(POD_IPV4, POD_IPV6), (PEER_IPV4, PEER_IPV6), ([127, 0, 0, 1], 1u128.to_be_bytes())];
        let mut outcomes = Vec::new();
        for source in ends {
            for destination in ends {
                for port in PROXY_PORTS.into_iter().chain([80]) {
                    for source_port in [0u16, 50_700] {
                        let tuple = Tuple {
                            source: address(family, source.0, source.1),
                            destination: address(family, destination.0, destination.1),
                            source_port: source_port.to_be_bytes(),
                            destination_port: port.to_be_bytes(),
                        };
                        let query = Query { tuple, protocol: libc::IPPROTO_TCP as u32 };
                        outcomes.push((tuple, bench.ask(&query)?));
                    }
                }
            }
        }
        Ok(outcomes)
    };
    let alone = ask_all()?;
    bench.change(|programs, _| {
        let map = programs.map_mut("ASKING").context("ASKING")?;
        let mut asking = PerCpuArray::<_, u64>::try_from(map)?;
        let processors = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(asking.set(0, PerCpuValues::try_from(vec![1; processors])?, 0)?)
    })?;
    let beside = ask_all()?;
    for (alone, beside) in alone.iter().zip(&beside) {
        ensure!(alone == beside, "{alone:?}, and {beside:?} while a program looks up");
    }
    Ok(())
}

/// A pod whose proxy listens, and a connection to it.
struct Waiting {
    netns: Netns,
    _listener: Socket,
    cookie: u64,
    packet: Vec<u8>,
    query: Query,
}

/// In two pods, TC programs see connections to addresses that the agent does not know, before the stack gets the first of them.
fn listeners_of_two_pods(family: Family) -> Result<()> {
    let bench = Bench::new()?;
    let program = if family == Family::Ipv4 { "inbound_ipv4" } else { "inbound_ipv6" };
    let one = first_processor()?;
    let mut pods = Vec::new();
    // With SO_REUSEPORT, a test run does not show which listener the program chose.
    for (name, source_port) in [("one", 50_800), ("other", 50_801)] {
        let netns = Netns::new(name)?;
        let packet = Packet { source_port, ..Packet::syn(family, From::Pod) }.bytes();
        let listener = netns.run(|| listener(PORT_INBOUND, false))??;
        let (cookie, query) = (listener.cookie()?, query_of_syn(family, &packet).context("a SYN")?);
        pods.push(Waiting { netns, _listener: listener, cookie, packet, query });
    }
    // On a busy machine, a note may expire before the lookup reads it.
    wait::until_true("listeners of both pods", wait::SOON, || {
        for pod in &pods {
            pod.netns.run(|| -> Result<()> {
                sched_setaffinity(Pid::from_raw(0), &one)?;
                bench.run_here(program, &pod.packet).map(drop)
            })??;
        }
        let chosen = pods.iter().map(|pod| bench.chosen(&pod.query)).collect::<Result<Vec<_>>>()?;
        for (pod, chosen) in pods.iter().zip(&chosen) {
            ensure!([0, pod.cookie].contains(chosen), "the listener {chosen}, not {}", pod.cookie);
        }
        Ok(!chosen.contains(&0))
    })
}

/// The first CPU that this process may run on.
fn first_processor() -> Result<CpuSet> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut one = CpuSet::new();
    let number = (0..CpuSet::count()).find(|&number| allowed.is_set(number) == Ok(true));
    one.set(number.context("no processor")?)?;
    Ok(one)
}
