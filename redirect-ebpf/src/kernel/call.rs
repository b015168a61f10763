//! The decision on a socket call that connects or sends a datagram.

use aya_ebpf::programs::SockAddrContext;
use redirect_ebpf::count::{Direction, Reason};
use redirect_ebpf::decide::{self, Connect, Outbound};
use redirect_ebpf::family::Ip;
use redirect_ebpf::maps::{ConfigFlags, PodFlags};

use super::config;
use super::exclusions::{ExcludedIp, excluded};
use super::flows::{self, About};
use super::pods::PodIp;
use super::proxies;
use super::sock_addr::{Caller, port};

/// The part of an event that a socket call provides. A datagram may have another source than its socket.
#[inline(always)]
pub(super) fn about<I: Ip>(
    ctx: &SockAddrContext,
    source: Option<I::Address>,
    destination: I::Address,
) -> About {
    let mut about = About::new(flows::cookie(ctx));
    if let Some(source) = source {
        about.tuple.source = I::widen(source);
    }
    about.tuple.destination = I::widen(destination);
    about.tuple.destination_port = port(ctx).to_be_bytes();
    about
}

/// Decides on a connection, or a datagram, to `destination`. `mark` is the socket's mark, `source` the address that it is
/// bound to.
#[inline(always)]
pub(super) fn decision<I: PodIp + ExcludedIp>(
    ctx: &SockAddrContext,
    caller: &Caller,
    destination: I::Address,
    mark: u32,
    source: I::Address,
) -> Outbound {
    let (cookie, port) = (caller.netns_cookie, port(ctx));
    let proxy = proxies::is_proxy(mark);
    if !proxy && caller.flags.contains(PodFlags::ON_HOST) {
        return Outbound::Pass(Reason::OtherTraffic);
    }
    let connect = Connect {
        protocol: caller.protocol,
        destination,
        port,
        proxy,
        source,
        flags: caller.flags,
        link_local: config::flags().contains(ConfigFlags::LINK_LOCAL),
    };
    decide::outbound::<I>(
        &connect,
        |address| I::owner(&address) == Some(cookie),
        || excluded::<I>(cookie, caller.flags, Direction::Outbound, destination, port.to_be_bytes()),
    )
}
