//! BPF programs of other projects: small ones, assembled here, that do the same as theirs next to ours.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result};
use redirect_ebpf::Family;

const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;

/// The order among programs at a hook (`BPF_F_BEFORE`, nothing).
const BEFORE: u32 = 1 << 3;
const LAST: u32 = 0;

/// The hook of a program; the numbers are the kernel's `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// cgroup/connect4.
    Connect4 = 10,
    /// cgroup/connect6.
    Connect6 = 11,
    /// cgroup/sendmsg4.
    Sendmsg4 = 14,
    /// cgroup/sendmsg6.
    Sendmsg6 = 15,
    /// tcx ingress of an interface.
    TcxIngress = 46,
    /// tcx egress of an interface.
    TcxEgress = 47,
}

/// The traffic of a socket-level load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Connections, and connected datagrams.
    Connections,
    /// Unconnected datagrams.
    Datagrams,
}

/// An attached program; dropping it detaches it.
#[derive(Debug)]
pub struct Program {
    _link: OwnedFd,
}

impl Program {
    /// As [`Program::rewriting`], ahead of all existing ones (Linux 6.17).
    pub fn rewriting_first(cgroup: &Path, kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<Self> {
        Self::rewriting_at(BEFORE, cgroup, kind, from, to)
    }

    /// A socket-level load balancer: redirects connections, or datagrams, from one address to another. A v4-mapped
    /// address uses the IPv6 hooks.
    pub fn rewriting(cgroup: &Path, kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<Self> {
        Self::rewriting_at(LAST, cgroup, kind, from, to)
    }

    fn rewriting_at(order: u32, cgroup: &Path, kind: Kind, from: SocketAddr, to: SocketAddr) -> Result<Self> {
        /// `user_ip4`, `user_ip6` and `user_port` in `struct bpf_sock_addr`.
        const IP4: i16 = 4;
        const IP6: i16 = 8;
        const PORT: i16 = 24;
        let hook = match (kind, from) {
            (Kind::Connections, SocketAddr::V4(_)) => Hook::Connect4,
            (Kind::Connections, SocketAddr::V6(_)) => Hook::Connect6,
            (Kind::Datagrams, SocketAddr::V4(_)) => Hook::Sendmsg4,
            (Kind::Datagrams, SocketAddr::V6(_)) => Hook::Sendmsg6,
        };
        let (from, words) = match (from, to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                (vec![(IP4, word(from.ip().octets()))], vec![(IP4, word(to.ip().octets()))])
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                let words = |octets: [u8; 16]| {
                    let at = |index: usize| IP6 + 4 * index as i16;
                    let bytes = octets.chunks_exact(4).map(|four| [four[0], four[1], four[2], four[3]]);
                    bytes.enumerate().map(|(index, four)| (at(index), word(four))).collect::<Vec<_>>()
                };
                (words(from.ip().octets()), words(to.ip().octets()))
            }
            _ => anyhow::bail!("{from} and {to} are of different families"),
        };
        let mut code = Vec::new();
        let writes: Vec<_> = words
            .into_iter()
            .chain([(PORT, i32::from(to.port().to_be()))])
            .flat_map(|(at, value)| write(at, value))
            .collect();
        for (index, (at, value)) in from.iter().enumerate() {
            // Past the remaining comparisons, two instructions each, and the writes.
            let rest = 2 * (from.len() - index - 1) + writes.len();
            code.push(instruction(0x61, 2, 1, *at, 0));
            code.push(instruction(0x56, 2, 0, rest as i16, *value));
        }
        code.extend(writes);
        code.extend(give(1));
        const CGROUP_SOCK_ADDR: u32 = 18;
        let program = load(CGROUP_SOCK_ADDR, hook, &code)?;
        let directory = File::open(cgroup)?;
        Ok(Self { _link: link(&program, directory.as_raw_fd() as u32, hook, order)? })
    }

    /// A CNI plugin's program on the way to pods: hands the TCP segments of a family that arrive on an interface of the calling
    /// thread's namespace to the peer of `device`, the other end of that pair.
    pub fn redirecting_to_peer(interface: u32, family: Family, device: u32) -> Result<Self> {
        const SCHED_CLS: u32 = 3;
        const REDIRECT_PEER: i32 = 155;
        const NEXT: i32 = -1;
        /// `protocol` in `struct __sk_buff`.
        const TYPE: i16 = 16;
        // Behind the Ethernet header: the IPv4 header's protocol, the IPv6 header's next header.
        let (ether_type, protocol) = match family {
            Family::Ipv4 => (0x0800u16, 14 + 9),
            Family::Ipv6 => (0x86dd, 14 + 6),
        };
        let code = [
            instruction(0xbf, 6, 1, 0, 0),
            instruction(0x61, 2, 1, TYPE, 0),
            instruction(0x56, 2, 0, 6, i32::from(ether_type.to_be())),
            instruction(0x30, 0, 0, 0, protocol),
            instruction(0x56, 0, 0, 4, libc::IPPROTO_TCP),
            instruction(0xb4, 1, 0, 0, device as i32),
            instruction(0xb4, 2, 0, 0, 0),
            instruction(0x85, 0, 0, 0, REDIRECT_PEER),
            instruction(0x95, 0, 0, 0, 0),
        ];
        let code: Vec<u64> = code.into_iter().chain(give(NEXT)).collect();
        let program = load(SCHED_CLS, Hook::TcxIngress, &code)?;
        Ok(Self { _link: link(&program, interface, Hook::TcxIngress, LAST)? })
    }

    /// A program on an interface of the calling thread's namespace that returns this verdict for every packet.
    pub fn with_verdict(interface: u32, hook: Hook, verdict: i32) -> Result<Self> {
        const SCHED_CLS: u32 = 3;
        let program = load(SCHED_CLS, hook, &give(verdict))?;
        Ok(Self { _link: link(&program, interface, hook, LAST)? })
    }
}

/// Whether the kernel has tcx (Linux 6.6), found by trying.
pub fn has_tcx() -> Result<bool> {
    const NO_INTERFACE: u32 = i32::MAX as u32;
    // The kernel looks for the interface only if it knows the attach type.
    is_known(Program::with_verdict(NO_INTERFACE, Hook::TcxIngress, 0), Some(libc::ENODEV))
}

/// Whether programs of a cgroup can be attached before others (Linux 6.17), found by trying.
pub fn has_order(cgroup: &Path) -> Result<bool> {
    let nowhere = SocketAddr::from(([192, 0, 2, 77], 77));
    is_known(Program::rewriting_first(cgroup, Kind::Connections, nowhere, nowhere), None)
}

/// Whether the kernel knows an attach type: the attachment succeeds, or fails for another reason.
fn is_known(attached: Result<Program>, fault: Option<i32>) -> Result<bool> {
    let Err(error) = attached else { return Ok(true) };
    match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(libc::EINVAL) => Ok(false),
        number if number.is_some() && number == fault => Ok(true),
        _ => Err(error),
    }
}

