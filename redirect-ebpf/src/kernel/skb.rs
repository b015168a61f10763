//! A packet at a TC hook, as [`redirect_ebpf::packet`] wants to read it.

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::packet::Packet;

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
}
