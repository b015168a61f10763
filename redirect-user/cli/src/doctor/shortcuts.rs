//! Finds programs that bypass those of placement `node` on the way to a pod.

use nix::net::if_::if_nametoindex;
use redirect_datapath::linux;
use redirect_ebpf::constants::INGRESS_DEVICE;

use super::{Check, Requirements};

const NAME: &str = "shortcuts to pods";

/// Only if an agent of that placement has its ingress device: in placement `pod` the programs are in the pod.
pub(super) fn check(_: &Requirements) -> Vec<Check> {
    if if_nametoindex(INGRESS_DEVICE).is_err() {
        return Vec::new();
    }
    let programs = match linux::shortcuts() {
        Ok(programs) => programs,
        Err(error) => {
            return vec![Check::warn(
                NAME,
                format!("the TC programs of this node can't be read: {error}"),
                "run it as root; sysctl kernel.kptr_restrict=1 at most",
            )];
        }
    };
    if programs.is_empty() {
        return vec![Check::ok(NAME, "no TC program of the node calls bpf_redirect_peer")];
    }
    vec![Check::broken(
        NAME,
        format!(
            "TC programs call bpf_redirect_peer: {}. A connection that they redirect to an enrolled pod skips the node proxy, and \
             fails: the pod's answers are dropped (past_pod)",
            programs.join("; ")
        ),
        "run the agent with --placement pod, or have the CNI plugin use the host's routing (Cilium: bpf.hostLegacyRouting)",
    )]
}
