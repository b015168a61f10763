//! DNS queries. The only hook that rewrites addresses, because the proxy's resolver listens on loopback.
//!
//! The connect and sendmsg hooks send a query to the resolver on the loopback address of its family instead of to the server.
//! The recvmsg and getpeername hooks show the application the server that it queried. Socket storage holds the servers,
//! see [`Asked`].

use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_set_retval};
use aya_ebpf::macros::{btf_map, cgroup_sock_addr};
use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::constants::PORT_DNS;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::Outbound;
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::{Family, Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::{Asked, Server};

use super::call;
use super::counters::count;
use super::diagnostics;
use super::exclusions::ExcludedIp;
use super::pods::{PodIp, first_address};
use super::sock_addr::{
    ALLOW, Caller, DENY, bind_ip4, bind_ip6, caller, leave_interface, mark, raw_port, set_raw_port,
    set_user_ip4, set_user_ip6, to_raw_port, user_ip4, user_ip6,
};

#[btf_map]
static ASKED: SkStorage<Asked> = SkStorage::new();

const RESOLVER_IPV6: [u8; 16] = 1u128.to_be_bytes();
/// 127.0.0.1 in its v4-mapped form.
const RESOLVER_IPV4: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1];

/// Connects the socket to the resolver, with the pod's address as its source. Otherwise the kernel would choose the
/// resolver's address: the application would see it, and an IPv4 socket could connect to nothing else later.
#[inline(always)]
pub(super) fn connect_ipv4(ctx: &SockAddrContext, caller: &Caller) -> i32 {
    if connect(ctx, caller, Ipv4::widen(user_ip4(ctx))).is_none() {
        return DENY;
    }
    if let Some(source) = first_address::<Ipv4>(caller.netns_cookie) {
        bind_ip4(ctx, source);
    }
    to_resolver_ipv4(ctx)
}

