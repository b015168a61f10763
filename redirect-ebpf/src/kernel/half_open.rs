//! Connections that were half open when a running pod was captured: the pod had sent or received a SYN, and the handshake was not
//! complete. They complete past the proxy, as they began. For a few minutes the pod has [`PodFlags::HALF_OPEN`], and the gates
//! let retransmissions through: a SYN of a socket that called `connect()` before the capture, and the SYN-ACK of a listener that
//! received the SYN before it.
//!
//! Such a socket has no distinguishing mark: an application can change the mark after `connect()`. So while the pod has the flag,
//! the connect hook notes every socket that it sees. A connecting socket without a note called `connect()` before: the hook runs
//! before the socket can send anything.

use core::ptr::null_mut;

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{bpf_sk_fullsock, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::{SockAddrContext, TcContext};
use redirect_ebpf::decide::Protocol;
use redirect_ebpf::maps::PodFlags;

use super::sock_addr::{Caller, protocol};

/// Sockets that connect while their pod has the flag.
#[btf_map]
static CONNECTED: SkStorage<u64> = SkStorage::new();

const TCP_SYN_SENT: u32 = 2;
const TCP_NEW_SYN_RECV: u32 = 12;

/// Notes a connecting socket. Returns false if there is no memory for the note: the socket must not connect
/// then.
#[inline(always)]
pub(super) fn note(ctx: &SockAddrContext, caller: &Caller) -> bool {
    let captured = caller.flags.contains(PodFlags::HALF_OPEN) && !caller.flags.contains(PodFlags::ON_HOST);
    if !captured || caller.protocol != Protocol::Tcp {
        return true;
    }
    let mut noted = 1u64;
    // SAFETY: the socket is the context's own, and the initial value lives for the length of the call.
    !unsafe { CONNECTED.get_or_insert_ptr_mut(ctx, Some(&mut noted)) }.is_null()
}

/// Whether a SYN is of a socket that called `connect()` before the pod was captured.
#[inline(always)]
pub(super) fn opened_before(ctx: &TcContext, flags: PodFlags) -> bool {
    if !flags.contains(PodFlags::HALF_OPEN) {
        return false;
    }
    let socket = sender(ctx);
    if socket.is_null() {
        return false;
    }
    // SAFETY: the socket is not null.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the verifier checks that the pointer is to a full socket.
    let (state, number) = unsafe {
        ((&raw const (*socket).state).read_volatile(), (&raw const (*socket).protocol).read_volatile())
    };
    if state != TCP_SYN_SENT || protocol(number) != Some(Protocol::Tcp) {
        return false;
    }
    // SAFETY: map and socket are valid for the length of the call.
    let noted =
        unsafe { bpf_sk_storage_get((&raw const CONNECTED).cast_mut().cast(), socket.cast(), null_mut(), 0) };
    noted.is_null()
}

/// Whether a SYN-ACK is the kernel's own answer to a SYN that a listener of the pod received. Since the pod was captured,
/// listeners receive only exempt SYNs; frames of an application come from sockets of another state.
#[inline(always)]
pub(super) fn answers_before(ctx: &TcContext, flags: PodFlags) -> bool {
    if !flags.contains(PodFlags::HALF_OPEN) {
        return false;
    }
    let socket = sender(ctx);
    // SAFETY: the socket is not null, and every socket has a state.
    !socket.is_null() && unsafe { (&raw const (*socket).state).read_volatile() } == TCP_NEW_SYN_RECV
}

#[inline(always)]
fn sender(ctx: &TcContext) -> *mut bpf_sock {
    // SAFETY: every TC context has `sk`; the verifier checks that it is not null.
    unsafe { (&raw const (*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile() }
}
