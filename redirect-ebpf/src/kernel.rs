//! One file per hook:
//!
//! | file | hook | purpose |
//! |---|---|---|
//! | [`outbound`] | cgroup/connect4, connect6 | marks outbound connections for capture |
//! | [`loopback`] | TC ingress of the pod's `lo` | gives captured connections to the proxy |
//! | [`inbound`] | TC ingress of the pod's other interfaces | gives inbound connections to the proxy |
//! | [`virtual_interface`] | TC ingress of interfaces that a pod declares | gives connections from behind them to the proxy |
//! | [`egress`] | TC egress of the pod's other interfaces | the egress guard: stops what would leave past the proxy |
//! | [`host_gate`] | TC ingress of the host end of the pod's device | drops TCP that neither the proxy sent nor an exemption lets pass |
//! | [`lookup`] | sk_lookup of the pod's namespace | the inbound gate; gives to a listener what TC can't assign |
//! | [`listeners`] | sock_ops of the root cgroup | stores the proxies' listeners where TC can't |
//! | [`bind`] | cgroup/bind4, bind6 | guards the proxy's ports |
//! | [`dns`] | cgroup/sendmsg, recvmsg, getpeername, 4 and 6 | sends DNS queries to the proxy's resolver |
//! | [`from_pod`] | TC ingress of the host end of the pod's device, placement `node` | sends packets for the proxy to the ingress device |
//! | [`to_pod`] | TC egress of the same | the same |
//! | [`ingress_device`] | TC ingress of the ingress device, placement `node` | gives connections to the proxy |
//! | [`probe`] | sock_ops of the kubelet's cgroup | records the kubelet's probes |
//!
//! They share maps ([`config`], [`pods`], [`proxies`], [`exclusions`], [`counters`], [`flows`], [`notes`]), the drop log
//! ([`diagnostics`]), access to contexts ([`context`], [`sock_addr`], [`skb`]), [`atomic`] additions, socket lookups ([`socket`]), the
//! assignment of packets to listeners ([`capture`]), connections that were half open when a pod was captured ([`half_open`]), and in
//! placement `node` changes of packets ([`rewrite`]) and refusals ([`refuse`]).

#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a context's field is addressed and read in one step, which the lint takes for two"
)]

mod atomic;
mod bind;
mod call;
mod capture;
mod config;
mod context;
mod cookies;
mod counters;
mod diagnostics;
mod dns;
mod egress;
mod exclusions;
mod flows;
mod from_pod;
mod half_open;
mod host_gate;
mod inbound;
mod ingress_device;
mod listeners;
mod lookup;
mod loopback;
mod notes;
mod outbound;
mod pods;
mod probe;
mod proxies;
mod refuse;
mod rewrite;
mod skb;
mod sock_addr;
mod socket;
mod to_pod;
mod virtual_interface;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program that can reach this; `core` needs it to exist all the same.
    loop {}
}

// The kernel offers `bpf_sk_assign`, `bpf_fib_lookup` and others to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
