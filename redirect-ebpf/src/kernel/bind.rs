//! cgroup/bind4 and cgroup/bind6: keeps applications of enrolled pods off the proxy's ports, and lets an application
//! bind its own port again while the proxy still holds connections on it. In placement `node` it keeps the node's other processes
//! off the proxy's ports in the host's namespace, where `SO_REUSEPORT` would let them share its connections.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Protocol};
use redirect_ebpf::family::{Family, v4_mapped};

use super::counters::count;
use super::flows::{self, About};
use super::sock_addr::{
    ALLOW, caller, fail_with, mark, netns_cookie, port, protocol_of, set_reuse_address, user_ip6,
};
use super::{config, lookup, proxies};

const EADDRINUSE: i32 = 98;

#[cgroup_sock_addr(bind4)]
pub(crate) fn bind_ipv4(ctx: SockAddrContext) -> i32 {
    bind(&ctx, || Family::Ipv4)
}

#[cgroup_sock_addr(bind6)]
pub(crate) fn bind_ipv6(ctx: SockAddrContext) -> i32 {
    bind(&ctx, || if v4_mapped(user_ip6(&ctx)).is_some() { Family::Ipv4 } else { Family::Ipv6 })
}

#[inline(always)]
fn bind(ctx: &SockAddrContext, family: impl FnOnce() -> Family) -> i32 {
    let Some(caller) = caller(ctx) else { return bind_on_host(ctx, family) };
    if is_proxys_port(ctx, caller.protocol) {
        return refuse(ctx, family, Some(caller.netns_cookie));
    }
    if caller.protocol == Protocol::Tcp {
        // The proxy's connections impersonate the application's address and port. If the option can't be set (Linux
        // before 6.1), the bind may fail with EADDRINUSE, as it would without this program.
        let _ = set_reuse_address(ctx);
    }
    ALLOW
}

/// Guards the ports in the host's namespace. A proxy that is identified by its mark alone may set that mark after `bind()`.
#[inline(always)]
fn bind_on_host(ctx: &SockAddrContext, family: impl FnOnce() -> Family) -> i32 {
    if lookup::is_in_pods() || proxies::is_known_by_mark() || config::host_cookie() != Some(netns_cookie(ctx))
    {
        return ALLOW;
    }
    match protocol_of(ctx) {
        Some(protocol) if is_proxys_port(ctx, protocol) => refuse(ctx, family, None),
        _ => ALLOW,
    }
}

/// Whether a process other than the proxy binds one of the proxy's ports.
#[inline(always)]
fn is_proxys_port(ctx: &SockAddrContext, protocol: Protocol) -> bool {
    decide::is_guarded(protocol, port(ctx)) && !proxies::is_proxy(mark(ctx))
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, family: impl FnOnce() -> Family, pod: Option<u64>) -> i32 {
    count(family(), Direction::Bind, Verdict::Dropped, Reason::ProxyPort, pod, || {
        let mut about = About::new(flows::cookie(ctx));
        about.tuple.source_port = port(ctx).to_be_bytes();
        about
    });
    fail_with(EADDRINUSE)
}