/// As [`connect_ipv4`].
#[inline(always)]
pub(super) fn connect_ipv6(ctx: &SockAddrContext, caller: &Caller, destination: [u8; 16]) -> i32 {
    if connect(ctx, caller, destination).is_none() {
        return DENY;
    }
    let source = match v4_mapped(destination) {
        Some(_) => first_address::<Ipv4>(caller.netns_cookie).map(Ipv4::widen),
        None => first_address::<Ipv6>(caller.netns_cookie),
    };
    if let Some(source) = source {
        bind_ip6(ctx, source);
    }
    to_resolver_ipv6(ctx, destination)
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sendmsg_ipv4(ctx: SockAddrContext) -> i32 {
    let Some(caller) = caller(&ctx) else { return ALLOW };
    let destination = user_ip4(&ctx);
    if !is_question::<Ipv4>(&ctx, &caller, destination) {
        return ALLOW;
    }
    if let Err(stuck) = may_be_sent::<Ipv4>(&ctx, &caller, destination) {
        return stuck.deny();
    }
    if ask(&ctx, &caller, Ipv4::widen(destination)).is_none() {
        return DENY;
    }
    to_resolver_ipv4(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sendmsg_ipv6(ctx: SockAddrContext) -> i32 {
    let Some(caller) = caller(&ctx) else { return ALLOW };
    let destination = user_ip6(&ctx);
    let question = match v4_mapped(destination) {
        Some(mapped) => is_question::<Ipv4>(&ctx, &caller, mapped),
        None => is_question::<Ipv6>(&ctx, &caller, destination),
    };
    if !question {
        return ALLOW;
    }
    if let Err(stuck) = may_be_sent::<Ipv6>(&ctx, &caller, destination) {
        return stuck.deny();
    }
    if ask(&ctx, &caller, destination).is_none() {
        return DENY;
    }
    to_resolver_ipv6(&ctx, destination)
}

#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn recvmsg_ipv4(ctx: SockAddrContext) -> i32 {
    if is_resolver_ipv4(&ctx)
        && let Some(server) = answer(&ctx)
    {
        set_user_ip4(&ctx, server.address);
        set_raw_port(&ctx, server.port);
    }
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn recvmsg_ipv6(ctx: SockAddrContext) -> i32 {
    if is_resolver_ipv6(&ctx)
        && let Some(server) = answer(&ctx)
    {
        set_user_ip6(&ctx, server.address);
        set_raw_port(&ctx, server.port);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername_ipv4(ctx: SockAddrContext) -> i32 {
    if is_resolver_ipv4(&ctx)
        && let Some(server) = peer(&ctx)
    {
        set_user_ip4(&ctx, server.address);
        set_raw_port(&ctx, server.port);
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername_ipv6(ctx: SockAddrContext) -> i32 {
    if is_resolver_ipv6(&ctx)
        && let Some(server) = peer(&ctx)
    {
        set_user_ip6(&ctx, server.address);
        set_raw_port(&ctx, server.port);
    }
    ALLOW
}

/// Whether a datagram is a query for the resolver.
#[inline(always)]
fn is_question<I: PodIp + ExcludedIp>(
    ctx: &SockAddrContext,
    caller: &Caller,
    destination: I::Address,
) -> bool {
    // The source matters only for the proxy's deliveries.
    let decision = call::decision::<I>(ctx, caller, destination, mark(ctx), destination);
    let about = || call::about::<I>(ctx, None, destination);
    let pod = Some(caller.netns_cookie);
    match decision {
        Outbound::Resolve => {
            count(I::FAMILY, Direction::Outbound, Verdict::Captured, Reason::Dns, pod, about);
        }
        Outbound::Pass(Reason::OtherTraffic) => return false,
        Outbound::Pass(reason) => count(I::FAMILY, Direction::Outbound, Verdict::Passed, reason, pod, about),
        Outbound::Capture | Outbound::Deliver | Outbound::Refuse(_) => {}
    }
    decision == Outbound::Resolve
}

/// Why a datagram can't reach the resolver: the kernel has already chosen the interface through which it leaves.
enum Stuck {
    /// The socket was bound to the interface. The hook has unbound it, so the next datagram succeeds; this one fails as if
    /// the interface's queue were full.
    Interface,
    /// The interface is part of the address. Only a connected socket can reach the resolver instead.
    Scope,
    /// The socket can't be unbound from its interface.
    Bound,
}

impl Stuck {
    #[inline(always)]
    fn deny(self) -> i32 {
        const ENETUNREACH: i32 = 101;
        const ENOBUFS: i32 = 105;
        let error = match self {
            Self::Interface => ENOBUFS,
            Self::Scope | Self::Bound => ENETUNREACH,
        };
        // SAFETY: the helper has no preconditions; the value is a valid error.
        unsafe { bpf_set_retval(-error) };
        DENY
    }
}

#[inline(always)]
fn may_be_sent<I: Ip>(ctx: &SockAddrContext, caller: &Caller, destination: I::Address) -> Result<(), Stuck> {
    if I::FAMILY == Family::Ipv6 && I::is_link_scoped(destination) {
        return Err(Stuck::Scope);
    }
    match leave(ctx, caller, family(I::widen(destination))) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Stuck::Interface),
        Err(_) => Err(Stuck::Bound),
    }
}

#[inline(always)]
fn to_resolver_ipv4(ctx: &SockAddrContext) -> i32 {
    set_user_ip4(ctx, RESOLVER_IPV4);
    set_raw_port(ctx, to_raw_port(PORT_DNS));
    ALLOW
}

#[inline(always)]
fn to_resolver_ipv6(ctx: &SockAddrContext, destination: [u8; 16]) -> i32 {
    let resolver = if v4_mapped(destination).is_some() { RESOLVER_IPV4 } else { RESOLVER_IPV6 };
    set_user_ip6(ctx, resolver);
    set_raw_port(ctx, to_raw_port(PORT_DNS));
    ALLOW
}

#[inline(always)]
fn is_resolver_ipv4(ctx: &SockAddrContext) -> bool {
    raw_port(ctx) == to_raw_port(PORT_DNS) && Ipv4::widen(user_ip4(ctx)) == RESOLVER_IPV4
}

#[inline(always)]
fn is_resolver_ipv6(ctx: &SockAddrContext) -> bool {
    if raw_port(ctx) != to_raw_port(PORT_DNS) {
        return false;
    }
    let address = user_ip6(ctx);
    address == RESOLVER_IPV6 || address == RESOLVER_IPV4
}

/// The family of queries to a server.
#[inline(always)]
fn family(server: [u8; 16]) -> Family {
    if v4_mapped(server).is_some() { Family::Ipv4 } else { Family::Ipv6 }
}

/// Unbinds the socket from its interface, see [`leave_interface`].
#[inline(always)]
fn leave(ctx: &SockAddrContext, caller: &Caller, family: Family) -> Result<bool, i64> {
    leave_interface(ctx).inspect_err(|error| {
        diagnostics::of_call(Fault::Interface, Hook::Dns, family, *error, caller.netns_cookie);
    })
}

/// Unbinds the socket from its interface, and records the server that it connects to.
#[inline(always)]
fn connect(ctx: &SockAddrContext, caller: &Caller, address: [u8; 16]) -> Option<()> {
    leave(ctx, caller, family(address)).ok()?;
    let server = Server { address, port: raw_port(ctx) };
    with(asked_or_new(ctx, caller, address), |asked| {
        asked.connect(server);
        Some(())
    })
}

/// Records the server of a query.
#[inline(always)]
fn ask(ctx: &SockAddrContext, caller: &Caller, address: [u8; 16]) -> Option<()> {
    let server = Server { address, port: raw_port(ctx) };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    with(asked_or_new(ctx, caller, address), |asked| {
        asked.ask(server, now);
        Some(())
    })
}

/// The server that sent an answer.
#[inline(always)]
fn answer(ctx: &SockAddrContext) -> Option<Server> {
    with(asked(ctx), Asked::answer)
}

/// The server that the socket is connected to.
#[inline(always)]
fn peer(ctx: &SockAddrContext) -> Option<Server> {
    with(asked(ctx), |asked| asked.peer())
}

/// Works on the entry of a socket, if there is one.
///
/// Threads that share a socket may write to its entry concurrently. The worst outcome is the server of another query of the
/// same socket.
#[inline(always)]
fn with<T>(entry: *mut Asked, work: impl FnOnce(&mut Asked) -> Option<T>) -> Option<T> {
    // SAFETY: the entry, if it is there, lives as long as the socket of the call.
    work(unsafe { entry.as_mut() }?)
}

#[inline(always)]
fn asked(ctx: &SockAddrContext) -> *mut Asked {
    // SAFETY: the socket is the context's own.
    unsafe { ASKED.get_ptr_mut(ctx) }
}

#[inline(always)]
fn asked_or_new(ctx: &SockAddrContext, caller: &Caller, server: [u8; 16]) -> *mut Asked {
    let mut nothing = Asked::NOTHING;
    // SAFETY: the socket is the context's own, and the initial value lives for the length of the call.
    let entry = unsafe { ASKED.get_or_insert_ptr_mut(ctx, Some(&mut nothing)) };
    if entry.is_null() {
        diagnostics::of_call(Fault::Storage, Hook::Dns, family(server), 0, caller.netns_cookie);
    }
    entry
}
