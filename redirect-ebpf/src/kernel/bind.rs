//! cgroup/bind4 and cgroup/bind6: keeps applications of enrolled pods off the proxy's ports, and lets an application
//! bind its own port again while the proxy still holds connections on it.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide::{self, Protocol};
use redirect_ebpf::family::{Family, v4_mapped};

use super::counters::count;
use super::flows::{self, About};
use super::proxies;
use super::sock_addr::{ALLOW, caller, fail_with, mark, port, set_reuse_address, user_ip6};

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
    let Some(caller) = caller(ctx) else { return ALLOW };
    if decide::is_guarded(caller.protocol, port(ctx)) && !proxies::is_proxy(mark(ctx)) {
        let pod = Some(caller.netns_cookie);
        count(family(), Direction::Bind, Verdict::Dropped, Reason::ProxyPort, pod, || {
            let mut about = About::new(flows::cookie(ctx));
            about.tuple.source_port = port(ctx).to_be_bytes();
            about
        });
        return fail_with(EADDRINUSE);
    }
    if caller.protocol == Protocol::Tcp {
        // The proxy's connections stand for the application's and have its address and port. Nothing is lost where the
        // option can't be set (Linux before 6.1) but this cure.
        let _ = set_reuse_address(ctx);
    }
    ALLOW
}
