//! Reads and writes the context of the cgroup hooks on socket addresses.
//!
//! The verifier accepts only word-sized accesses to a context, and a port only as a whole word, hence the volatile accesses,
//! which the compiler neither merges nor splits.

use core::mem::size_of;
use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::{bpf_bind, bpf_get_netns_cookie, bpf_set_retval, bpf_setsockopt};
use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::decide::Protocol;
use redirect_ebpf::family::{Ip, Ipv4, Ipv6};
use redirect_ebpf::maps::PodFlags;

use super::pods;

/// The call continues.
pub(super) const ALLOW: i32 = 1;
/// The call fails with `EPERM`, or with the error of [`fail_with`].
pub(super) const DENY: i32 = 0;

const SOL_SOCKET: i32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;

/// The enrolled pod in which a process makes a call.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub(super) netns_cookie: u64,
    pub(super) flags: PodFlags,
    pub(super) protocol: Protocol,
}

/// The caller, if it is in an enrolled pod and uses TCP or UDP.
#[inline(always)]
pub(super) fn caller(ctx: &SockAddrContext) -> Option<Caller> {
    let protocol = protocol_of(ctx)?;
    let netns_cookie = netns_cookie(ctx);
    let flags = pods::flags(netns_cookie)?;
    Some(Caller { netns_cookie, flags, protocol })
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(super) fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The socket's protocol, if it is TCP or UDP.
#[inline(always)]
pub(super) fn protocol_of(ctx: &SockAddrContext) -> Option<Protocol> {
    // SAFETY: every context has `protocol`.
    protocol(unsafe { addr_of!((*ctx.sock_addr).protocol).read_volatile() })
}

/// TCP and UDP; no other protocol is captured.
#[inline(always)]
pub(super) const fn protocol(number: u32) -> Option<Protocol> {
    match number {
        IPPROTO_TCP => Some(Protocol::Tcp),
        IPPROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// Makes the call fail with this error.
#[inline(always)]
pub(super) fn fail_with(error: i32) -> i32 {
    // SAFETY: the helper has no preconditions; the value is a valid error.
    unsafe { bpf_set_retval(-error) };
    DENY
}

/// For hooks on IPv4 addresses.
#[inline(always)]
pub(super) fn user_ip4(ctx: &SockAddrContext) -> [u8; 4] {
    // SAFETY: these contexts have `user_ip4`; it is in network order, as are its bytes in memory.
    unsafe { addr_of!((*ctx.sock_addr).user_ip4).read_volatile() }.to_ne_bytes()
}

/// For hooks on IPv4 addresses. Takes the v4-mapped form.
#[inline(always)]
pub(super) fn set_user_ip4(ctx: &SockAddrContext, [.., a, b, c, d]: [u8; 16]) {
    let address = u32::from_ne_bytes([a, b, c, d]);
    // SAFETY: these contexts have `user_ip4`, and it may be written.
    unsafe { addr_of_mut!((*ctx.sock_addr).user_ip4).write_volatile(address) };
}

/// For hooks on IPv6 addresses.
#[inline(always)]
pub(super) fn user_ip6(ctx: &SockAddrContext) -> [u8; 16] {
    let mut address = [0; 16];
    for (word, bytes) in address.chunks_exact_mut(4).enumerate() {
        // SAFETY: these contexts have the four words of `user_ip6`.
        let value = unsafe { addr_of!((*ctx.sock_addr).user_ip6[word]).read_volatile() };
        bytes.copy_from_slice(&value.to_ne_bytes());
    }
    address
}

/// For hooks on IPv6 addresses.
#[inline(always)]
pub(super) fn set_user_ip6(ctx: &SockAddrContext, address: [u8; 16]) {
    for (word, bytes) in address.chunks_exact(4).enumerate() {
        let &[a, b, c, d] = bytes else { return };
        let value = u32::from_ne_bytes([a, b, c, d]);
        // SAFETY: these contexts have the four words of `user_ip6`, and they may be written.
        unsafe { addr_of_mut!((*ctx.sock_addr).user_ip6[word]).write_volatile(value) };
    }
}

/// The port as the context has it: network order in the first two bytes.
#[inline(always)]
pub(super) fn raw_port(ctx: &SockAddrContext) -> u32 {
    // SAFETY: every context has `user_port`.
    unsafe { addr_of!((*ctx.sock_addr).user_port).read_volatile() }
}

#[inline(always)]
pub(super) fn set_raw_port(ctx: &SockAddrContext, port: u32) {
    // SAFETY: every context has `user_port`, and it may be written.
    unsafe { addr_of_mut!((*ctx.sock_addr).user_port).write_volatile(port) };
}

/// The context's form of a port.
#[must_use]
#[inline(always)]
pub(super) const fn to_raw_port(port: u16) -> u32 {
    port.to_be() as u32
}

/// The port in host order.
#[inline(always)]
pub(super) fn port(ctx: &SockAddrContext) -> u16 {
    u16::from_be(raw_port(ctx) as u16)
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *const bpf_sock {
    // SAFETY: every context has a socket.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// A family whose address a socket can be bound to.
pub(super) trait BoundIp: Ip {
    /// The address that the socket is bound to, or the unspecified address.
    fn bound(ctx: &SockAddrContext) -> Self::Address;
}

impl BoundIp for Ipv4 {
    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> [u8; 4] {
        // SAFETY: the verifier checks that the pointer is to a full socket.
        unsafe { addr_of!((*socket(ctx)).src_ip4).read_volatile() }.to_ne_bytes()
    }
}

impl BoundIp for Ipv6 {
    #[inline(always)]
    fn bound(ctx: &SockAddrContext) -> [u8; 16] {
        let mut address = [0; 16];
        for (word, bytes) in address.chunks_exact_mut(4).enumerate() {
            // SAFETY: the verifier checks that the pointer is to a full socket.
            let value = unsafe { addr_of!((*socket(ctx)).src_ip6[word]).read_volatile() };
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
        address
    }
}

/// `struct sockaddr_in`, with port 0.
#[repr(C)]
struct Sockaddr4 {
    family: u16,
    port: u16,
    address: [u8; 4],
    zero: [u8; 8],
}

/// `struct sockaddr_in6`, with port 0.
#[repr(C)]
struct Sockaddr6 {
    family: u16,
    port: u16,
    flow_information: u32,
    address: [u8; 16],
    scope: u32,
}

/// For connect hooks on IPv4 addresses. Gives an unbound socket a source address; the kernel still chooses its port.
#[inline(always)]
pub(super) fn bind_ip4(ctx: &SockAddrContext, address: [u8; 4]) {
    const AF_INET: u16 = 2;
    bind(ctx, Sockaddr4 { family: AF_INET, port: 0, address, zero: [0; 8] });
}

/// For connect hooks on IPv6 addresses. Gives an unbound socket a source address; the kernel still chooses its port.
#[inline(always)]
pub(super) fn bind_ip6(ctx: &SockAddrContext, address: [u8; 16]) {
    const AF_INET6: u16 = 10;
    bind(ctx, Sockaddr6 { family: AF_INET6, port: 0, flow_information: 0, address, scope: 0 });
}

/// Fails if the socket already has an address, or if the address is not the pod's. The socket stays unchanged
/// then.
#[inline(always)]
fn bind<A>(ctx: &SockAddrContext, mut address: A) {
    // SAFETY: the address lives on the stack for the length of the call, and its size is right.
    let _ = unsafe { bpf_bind(ctx.sock_addr, (&raw mut address).cast(), size_of::<A>() as i32) };
}

/// The socket's mark.
#[inline(always)]
pub(super) fn mark(ctx: &SockAddrContext) -> u32 {
    let socket = socket(ctx);
    // SAFETY: the verifier checks that the pointer is to a full socket.
    unsafe { addr_of!((*socket).mark).read_volatile() }
}

#[inline(always)]
pub(super) fn set_mark(ctx: &SockAddrContext, mark: u32) -> Result<(), i64> {
    const SO_MARK: i32 = 36;
    set_option(ctx, SO_MARK, mark)
}

/// Lets the socket bind an address and port that existing connections use.
#[inline(always)]
pub(super) fn set_reuse_address(ctx: &SockAddrContext) -> Result<(), i64> {
    const SO_REUSEADDR: i32 = 2;
    set_option(ctx, SO_REUSEADDR, 1)
}

/// Unbinds a socket from its interface, and returns whether it was bound.
///
/// Fails if the process may not do that itself (it lacks `CAP_NET_RAW`).
#[inline(always)]
pub(super) fn leave_interface(ctx: &SockAddrContext) -> Result<bool, i64> {
    const SO_BINDTODEVICE: i32 = 25;
    let socket = socket(ctx);
    // SAFETY: every context has a socket, which has this field.
    let interface = unsafe { addr_of!((*socket).bound_dev_if) };
    // SAFETY: the verifier checks that the pointer is to a full socket.
    if unsafe { interface.read_volatile() } == 0 {
        return Ok(false);
    }
    // An empty name unbinds.
    set_option(ctx, SO_BINDTODEVICE, 0).map(|()| true)
}

#[inline(always)]
fn set_option(ctx: &SockAddrContext, option: i32, mut value: u32) -> Result<(), i64> {
    // SAFETY: the option's value lives on the stack for the length of the call, and its size is right.
    match unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, option, (&raw mut value).cast(), 4) } {
        0 => Ok(()),
        error => Err(error),
    }
}
