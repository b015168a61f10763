//! TC ingress of the host's end of an enrolled pod's device, placement `pod`: the gate that nothing in the pod can reach.
//!
//! Inside the pod's namespace a process with `CAP_NET_RAW` sends frames that no TC program of the pod sees, and one with
//! `CAP_NET_ADMIN` attaches filters before ours or moves the device away. A packet's socket survives the veth pair, so here it still
//! tells the cgroup that sent it. TCP of the proxy passes, and so does what an exemption lets pass. The rest is dropped.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_ebpf::decide;
use redirect_ebpf::diagnostics::Hook;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::maps::{ConfigFlags, PodFlags};
use redirect_ebpf::packet::{Packet as _, Parse, Parsed, Segment, is_of_another_family, parse};

use super::capture::Action;
use super::config;
use super::counters::count;
use super::diagnostics;
use super::exclusions::{ExcludedIp, excluded};
use super::flows::{self, About};
use super::half_open;
use super::pods::{self, PodIp};
use super::probe::is_for_probe;
use super::proxies;
use super::skb::Skb;

/// One program for both families: it costs every packet that a pod sends.
#[classifier]
pub(crate) fn host_gate(ctx: TcContext) -> i32 {
    // Nearly every packet is the proxy's.
    if proxies::sent(&ctx) {
        return Action::Continue.into();
    }
    match gate::<Ipv4>(&ctx) {
        // The tags of a VLAN hide the family.
        Action::Continue => gate::<Ipv6>(&ctx).into(),
        action => action.into(),
    }
}

#[inline(always)]
fn gate<I: Parse + PodIp + ExcludedIp>(ctx: &TcContext) -> Action {
    if is_of_another_family::<I>(&Skb(ctx)) {
        return Action::Continue;
    }
    // SAFETY: every TC context has `ifindex`.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    // Nobody's while the pod is being enrolled.
    let Some((cookie, flags)) = pods::behind(interface) else { return Action::Continue };
    if flags.contains(PodFlags::ON_HOST) {
        return Action::Continue;
    }
    match parse::<I>(&Skb(ctx)) {
        Parsed::NotOurs | Parsed::Datagram(_) => Action::Continue,
        Parsed::Unknown => {
            diagnostics::malformed::<I>(ctx, Hook::HostGate);
            count(I::FAMILY, Direction::Outbound, Verdict::Dropped, Reason::Malformed, Some(cookie), || {
                About::unread(ctx)
            });
            Action::Drop
        }
        Parsed::Tcp(segment) => {
            let direction = if segment.accepts() { Direction::Inbound } else { Direction::Outbound };
            let pod = Pod { cookie, flags };
            let passes = if segment.opens() {
                pod.exempts_outbound::<I>(&segment) || half_open::opened_before(ctx, pod.flags)
            } else if segment.accepts() {
                // Under a SYN flood the kernel attaches no socket to its answers (SYN cookies). An application's answer has one,
                // and so has a frame of its own.
                proxies::has_no_sender(ctx)
                    || pod.exempts_inbound::<I>(ctx, &segment)
                    || half_open::answers_before(ctx, pod.flags)
            } else {
                pod.lets_go(ctx, &segment)
                    || pod.exempts_outbound::<I>(&segment)
                    || pod.exempts_inbound::<I>(ctx, &segment)
            };
            pod.conclude::<I>(ctx, &segment, passes, direction, Reason::PastPod)
        }
        // It may open a connection, and nobody can tell; but TCP itself never sends such.
        Parsed::Fragment(segment) => {
            let pod = Pod { cookie, flags };
            let passes = pod.exempts_outbound::<I>(&segment);
            pod.conclude::<I>(ctx, &segment, passes, Direction::Outbound, Reason::Fragmented)
        }
    }
}

/// The pod behind the device.
pub(super) struct Pod {
    pub(super) cookie: u64,
    pub(super) flags: PodFlags,
}

impl Pod {
    /// Whether a segment that opens no connection may leave, whoever sends it. A connection that was open when the pod was enrolled
    /// goes on. What carries nothing may be the kernel's own answer in the name of a socket that is gone, also of the proxy's.
    #[inline(always)]
    pub(super) fn lets_go<A: Copy>(&self, ctx: &TcContext, segment: &Segment<A>) -> bool {
        !segment.accepts()
            && (segment.resets()
                || self.flags.contains(PodFlags::EARLIER_CONNECTIONS)
                || !carries_data(ctx, segment))
    }

    /// Whether the client that a segment answers may have a connection to the pod, past the proxy.
    #[inline(always)]
    pub(super) fn exempts_client<I: ExcludedIp>(&self, segment: &Segment<I::Address>) -> bool {
        let (peer, port) = (segment.destination, segment.source_port);
        self.flags.contains(PodFlags::BYPASS_INBOUND)
            || excluded::<I>(self.cookie, self.flags, Direction::Inbound, peer, port)
    }

    /// Whether the connect hooks let a connection to this destination pass.
    #[inline(always)]
    fn exempts_outbound<I: Parse + ExcludedIp>(&self, segment: &Segment<I::Address>) -> bool {
        let (peer, port) = (segment.destination, segment.destination_port);
        decide::is_exempt::<I>(peer, config::flags().contains(ConfigFlags::LINK_LOCAL), || {
            excluded::<I>(self.cookie, self.flags, Direction::Outbound, peer, port)
        })
    }

    /// The same, and the kubelet, whose socket is the host's.
    #[inline(always)]
    fn exempts_inbound<I: Parse + ExcludedIp>(&self, ctx: &TcContext, segment: &Segment<I::Address>) -> bool {
        self.exempts_client::<I>(segment) || is_for_probe(ctx, segment)
    }

    #[inline(always)]
    fn conclude<I: Parse>(
        &self,
        ctx: &TcContext,
        segment: &Segment<I::Address>,
        passes: bool,
        direction: Direction,
        reason: Reason,
    ) -> Action {
        if passes {
            return Action::Continue;
        }
        count(I::FAMILY, direction, Verdict::Dropped, reason, Some(self.cookie), || {
            About::segment::<I>(segment, flows::sender(ctx))
        });
        Action::Drop
    }
}

/// Whether anything comes after the segment's header. Padding counts.
#[inline(always)]
fn carries_data<A>(ctx: &TcContext, segment: &Segment<A>) -> bool {
    const ETHERNET_HEADER: u32 = 14;
    let Some([length]) = Skb(ctx).load::<1>(segment.transport_offset + 12) else { return true };
    let header = u32::from(length >> 4) * 4;
    // SAFETY: every TC context has `len`.
    let frame = unsafe { (&raw const (*ctx.skb.skb).len).read_volatile() };
    frame > ETHERNET_HEADER + segment.transport_offset + header
}
