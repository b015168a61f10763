//! Refuses connections in placement `node`: new ones while no proxy listens, if `--without-proxy refuse` is set, and those that
//! the proxy does not have. The program turns the segment into the reset that answers it. The kernel can't send that reset: it
//! has no route from an address that is not its own.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::diagnostics::{Fault, Hook};
use redirect_ebpf::family::Address;
use redirect_ebpf::maps::ConfigFlags;
use redirect_ebpf::packet::{ACK, Packet as _, Parse, RST, Segment};

use super::capture::Action;
use super::config;
use super::diagnostics;
use super::rewrite::{place, store};
use super::skb::Skb;
use super::socket::Socket;

/// The direction of the answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Back {
    /// To the pod, whose segment it was.
    ToPod,
    /// To the pod's peer, as if the pod had sent it.
    FromPod,
}

/// Offsets in the TCP header: sequence number, acknowledgment, length and flags, checksum.
const SEQUENCE: u32 = 4;
const ACKNOWLEDGEMENT: u32 = 8;
const FLAGS: u32 = 12;
const CHECKSUM: u32 = 16;

/// Whether to refuse a connection because the proxy does not listen.
#[inline(always)]
pub(super) fn is_refused<A: Address>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> bool {
    config::flags().contains(ConfigFlags::REFUSE) && Socket::listener(ctx, segment, port).is_none()
}

/// Answers a segment with a reset.
#[inline(always)]
pub(super) fn refuse<I: Parse>(ctx: &TcContext, segment: &Segment<I::Address>, back: Back) -> Action {
    // SAFETY: every TC context has `ifindex`.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    if let Err(error) = turn::<I>(ctx, segment) {
        let hook = if back == Back::ToPod { Hook::FromPod } else { Hook::ToPod };
        diagnostics::of_packet::<I>(ctx, Fault::Rewrite, hook, error);
        return Action::Drop;
    }
    let flags = match back {
        Back::ToPod => 0,
        Back::FromPod => BPF_F_INGRESS.into(),
    };
    // SAFETY: the helper has no preconditions.
    Action::Redirect(unsafe { bpf_redirect(interface, flags) } as i32)
}

#[inline(always)]
fn turn<I: Parse>(ctx: &TcContext, segment: &Segment<I::Address>) -> Result<(), i64> {
    const EINVAL: i64 = -22;
    let skb = Skb(ctx);
    let transport = segment.transport_offset;
    let links: [[u8; 6]; 2] = [ctx.load(0)?, ctx.load(6)?];
    let sequence: [u8; 4] = skb.load(transport + SEQUENCE).ok_or(EINVAL)?;
    let acknowledgement: [u8; 4] = skb.load(transport + ACKNOWLEDGEMENT).ok_or(EINVAL)?;
    let [length, flags] = skb.load(transport + FLAGS).ok_or(EINVAL)?;

    // Swapping fields does not change the checksums.
    store(ctx, 0, &links[1])?;
    store(ctx, 6, &links[0])?;
    store(ctx, place(segment.network_offset + I::SOURCE), &segment.destination)?;
    store(ctx, place(segment.network_offset + I::DESTINATION), &segment.source)?;
    store(ctx, place(transport), &segment.destination_port)?;
    store(ctx, place(transport + 2), &segment.source_port)?;

    // RFC 9293, 3.5.2: a reset has the sequence number that the other end expects, or acknowledges its SYN.
    let (next, acknowledged, answer) = if flags & ACK == 0 {
        ([0; 4], u32::from_be_bytes(sequence).wrapping_add(1).to_be_bytes(), RST | ACK)
    } else {
        (acknowledgement, [0; 4], RST)
    };
    replace(ctx, transport, SEQUENCE, sequence, next)?;
    replace(ctx, transport, ACKNOWLEDGEMENT, acknowledgement, acknowledged)?;
    let answered = [length, answer];
    let checksum = place(transport + CHECKSUM);
    let from = u16::from_ne_bytes([length, flags]);
    ctx.skb.l4_csum_replace(checksum, from.into(), u16::from_ne_bytes(answered).into(), 2)?;
    store(ctx, place(transport + FLAGS), &answered)
}

/// Replaces a word of the TCP header.
#[inline(always)]
fn replace(ctx: &TcContext, transport: u32, offset: u32, from: [u8; 4], to: [u8; 4]) -> Result<(), i64> {
    let (old, new) = (u32::from_ne_bytes(from), u32::from_ne_bytes(to));
    ctx.skb.l4_csum_replace(place(transport + CHECKSUM), old.into(), new.into(), 4)?;
    store(ctx, place(transport + offset), &to)
}
