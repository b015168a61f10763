//! TC ingress of the host end of an enrolled pod's device, placement `pod`: the gate that is out of the pod's reach.
//!
//! Inside the pod's namespace a process with `CAP_NET_RAW` can send frames that skip the pod's TC programs, and one with
//! `CAP_NET_ADMIN` can attach filters before them or move the device away. A packet keeps its socket across the veth pair, so
//! this program still sees the sender's cgroup. It passes the proxy's TCP and exempt TCP, and drops other TCP.

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

/// One program for both families, because it runs for every packet that a pod sends.
#[classifier]
pub(crate) fn host_gate(ctx: TcContext) -> i32 {
    // Nearly every packet is the proxy's.
    if proxies::sent(&ctx) {
        return Action::Continue.into();
    }
    match gate::<Ipv4>(&ctx) {
        // VLAN tags hide the family.
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
    // The device has no entry while the pod is being enrolled.
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
                // Under a SYN flood the kernel attaches no socket to its SYN-ACKs (SYN cookies). An application's SYN-ACK has a
                // socket, and so has a frame from a packet socket.
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
        // It may open a connection; the flags are in another fragment. TCP itself never sends such packets.
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
    /// Whether a segment that opens no connection may leave, whatever its sender. Connections that were open when the pod was
    /// enrolled continue. A segment without data may be the kernel's own answer for a socket that is gone, possibly the proxy's.
    #[inline(always)]
    pub(super) fn lets_go<A: Copy>(&self, ctx: &TcContext, segment: &Segment<A>) -> bool {
        !segment.accepts()
            && (segment.resets()
                || self.flags.contains(PodFlags::EARLIER_CONNECTIONS)
                || !carries_data(ctx, segment))
    }

    /// Whether the client of this reply may connect to the pod past the proxy.
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

    /// Whether an exemption covers the client, or the client is the kubelet, whose socket is in the host's
    /// namespace.
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
