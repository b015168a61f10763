//! A packet at a TC hook, for [`redirect_ebpf::packet`]: [`Skb`] at ingress, [`Frame`] at egress.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{bpf_check_mtu, bpf_skb_load_bytes, bpf_skb_load_bytes_relative};
use aya_ebpf::programs::TcContext;
use redirect_ebpf::decide::Protocol;
use redirect_ebpf::family::{Ip as _, Ipv4, Ipv6};
use redirect_ebpf::packet::{Packet, Parse, Parsed, Segment, parse};

/// A packet at ingress. The kernel has just read its type from the frame and set the network header behind it. Offsets count
/// from the network header, because pods may have devices without Ethernet headers (tun, WireGuard).
pub(super) struct Skb<'a>(pub(super) &'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the buffer has room for N bytes.
        let result = unsafe {
            bpf_skb_load_bytes_relative(
                self.0.as_ptr().cast_const(),
                offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
                BPF_HDR_START_NET,
            )
        };
        // SAFETY: the helper wrote all N bytes if it returned zero.
        (result == 0).then(|| unsafe { bytes.assume_init() })
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        // SAFETY: every TC context has `protocol`.
        let protocol = unsafe { (*self.0.skb.skb).protocol };
        u16::from_be(protocol as u16)
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        forget(self.0, number)
    }
}

#[inline(always)]
fn forget(ctx: &TcContext, number: u32) -> u32 {
    // SAFETY: every TC context has `len`. The length is constant; the verifier does not know that.
    let length = || unsafe { (&raw const (*ctx.skb.skb).len).read_volatile() };
    number ^ length() ^ length()
}

/// A packet at egress, read from its first byte as its receiver will read it. Neither `skb->protocol` nor the network header
/// is trusted: an `AF_PACKET` sender chooses both, the latter by VLAN tags.
pub(super) struct Frame<'a> {
    ctx: &'a TcContext,
    /// The length of the Ethernet header; zero if the interface has none.
    link: u32,
}

impl<'a> Frame<'a> {
    /// On an interface that always has Ethernet headers.
    #[inline(always)]
    pub(super) fn ethernet(ctx: &'a TcContext) -> Self {
        Self { ctx, link: ETHERNET_HEADER as u32 }
    }

    /// On any interface.
    #[inline(always)]
    pub(super) fn leaving(ctx: &'a TcContext) -> Self {
        if has_link_headers(ctx) { Self::ethernet(ctx) } else { Self { ctx, link: 0 } }
    }

    /// Whether it begins with an Ethernet header.
    #[inline(always)]
    pub(super) fn is_ethernet(&self) -> bool {
        self.link != 0
    }

    #[inline(always)]
    fn at<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        let (skb, place) = (self.ctx.as_ptr().cast_const(), bytes.as_mut_ptr().cast());
        // SAFETY: the buffer has room for N bytes.
        let result = unsafe { bpf_skb_load_bytes(skb, offset, place, N as u32) };
        // SAFETY: the helper wrote all N bytes if it returned zero.
        (result == 0).then(|| unsafe { bytes.assume_init() })
    }
}

impl Packet for Frame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.at(self.link + offset)
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        const TYPE: u32 = 12;
        if self.link != 0 {
            // A frame without a type can't be sent.
            return self.at::<2>(TYPE).map_or(0, u16::from_be_bytes);
        }
        match self.at::<1>(0).map(|[first]| first >> 4) {
            Some(4) => Ipv4::ETHER_TYPE,
            Some(6) => Ipv6::ETHER_TYPE,
            _ => 0,
        }
    }

    #[inline(always)]
    fn forget(&self, number: u32) -> u32 {
        forget(self.ctx, number)
    }
}

/// Whether packets of the interface begin with an Ethernet header. The context has no field for that; the limit
/// that `bpf_check_mtu` applies is the interface's MTU plus the length of its link header.
#[inline(always)]
fn has_link_headers(ctx: &TcContext) -> bool {
    let check = |mtu: &mut u32, difference: i32| {
        // SAFETY: the number lives for the length of the call. Zero stands for the packet's own interface.
        unsafe { bpf_check_mtu(ctx.as_ptr(), 0, &raw mut *mtu, difference, 0) }
    };
    // The first call returns the MTU, whatever its result.
    let mut mtu = 0;
    check(&mut mtu, 0);
    let longest = mtu as i32 + ETHERNET_HEADER as i32;
    check(&mut 0, longest.wrapping_sub(ctx.len() as i32)) == 0
}

/// Parses a packet on `lo`, which has an Ethernet header. Plain packets are read directly, without a helper call.
#[inline(always)]
pub(super) fn parse_on_loopback<I: Parse>(ctx: &TcContext) -> Parsed<I::Address> {
    match plain_on_loopback::<I>(ctx, Protocol::Tcp) {
        Some(segment) => Parsed::Tcp(segment),
        None => parse::<I>(&Skb(ctx)),
    }
}

/// The destination port of a plain packet on `lo`. Cheap enough to call for every packet.
#[inline(always)]
pub(super) fn port_on_loopback<I: Parse>(ctx: &TcContext) -> Option<u16> {
    let packet = LoopbackSkb(ctx);
    let port = (packet.ether_type() == I::ETHER_TYPE).then(|| packet.load(I::HEADER + 2));
    port?.map(u16::from_be_bytes)
}

/// The datagram of a plain packet on `lo`, or the segment.
#[inline(always)]
pub(super) fn plain_on_loopback<I: Parse>(
    ctx: &TcContext,
    protocol: Protocol,
) -> Option<Segment<I::Address>> {
    I::plain(&LoopbackSkb(ctx), protocol)
}

/// The linear part of a packet on `lo`.
struct LoopbackSkb<'a>(&'a TcContext);

const ETHERNET_HEADER: usize = 14;

impl Packet for LoopbackSkb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = self.0.data() + ETHERNET_HEADER + offset as usize;
        // SAFETY: the bytes are inside the packet.
        (start + N <= self.0.data_end()).then(|| unsafe { (start as *const [u8; N]).read_unaligned() })
    }

    #[inline(always)]
    fn ether_type(&self) -> u16 {
        Skb(self.0).ether_type()
    }
}
