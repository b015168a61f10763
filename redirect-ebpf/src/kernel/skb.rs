//! A packet at a TC hook, as [`redirect_ebpf::packet`] wants to read it.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::packet::{Packet, Parse, Parsed, parse};

/// Offsets count from the network header, because devices without Ethernet headers (tun, WireGuard) exist in pods too.
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
        // SAFETY: every TC context has `len`. It stays the same, which the verifier does not know.
        let length = || unsafe { (&raw const (*self.0.skb.skb).len).read_volatile() };
        number ^ length() ^ length()
    }
}

/// Reads a packet on `lo`, which has an Ethernet header: where it is, without a call of the kernel, if it is plain.
#[inline(always)]
pub(super) fn parse_on_loopback<I: Parse>(ctx: &TcContext) -> Parsed<I::Address> {
    match I::plain(&LoopbackSkb(ctx)) {
        Some(segment) => Parsed::Tcp(segment),
        None => parse::<I>(&Skb(ctx)),
    }
}

/// The first piece of a packet on `lo`.
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
