//! Changes packets at a TC hook, checksums included. Offsets of segments count from the network header; behind an Ethernet
//! header, as on every veth, that is fourteen bytes into the packet.

use aya_ebpf::programs::TcContext;
use redirect_ebpf::packet::Segment;

const ETHERNET: u32 = 14;
const UDP_CHECKSUM: u32 = 6;

/// A checksum of zero means that there is none.
const BPF_F_MARK_MANGLED_0: u64 = 1 << 5;
/// Updates the checksum that the device has computed over the whole packet.
const BPF_F_RECOMPUTE_CSUM: u64 = 1;

/// The offset in the packet of an offset from the network header.
#[inline(always)]
pub(super) const fn place(offset: u32) -> usize {
    (ETHERNET + offset) as usize
}

/// Writes bytes into the packet.
#[inline(always)]
pub(super) fn store<T>(ctx: &TcContext, place: usize, value: &T) -> Result<(), i64> {
    ctx.skb.store(place, value, BPF_F_RECOMPUTE_CSUM)
}

/// Changes the source port of a UDP datagram.
#[inline(always)]
pub(super) fn set_source_port<A: Copy>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> Result<(), i64> {
    let from = u16::from_ne_bytes(segment.source_port);
    let to = port.to_be();
    let checksum = place(segment.transport_offset + UDP_CHECKSUM);
    ctx.skb.l4_csum_replace(checksum, from.into(), to.into(), 2 | BPF_F_MARK_MANGLED_0)?;
    store(ctx, place(segment.transport_offset), &to)
}
