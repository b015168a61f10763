//! Runs the programs on the socket lookup.

use std::os::fd::{AsFd as _, AsRawFd as _};

use anyhow::{Context as _, Result, bail};
use aya::Ebpf;
use aya::programs::SkLookup;
use aya_obj::generated::bpf_cmd;
use nix::errno::Errno;
use redirect_ebpf::family::{Family, Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::Tuple;
use redirect_ebpf::packet::{Packet, Parse, Parsed, parse};
use redirect_linux::bpf;

/// A listener lookup.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    pub(crate) tuple: Tuple,
    pub(crate) protocol: u32,
}

/// The verdict of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It chose a listener.
    Chosen,
    /// The kernel may look for one.
    Passed,
    /// There is none.
    Refused,
}

/// `struct bpf_sk_lookup`.
#[derive(Default)]
#[repr(C)]
struct Context {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port: u16,
    padding: u16,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress_ifindex: u32,
    tail: u32,
}

pub(crate) fn run(programs: &Ebpf, name: &str, query: &Query) -> Result<Outcome> {
    run_and_read(programs, name, query).map(|(outcome, _)| outcome)
}

/// The same, with the cookie of the chosen listener.
pub(crate) fn run_and_read(programs: &Ebpf, name: &str, query: &Query) -> Result<(Outcome, u64)> {
    let program: &SkLookup = programs.program(name).context("a program")?.try_into()?;
    let mut context = Context::default();
    let Tuple { source, destination, source_port, destination_port } = query.tuple;
    context.protocol = query.protocol;
    context.remote_port = u16::from_ne_bytes(source_port);
    context.local_port = u16::from_be_bytes(destination_port).into();
    match (v4_mapped(source), v4_mapped(destination)) {
        (Some(source), Some(destination)) => {
            context.family = libc::AF_INET as u32;
            context.remote_ip4 = u32::from_ne_bytes(source);
            context.local_ip4 = u32::from_ne_bytes(destination);
        }
        _ => {
            context.family = libc::AF_INET6 as u32;
            context.remote_ip6 = words(source);
            context.local_ip6 = words(destination);
        }
    }
    let mut attributes = bpf::attributes();
    attributes.test.prog_fd = program.fd()?.as_fd().as_raw_fd() as u32;
    attributes.test.ctx_in = (&raw const context) as u64;
    attributes.test.ctx_size_in = size_of::<Context>() as u32;
    attributes.test.ctx_out = (&raw mut context) as u64;
    attributes.test.ctx_size_out = size_of::<Context>() as u32;
    match bpf::call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attributes) {
        Ok(_) => {}
        // It chose a listener with SO_REUSEPORT: which one of them the kernel does not try out here.
        Err(Errno::EOPNOTSUPP) => return Ok((Outcome::Chosen, 0)),
        Err(error) => return Err(error).with_context(|| format!("{name} on {query:?}")),
    }
    // SAFETY: the kernel has written this part of the union.
    match unsafe { attributes.test.retval } {
        0 => Ok((Outcome::Refused, 0)),
        1 if context.cookie != 0 => Ok((Outcome::Chosen, context.cookie)),
        1 => Ok((Outcome::Passed, 0)),
        other => bail!("{name} returned {other} on {query:?}"),
    }
}

fn words(address: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(address.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// The listener lookup that follows a frame of a family, if it opens a connection.
pub(crate) fn query_of_syn(family: Family, frame: &[u8]) -> Option<Query> {
    let tuple = match family {
        Family::Ipv4 => of::<Ipv4>(frame),
        Family::Ipv6 => of::<Ipv6>(frame),
    };
    tuple.map(|tuple| Query { tuple, protocol: libc::IPPROTO_TCP as u32 })
}

fn of<I: Parse>(frame: &[u8]) -> Option<Tuple> {
    match parse::<I>(&Frame(frame)) {
        Parsed::Tcp(segment) if segment.opens() => Some(segment.tuple::<I>()),
        _ => None,
    }
}

struct Frame<'a>(&'a [u8]);

impl Packet for Frame<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(14 + offset as usize..)?.first_chunk().copied()
    }

    fn ether_type(&self) -> u16 {
        self.0.get(12..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u16::from_be_bytes(*bytes))
    }
}

/// An address of a family, in sixteen bytes.
pub(crate) fn address(family: Family, ipv4: [u8; 4], ipv6: [u8; 16]) -> [u8; 16] {
    match family {
        Family::Ipv4 => Ipv4::widen(ipv4),
        Family::Ipv6 => ipv6,
    }
}
