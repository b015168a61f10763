//! Identifies the node proxy's sockets: those of processes in a node proxy's cgroup.
//!
//! A mark proves nothing: any process with `CAP_NET_RAW` can set it (`SO_MARK`, since Linux 5.17), and container runtimes grant
//! that capability by default. If no proxy is known, no socket counts as the proxy's. Only with `--proxy-identity mark` is the
//! mark sufficient.

use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_skb_cgroup_id};
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::{MARK_DELIVERY, MARK_MASK, MARK_PROXY, MAX_PROXY_CGROUPS};
use redirect_ebpf::decide;
use redirect_ebpf::maps::{ConfigFlags, ProxyCgroup, ProxyPart};

use super::config;

#[map]
static PROXY_CGROUPS: HashMap<u64, ProxyCgroup> = HashMap::with_max_entries(MAX_PROXY_CGROUPS, 0);

/// Whether a socket with this mark, used by the current process, is the proxy's own.
#[inline(always)]
pub(super) fn is_proxy(mark: u32) -> bool {
    // SAFETY: the helper has no preconditions.
    owns(mark, unsafe { bpf_get_current_cgroup_id() })
}

/// Whether a packet comes from one of the proxy's own sockets. Its socket survives a veth pair, its mark does not.
#[inline(always)]
pub(super) fn sent(ctx: &TcContext) -> bool {
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    // SAFETY: the helper takes the context. A packet without a socket has the cgroup 0.
    owns(mark, unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })
}

/// Whether no socket sent the packet: the kernel did, or it was forwarded.
#[inline(always)]
pub(super) fn has_no_sender(ctx: &TcContext) -> bool {
    // SAFETY: the helper takes the context.
    unsafe { bpf_skb_cgroup_id(ctx.skb.skb) == 0 }
}

/// The only function that decides whether a socket is the proxy's.
#[inline(always)]
fn owns(mark: u32, cgroup: u64) -> bool {
    PROXY_CGROUPS.get_ptr(cgroup).is_some() || (is_known_by_mark() && decide::is_proxy_mark(mark))
}

/// Whether the mark alone makes a socket the proxy's.
#[inline(always)]
pub(super) fn is_known_by_mark() -> bool {
    config::flags().contains(ConfigFlags::PROXY_BY_MARK)
}

/// The sender of a packet that leaves the host towards a pod, in placement `node`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// The proxy, to the pod's application.
    Delivery,
    /// The part of the proxy that delivers, to the pod's application, or to the other part, which has the pod's address.
    Inbound,
    /// The proxy, to a client in the pod, or for a client in another one.
    Proxy,
    /// Any other sender.
    Other,
}

/// The sender of a packet. The mark distinguishes the proxy's connections. It is trusted on the proxy's own sockets, and on
/// segments that open no connection: the kernel sends resets and last ACKs for a socket, with its mark but without the
/// socket. The connections of a proxy that sets no marks count as deliveries, unless its parts have cgroups of their own.
#[inline(always)]
pub(super) fn sender(ctx: &TcContext, opens: bool) -> Sender {
    let part = part(ctx);
    let believed = part.is_some() || !opens || is_known_by_mark();
    // SAFETY: every TC context has `mark`.
    match unsafe { (*ctx.skb.skb).mark } & MARK_MASK {
        MARK_DELIVERY if believed => Sender::Delivery,
        MARK_PROXY if believed => Sender::Proxy,
        _ => match part {
            Some(ProxyPart::OUTBOUND) => Sender::Proxy,
            Some(ProxyPart::INBOUND) => Sender::Inbound,
            Some(ProxyPart::IN_PODS) | None => Sender::Other,
            Some(_) => Sender::Delivery,
        },
    }
}

/// Whether the listener that a packet was assigned to is the proxy's. `mark` is the listener's.
#[inline(always)]
pub(super) fn listens(ctx: &TcContext, mark: u32) -> bool {
    // SAFETY: the helper takes the context.
    owns(mark, unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })
}

#[inline(always)]
fn part(ctx: &TcContext) -> Option<ProxyPart> {
    // SAFETY: the helper takes the context. A packet without a socket has the cgroup 0.
    let cgroup = PROXY_CGROUPS.get_ptr(unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })?;
    // SAFETY: the entry is only read, and an aligned u32 is never seen half-written.
    Some(unsafe { (*cgroup).part })
}
