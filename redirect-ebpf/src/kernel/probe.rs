//! sock_ops of the kubelet's cgroup: notes the connections that it makes from the host to enrolled pods, so that
//! [`super::inbound`] lets these, and no others from the node, reach the application without the proxy.

use core::mem::offset_of;

use aya_ebpf::bindings::{BPF_ANY, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::{map, sock_ops};
use aya_ebpf::maps::LruHashMap;
use aya_ebpf::programs::SockOpsContext;
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::{Family, Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::Tuple;
use redirect_ebpf::packet::Segment;

use super::config;
use super::context::{End, addresses, word};
use super::diagnostics;
use super::pods::PodIp as _;

/// Probes live from connect() to the SYN's arrival, retransmissions included.
#[map]
static PROBES: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(4096, 0);

/// A SYN is sent again after 1, 3 and 7 seconds; kubelet gives up before the next.
const LIFETIME: u64 = 10_000_000_000;

const UNUSED: u32 = 1;

/// Whether the segment opens a connection that the kubelet made.
#[inline(always)]
pub(super) fn is_probe<I: Ip>(segment: &Segment<I::Address>) -> bool {
    let tuple = segment.tuple::<I>();
    // SAFETY: the entry is only read, and an aligned u64 is never seen half-written.
    let Some(began) = PROBES.get_ptr(tuple).map(|began| unsafe { *began }) else { return false };
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }.wrapping_sub(began) < LIFETIME
}

#[sock_ops]
pub(crate) fn probe(ctx: SockOpsContext) -> u32 {
    if word(ctx.ops, offset_of!(bpf_sock_ops, op)) != BPF_SOCK_OPS_TCP_CONNECT_CB {
        return UNUSED;
    }
    // Processes of the cgroup that moved to a pod's namespace, or say that they are a kubelet, are not the node's.
    // SAFETY: the helper takes the context.
    if config::host_cookie() != Some(unsafe { bpf_get_netns_cookie(ctx.ops.cast()) }) {
        return UNUSED;
    }
    let tuple = tuple(ctx.ops);
    let (family, pod) = match v4_mapped(tuple.destination) {
        Some(address) => (Family::Ipv4, Ipv4::owner(&address)),
        None => (Family::Ipv6, Ipv6::owner(&tuple.destination)),
    };
    if let Some(pod) = pod {
        // SAFETY: the helper has no preconditions.
        let now = unsafe { bpf_ktime_get_ns() };
        // A probe that is not noted goes through the proxy: it is the safe side.
        if let Err(error) = PROBES.insert(tuple, now, BPF_ANY.into()) {
            diagnostics::of_call(Fault::Probe, Hook::Probe, family, error.into(), pod);
        }
    }
    UNUSED
}

#[inline(always)]
fn tuple(ops: *const bpf_sock_ops) -> Tuple {
    const FAMILY: usize = offset_of!(bpf_sock_ops, family);
    const LOCAL: End =
        End { ipv4: offset_of!(bpf_sock_ops, local_ip4), ipv6: offset_of!(bpf_sock_ops, local_ip6) };
    const REMOTE: End =
        End { ipv4: offset_of!(bpf_sock_ops, remote_ip4), ipv6: offset_of!(bpf_sock_ops, remote_ip6) };
    let [source, destination] = addresses(ops, FAMILY, [LOCAL, REMOTE]);
    let local_port = word(ops, offset_of!(bpf_sock_ops, local_port)) as u16;
    // Network order in the upper half, as the context has it.
    let remote_port = word(ops, offset_of!(bpf_sock_ops, remote_port)).to_ne_bytes();
    Tuple {
        source,
        destination,
        source_port: local_port.to_be_bytes(),
        destination_port: [remote_port[2], remote_port[3]],
    }
}
