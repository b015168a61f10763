//! sock_ops of the kubelet's cgroup: notes the sockets by which the kubelet connects from the host to enrolled
//! pods. [`super::inbound`] lets these, and no other connections from the node, reach the application without the
//! proxy.

use core::mem::offset_of;

use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_sk_fullsock, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, sock_ops};
use aya_ebpf::programs::{SockOpsContext, TcContext};
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::{Family, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::Tuple;
use redirect_ebpf::packet::Segment;

use super::config;
use super::context::{End, addresses, word};
use super::diagnostics;
use super::pods::PodIp as _;
use super::socket::Socket;

/// The kubelet's sockets that are connected to enrolled pods. An entry ends with its socket, so no other process inherits the
/// exemption by reusing the port.
#[btf_map]
static PROBE_SOCKETS: SkStorage<u64> = SkStorage::new();

const UNUSED: u32 = 1;

/// Whether the kubelet sent the packet: the packet still has the kubelet's socket when it arrives at the pod.
#[inline(always)]
pub(super) fn is_probe(ctx: &TcContext) -> bool {
    // SAFETY: every TC context has `sk`; the verifier checks that it is not null.
    let socket = unsafe { (&raw const (*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile() };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the socket is not null.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: map and socket are valid for the length of the call.
    let noted = unsafe {
        bpf_sk_storage_get(
            (&raw const PROBE_SOCKETS).cast_mut().cast(),
            socket.cast(),
            core::ptr::null_mut(),
            0,
        )
    };
    !noted.is_null()
}

/// Whether a segment answers a kubelet probe. For use in the host's namespace.
#[inline(always)]
pub(super) fn is_for_probe<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> bool {
    Socket::full(ctx, segment).is_some_and(|socket| socket.stored(&PROBE_SOCKETS).is_some())
}

#[sock_ops]
pub(crate) fn probe(ctx: SockOpsContext) -> u32 {
    if word(ctx.ops, offset_of!(bpf_sock_ops, op)) != BPF_SOCK_OPS_TCP_CONNECT_CB {
        return UNUSED;
    }
    // A process of the cgroup that moved into a pod's namespace, or that pretends to be a kubelet, must get no
    // exemption.
    // SAFETY: the helper takes the context.
    if config::host_cookie() != Some(unsafe { bpf_get_netns_cookie(ctx.ops.cast()) }) {
        return UNUSED;
    }
    let tuple = tuple(ctx.ops);
    let (family, pod) = match v4_mapped(tuple.destination) {
        Some(address) => (Family::Ipv4, Ipv4::owner(&address)),
        None => (Family::Ipv6, Ipv6::owner(&tuple.destination)),
    };
    // A probe without a note goes through the proxy, which is the safe side.
    if let Some(pod) = pod
        && let Err(error) = note(&ctx)
    {
        diagnostics::of_call(Fault::Probe, Hook::Probe, family, error, pod);
    }
    UNUSED
}

#[inline(always)]
fn note(ctx: &SockOpsContext) -> Result<(), i64> {
    const ENOMEM: i64 = -12;
    // SAFETY: every sock_ops context has `sk`.
    let socket = unsafe { (&raw const (*ctx.ops).__bindgen_anon_2.sk).read_volatile() };
    if socket.is_null() {
        return Err(ENOMEM);
    }
    let mut noted = 1u64;
    // SAFETY: map, socket and value are valid for the length of the call.
    let place = unsafe {
        bpf_sk_storage_get(
            (&raw const PROBE_SOCKETS).cast_mut().cast(),
            socket.cast(),
            (&raw mut noted).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
    if place.is_null() { Err(ENOMEM) } else { Ok(()) }
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
