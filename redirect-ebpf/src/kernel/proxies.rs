//! Which sockets are the node proxy's own.

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
///
/// A process with `CAP_NET_ADMIN` in its pod can forge the mark; it cannot forge its cgroup.
#[inline(always)]
pub(super) fn is_proxy(mark: u32) -> bool {
    // SAFETY: the helper has no preconditions.
    is_mark_of(mark, || unsafe { bpf_get_current_cgroup_id() })
}

/// Whether a packet that leaves an interface comes from one of the proxy's own sockets.
#[inline(always)]
pub(super) fn sent(ctx: &TcContext) -> bool {
    // SAFETY: every TC context has `mark`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    // SAFETY: the helper takes the context. A packet without a socket has the cgroup 0.
    is_mark_of(mark, || unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })
}

/// Whose a packet is that leaves the host towards a pod, in placement `node`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// The proxy, to the pod's application.
    Delivery,
    /// The part of the proxy that delivers, to the pod's application, or to the other part, which has the pod's address.
    Inbound,
    /// The proxy, to a client in the pod, or for a client in another one.
    Proxy,
    /// Anybody.
    Other,
}

/// Whose packet it is. Marks do not cross from one namespace to another: whoever sets one here has `CAP_NET_ADMIN` on the
/// node itself. A proxy that sets none is known by its cgroup, and delivers, unless its parts have cgroups of their own.
#[inline(always)]
pub(super) fn sender(ctx: &TcContext) -> Sender {
    // SAFETY: every TC context has `mark`.
    match unsafe { (*ctx.skb.skb).mark } & MARK_MASK {
        MARK_DELIVERY => Sender::Delivery,
        MARK_PROXY => Sender::Proxy,
        _ => match part(ctx) {
            Some(ProxyPart::OUTBOUND) => Sender::Proxy,
            Some(ProxyPart::INBOUND) => Sender::Inbound,
            Some(_) => Sender::Delivery,
            None => Sender::Other,
        },
    }
}

/// Whether the socket that a packet comes from, or that it is assigned to, is of a process in a node proxy's cgroup.
#[inline(always)]
pub(super) fn is_in_proxy_cgroup(ctx: &TcContext) -> bool {
    part(ctx).is_some()
}

#[inline(always)]
fn part(ctx: &TcContext) -> Option<ProxyPart> {
    // SAFETY: the helper takes the context. A packet without a socket has the cgroup 0.
    let cgroup = PROXY_CGROUPS.get_ptr(unsafe { bpf_skb_cgroup_id(ctx.skb.skb) })?;
    // SAFETY: the entry is only read, and an aligned u32 is never seen half-written.
    Some(unsafe { (*cgroup).part })
}

#[inline(always)]
fn is_mark_of(mark: u32, cgroup: impl FnOnce() -> u64) -> bool {
    decide::is_proxy_mark(mark)
        && (!config::flags().contains(ConfigFlags::PROXY_BY_CGROUP)
            || PROXY_CGROUPS.get_ptr(cgroup()).is_some())
}
