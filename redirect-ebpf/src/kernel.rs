//! One file per hook:
//!
//! | file | hook | what it is for |
//! |---|---|---|
//! | [`outbound`] | cgroup/connect4, connect6 | marks outbound connections for capture |
//! | [`loopback`] | TC ingress of the pod's `lo` | gives captured connections to the proxy |
//! | [`inbound`] | TC ingress of the pod's other interfaces | gives inbound connections to the proxy |
//! | [`virtual_interface`] | TC ingress of interfaces that a pod declares | gives connections from behind them to the proxy |
//! | [`egress`] | TC egress of the pod's other interfaces | stops what would leave past the proxy |
//! | [`lookup`] | sk_lookup of the pod's namespace | what TC can't give to a listener itself |
//! | [`listeners`] | sock_ops of the root cgroup | notes the proxies' listeners where TC can't |
//! | [`bind`] | cgroup/bind4, bind6 | guards the proxy's ports |
//! | [`dns`] | cgroup/sendmsg, recvmsg, getpeername, 4 and 6 | sends DNS questions to the proxy's resolver |
//! | [`from_pod`] | TC ingress of the host's end of the pod's device, placement `node` | sends what the proxy is to get to the entrance |
//! | [`to_pod`] | TC egress of the same | the same |
//! | [`entrance`] | TC ingress of a device of ours in the host's namespace, placement `node` | gives connections to the proxy |
//! | [`probe`] | sock_ops of the kubelet's cgroup | notes the kubelet's probes |
//!
//! What they share: maps ([`config`], [`pods`], [`proxies`], [`exclusions`], [`counters`], [`flows`]), the log
//! ([`diagnostics`]), reading of contexts ([`context`], [`sock_addr`], [`skb`]), looking sockets up ([`socket`]), giving a packet to a
//! listener ([`steer`]), and, in placement `node`, changing packets ([`rewrite`]) and refusing connections ([`refuse`]).

#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a context's field is addressed and read in one step, which the lint takes for two"
)]

mod bind;
mod config;
mod context;
mod cookies;
mod counters;
mod diagnostics;
mod dns;
mod egress;
mod entrance;
mod exclusions;
mod flows;
mod from_pod;
mod inbound;
mod listeners;
mod lookup;
mod loopback;
mod outbound;
mod pods;
mod probe;
mod proxies;
mod refuse;
mod rewrite;
mod skb;
mod sock_addr;
mod socket;
mod steer;
mod to_pod;
mod virtual_interface;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program in which this can be reached; `core` wants it to exist all the same.
    loop {}
}

// `bpf_sk_assign`, `bpf_fib_lookup` and others are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
