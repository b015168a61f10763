//! The programs' log of outcomes that should not occur.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use aya_log::EbpfLogger;
use libtest_mimic::Trial;
use log::{Level, Log, Metadata, Record};
use redirect_ebpf::Reason;
use redirect_ebpf::constants::MARK_CAPTURE;
use redirect_ebpf::diagnostics::{Fault, Hook, NUMBERS, TARGET};
use redirect_ebpf::family::Family;

use crate::bench::{Bench, Fate, PROGRAMS, Proxy, Size, load, object};
use crate::cost::VERIFIED;
use crate::packets::{From, Packet};
use crate::{Shared, trial};

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    let subjects = [
        ("inbound_ipv4", Hook::Inbound, Family::Ipv4),
        ("inbound_ipv6", Hook::Inbound, Family::Ipv6),
        ("loopback_ipv4", Hook::Loopback, Family::Ipv4),
        ("loopback_ipv6", Hook::Loopback, Family::Ipv6),
    ];
    let full = subjects.map(|(program, hook, family)| {
        let name = format!("programs::{program}::no_room_for_a_listener");
        trial(shared, name, move |_| no_room_for_a_listener(program, hook, family))
    });
    let sizes = PROGRAMS.map(|program| {
        let name = format!("programs::{program}::diagnostics_are_taken_out");
        trial(shared, name, move |bench| taken_out(bench, program))
    });
    full.into_iter().chain(sizes).collect()
}

/// Programs with the log are accepted as well; those without it contain none of its code.
fn taken_out(bench: &Bench, program: &str) -> Result<()> {
    let mut telling = object(true)?;
    load(&mut telling, &[program])?;
    let (on, off) = (Size::of(&telling, program)?, bench.size(program)?);
    println!("{program}: off {off:?}, on {on:?}");
    ensure!(on.verified <= VERIFIED, "{on:?}");
    ensure!(off.verified < on.verified && off.translated < on.translated, "off {off:?}, on {on:?}");
    Ok(())
}

/// A listener that can't be assigned at once is stored in a map, which is full here.
fn no_room_for_a_listener(program: &str, hook: Hook, family: Family) -> Result<()> {
    let mut telling = object(true)?;
    let records = Records::default();
    let mut logger = EbpfLogger::init_with_logger(&mut telling, records.clone())?;
    let bench = Bench::with(telling)?;
    let (from, mark) = if hook == Hook::Inbound { (From::Peer, 0) } else { (From::Pod, MARK_CAPTURE) };
    let packet = Packet::syn(family, from).bytes();
    let run = || bench.run(program, Proxy::Listens, &packet, mark);
    bench.fill_listeners()?;
    let fate = run()?;
    ensure!(fate == Fate::Dropped(Reason::AssignFailed), "{fate:?}");
    logger.flush();
    let told = records.take();
    let [(target, level, numbers)] = &told[..] else { anyhow::bail!("{told:?}") };
    ensure!((target.as_str(), *level) == (TARGET, Level::Debug), "{told:?}");
    let expected = [Fault::Assign as i64, hook as i64, family as i64, -i64::from(libc::E2BIG), 0];
    ensure!(numbers.len() == NUMBERS && numbers.starts_with(&expected), "{told:?}");
    // The packet's length.
    ensure!(numbers.last() == Some(&i64::try_from(packet.len())?), "{told:?}");
    Ok(())
}

/// Target, level and numbers of each record.
type Told = Vec<(String, Level, Vec<i64>)>;

#[derive(Clone, Default)]
struct Records(Arc<Mutex<Told>>);

impl Records {
    fn take(&self) -> Told {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log for Records {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let numbers = record.args().to_string().split(' ').flat_map(str::parse).collect();
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.push((record.target().into(), record.level(), numbers));
    }

    fn flush(&self) {}
}
