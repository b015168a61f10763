//! TC ingress of interfaces to virtual machines or containers behind the pod, which the pod declares with
//! `istio.io/reroute-virtual-interfaces`: TCP from there counts as outbound and goes to the proxy's outbound listener.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::constants::MARK_CAPTURE;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::packet::{Parse, Parsed, parse};

use super::capture::{Action, capture};
use super::loopback::Captured;
use super::pods::PodIp;
use super::skb::Skb;

#[classifier]
pub(crate) fn virtual_ipv4(ctx: TcContext) -> i32 {
    from_behind::<Ipv4>(&ctx)
}

#[classifier]
pub(crate) fn virtual_ipv6(ctx: TcContext) -> i32 {
    from_behind::<Ipv6>(&ctx)
}

#[inline(always)]
fn from_behind<I: Parse + PodIp>(ctx: &TcContext) -> i32 {
    if !matches!(parse::<I>(&Skb(ctx)), Parsed::Tcp(_) | Parsed::Fragment(_)) {
        return Action::Continue.into();
    }
    // By this mark the pod's policy rule delivers every packet of the connection locally instead of forwarding it.
    ctx.set_mark(MARK_CAPTURE);
    capture::<I, Captured>(ctx).into()
}