fn word(bytes: [u8; 4]) -> i32 {
    i32::from_ne_bytes(bytes)
}

/// `struct bpf_insn`.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_ne_bytes();
    let [a, b, c, d] = immediate.to_ne_bytes();
    u64::from_ne_bytes([code, source << 4 | destination, low, high, a, b, c, d])
}

/// Writes a word of the context.
fn write(at: i16, value: i32) -> [u64; 2] {
    [instruction(0xb4, 3, 0, 0, value), instruction(0x63, 1, 3, at, 0)]
}

/// Returns a value.
fn give(value: i32) -> [u64; 2] {
    [instruction(0xb4, 0, 0, 0, value), instruction(0x95, 0, 0, 0, 0)]
}

#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

fn load(program_type: u32, hook: Hook, code: &[u64]) -> Result<OwnedFd> {
    let expected_attach_type =
        if matches!(hook, Hook::TcxIngress | Hook::TcxEgress) { 0 } else { hook as u32 };
    let attributes = Load {
        program_type,
        count: code.len() as u32,
        instructions: code.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        name: *b"foreign\0\0\0\0\0\0\0\0\0",
        expected_attach_type,
        ..Load::default()
    };
    bpf(PROG_LOAD, &attributes).with_context(|| format!("load a program for {hook:?}"))
}

#[repr(C)]
struct LinkCreate {
    program: RawFd,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: [u64; 2],
}

fn link(program: &OwnedFd, target: u32, hook: Hook, flags: u32) -> Result<OwnedFd> {
    let attributes = LinkCreate {
        program: program.as_raw_fd(),
        target,
        attach_type: hook as u32,
        flags,
        relative: [0; 2],
    };
    bpf(LINK_CREATE, &attributes).with_context(|| format!("attach a program to {hook:?}"))
}

fn bpf<A>(command: libc::c_long, attributes: &A) -> io::Result<OwnedFd> {
    // SAFETY: the attributes live for the length of the call, and their size is right.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<A>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: these commands return a descriptor that is ours.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
