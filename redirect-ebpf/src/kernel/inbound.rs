//! TC ingress of every interface of an enrolled pod but `lo`: connections from outside go to the proxy's inbound
//! listener.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_fib_lookup as Params;
use aya_ebpf::helpers::bpf_fib_lookup;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::PORT_INBOUND;
use redirect_ebpf::count::{Direction, Reason};
use redirect_ebpf::decide::{self, Inbound};
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ip, Ipv4, Ipv6};
use redirect_ebpf::maps::PodFlags;
use redirect_ebpf::packet::{Parse, Segment, address_family};

use super::capture::{Route, capture};
use super::exclusions::{ExcludedIp, excluded};
use super::pods::{self, PodIp};
use super::probe::is_probe;

#[classifier]
pub(crate) fn inbound_ipv4(ctx: TcContext) -> i32 {
    inbound::<Ipv4>(&ctx)
}

#[classifier]
pub(crate) fn inbound_ipv6(ctx: TcContext) -> i32 {
    inbound::<Ipv6>(&ctx)
}

struct FromOutside;

impl<I: Parse + PodIp + ExcludedIp + Fib> Route<I> for FromOutside {
    const DIRECTION: Direction = Direction::Inbound;
    const PORT: u16 = PORT_INBOUND;
    const GATED: bool = true;
    const HOOK: Option<Hook> = Some(Hook::Inbound);

    #[inline(always)]
    fn decide(ctx: &TcContext, segment: &Segment<I::Address>) -> Inbound {
        let cookie = I::owner(&segment.destination);
        let flags = cookie.and_then(pods::flags);
        if flags.is_some_and(|flags| flags.contains(PodFlags::ON_HOST)) {
            return Inbound::Pass(Reason::OtherTraffic);
        }
        let excluded = || {
            let (cookie, flags) = (cookie.unwrap_or_default(), flags.unwrap_or_default());
            excluded::<I>(cookie, flags, Direction::Inbound, segment.source, segment.destination_port)
        };
        let port = u16::from_be_bytes(segment.destination_port);
        decide::inbound(port, flags, || is_probe(ctx), excluded, || forwarded::<I>(ctx, segment))
    }

    #[inline(always)]
    fn pod(segment: &Segment<I::Address>) -> I::Address {
        segment.destination
    }
}

#[inline(always)]
fn inbound<I: Parse + PodIp + ExcludedIp + Fib>(ctx: &TcContext) -> i32 {
    capture::<I, FromOutside>(ctx).into()
}

/// A family with its part of `struct bpf_fib_lookup`.
trait Fib: Ip {
    fn addresses(params: &mut Params, source: Self::Address, destination: Self::Address);
}

impl Fib for Ipv4 {
    #[inline(always)]
    fn addresses(params: &mut Params, source: [u8; 4], destination: [u8; 4]) {
        params.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(source);
        params.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(destination);
    }
}

impl Fib for Ipv6 {
    #[inline(always)]
    fn addresses(params: &mut Params, source: [u8; 16], destination: [u8; 16]) {
        params.__bindgen_anon_3.ipv6_src = words(source);
        params.__bindgen_anon_4.ipv6_dst = words(destination);
    }
}

#[inline(always)]
fn words(address: [u8; 16]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}

/// Whether the pod would forward the packet, e.g. to containers inside the pod. Such a packet must not be assigned to
/// a socket: the kernel drops assigned packets when it forwards.
#[inline(always)]
fn forwarded<I: Fib>(ctx: &TcContext, segment: &Segment<I::Address>) -> bool {
    /// `BPF_FIB_LKUP_RET_*`: forwarded; forwarded, without a neighbor entry yet; forwarded, but too long.
    const FORWARDED: [i64; 3] = [0, 7, 8];
    // SAFETY: integers only: zero is a valid value.
    let mut params: Params = unsafe { core::mem::zeroed() };
    params.family = address_family(I::FAMILY);
    params.l4_protocol = 6;
    // SAFETY: every TC context has `ingress_ifindex`.
    params.ifindex = unsafe { (*ctx.skb.skb).ifindex };
    I::addresses(&mut params, segment.source, segment.destination);
    // SAFETY: the parameters live for the length of the call, and their size is right.
    let result =
        unsafe { bpf_fib_lookup(ctx.as_ptr(), &raw mut params, core::mem::size_of::<Params>() as i32, 0) };
    FORWARDED.contains(&result)
}
