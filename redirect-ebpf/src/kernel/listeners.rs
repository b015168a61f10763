//! The proxies' listeners, for connections that only the socket lookup can assign ([`super::lookup`]).
//!
//! Up to Linux 7.2 the TC program that handles such a connection has found its listener and stores it in the map. Linux 7.3
//! forbids TC programs to store sockets in maps. There, sock_ops of the root cgroup stores each listener when it starts to
//! listen. A listener that is older than this program is unknown: the kernel then answers a SYN whose tuple is in TIME_WAIT
//! as it would without this project, the sender resets the old connection, and sends the SYN again at once.

use core::mem::offset_of;

use aya_ebpf::Global;
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_sock_ops,
};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_map_update_elem,
    bpf_sk_storage_get, bpf_sock_hash_update,
};
use aya_ebpf::macros::{btf_map, map, sock_ops};
use aya_ebpf::maps::SockHash;
use aya_ebpf::programs::{SkLookupContext, SockOpsContext};
use redirect_ebpf::decide::{Protocol, is_for_captured, is_guarded};
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::ListenerKey;
use redirect_ebpf::packet::address_family;

use super::context::word;
use super::socket::Socket;
use super::{config, pods};

/// The kernel removes closed sockets. The agent sets the capacity.
#[map]
static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(1, 0);

/// Identifies a listener's owner in its key: the cookie of its namespace if sock_ops noted it, otherwise a number of the
/// listener's own. Kept in the listener's storage, because TC programs can't read its namespace.
#[btf_map]
static OWNERS: SkStorage<u64> = SkStorage::new();

/// Whether TC programs may store sockets in maps; the agent probes it.
#[unsafe(no_mangle)]
static TC_KNOWS_LISTENERS: Global<bool> = Global::new(true);

const EEXIST: i32 = -17;

/// The owner in a listener's key.
#[inline(always)]
pub(super) fn owner(listener: &Socket) -> Option<u64> {
    if !TC_KNOWS_LISTENERS.load() {
        // No listener has the owner 0, so the lookup finds none; see the module.
        return listener.stored(&OWNERS).or(Some(0));
    }
    // SAFETY: the helpers have no preconditions.
    let (time, processor) = unsafe { (bpf_ktime_get_ns(), bpf_get_smp_processor_id()) };
    listener.stored_or(&OWNERS, ListenerKey::number(time, processor))
}

/// Stores a listener that TC has found in the map, if it is not there. Where TC may not store it, sock_ops did so before.
#[inline(always)]
pub(super) fn remember(key: &ListenerKey, listener: &Socket) -> Result<(), i64> {
    if !TC_KNOWS_LISTENERS.load() {
        return Ok(());
    }
    // aya has no call for this: the value of a socket map is a socket.
    // SAFETY: map, key and socket are valid for the length of the call.
    let result = unsafe {
        bpf_map_update_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw const *key).cast(),
            listener.as_ptr().cast_const(),
            BPF_NOEXIST.into(),
        )
    };
    // Before Linux 6.4 maps return an `int`, and the verifier calls them directly: the upper half is not set then.
    match result as i32 {
        0 | EEXIST => Ok(()),
        error => Err(error.into()),
    }
}

/// Gives a connection to a listener.
#[inline(always)]
pub(super) fn choose(ctx: &SkLookupContext, mut key: ListenerKey) -> Result<(), ()> {
    for slot in ListenerKey::SLOTS {
        key.slot = slot;
        if LISTENERS.redirect_sk_lookup(ctx, key, 0).is_ok() {
            return Ok(());
        }
    }
    Err(())
}

#[sock_ops]
pub(crate) fn listening(ctx: SockOpsContext) -> u32 {
    const UNUSED: u32 = 1;
    if word(ctx.ops, offset_of!(bpf_sock_ops, op)) != BPF_SOCK_OPS_TCP_LISTEN_CB {
        return UNUSED;
    }
    let port = word(ctx.ops, offset_of!(bpf_sock_ops, local_port)) as u16;
    // SAFETY: the helper takes the context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    if !is_proxys(netns_cookie, port) {
        return UNUSED;
    }
    keep(&ctx, netns_cookie);
    let family = word(ctx.ops, offset_of!(bpf_sock_ops, family));
    let address = word(ctx.ops, offset_of!(bpf_sock_ops, local_ip4));
    for family in families(family, address).into_iter().flatten() {
        // Listeners that share a port have a slot each, up to a limit. At any time at least one of them is stored.
        for slot in ListenerKey::SLOTS {
            let mut key = ListenerKey { owner: netns_cookie, port, slot, family };
            // SAFETY: context, map and key are valid for the length of the call.
            let result = unsafe {
                bpf_sock_hash_update(
                    ctx.ops,
                    (&raw const LISTENERS).cast_mut().cast(),
                    (&raw mut key).cast(),
                    BPF_NOEXIST.into(),
                )
            };
            if result as i32 != EEXIST {
                break;
            }
        }
    }
    UNUSED
}

/// Keeps the cookie in the listener's socket storage.
#[inline(always)]
fn keep(ctx: &SockOpsContext, mut netns_cookie: u64) {
    // SAFETY: every sock_ops context has `sk`.
    let socket = unsafe { (&raw const (*ctx.ops).__bindgen_anon_2.sk).read_volatile() };
    if socket.is_null() {
        return;
    }
    // SAFETY: map, socket and value are valid for the length of the call.
    let _kept = unsafe {
        bpf_sk_storage_get(
            (&raw const OWNERS).cast_mut().cast(),
            socket.cast(),
            (&raw mut netns_cookie).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
}

/// Whether the listener on this port may receive connections from the socket lookup.
#[inline(always)]
fn is_proxys(netns_cookie: u64, port: u16) -> bool {
    if config::host_cookie() == Some(netns_cookie) {
        return is_guarded(Protocol::Tcp, port);
    }
    is_for_captured(port) && pods::flags(netns_cookie).is_some()
}

/// The families that a listener bound to this address accepts: an IPv6 listener on the unspecified address accepts both.
/// Whether it is IPv6-only shows when it is to get an IPv4 connection.
#[inline(always)]
fn families(family: u32, address: u32) -> [Option<u32>; 2] {
    const IPV4: u32 = address_family(Family::Ipv4) as u32;
    [Some(family), (family != IPV4 && address == 0).then_some(IPV4)]
}
