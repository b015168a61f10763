//! The drop log: individual outcomes that should not occur. For developers; off unless the agent's log level
//! enables it.
//!
//! | map | type | value |
//! |---|---|---|
//! | `DIAGNOSTICS` | per-CPU array of one | [`FlowState`](crate::flow::FlowState): entries written, and entries lost to the limit |
//!
//! The ring buffer (`AYA_LOGS`) and the level (`AYA_LOG_LEVEL`) are aya-log's.

use crate::count::counted;
use crate::flow::FlowLimits;

/// The log target that enables it.
pub const TARGET: &str = "redirect_ebpf";

/// The limit per CPU, so that malformed packets can't flood the node's log.
pub const LIMITS: FlowLimits = FlowLimits { one_of: 1, rate: 10 };

/// The number of values in an entry: [`Fault`], [`Hook`], [`Family`](crate::Family), and four that depend on the hook, in
/// the order of the arguments of `kernel::diagnostics::tell`.
pub const NUMBERS: usize = 7;

counted! {
    /// What went wrong.
    Fault {
        /// A packet's headers are truncated, or chained too deeply. The error is the result of loading the last byte of the
        /// shortest possible headers.
        Malformed = "malformed packet",
        /// A socket refused its mark.
        Mark = "a socket refuses its mark",
        /// The kernel refused to assign a connection to the proxy's listener, or the map of handed-over connections is full.
        Assign = "a listener can't be assigned",
        /// A socket can't be unbound from its interface.
        Interface = "a socket can't leave its interface",
        /// The kernel has no memory for socket storage.
        Storage = "nothing can be kept with a socket",
        /// A packet can't be changed.
        Rewrite = "a packet can't be changed",
        /// A probe of the kubelet can't be recorded.
        Probe = "a probe can't be noted",
    }
}

counted! {
    /// The hook, for the programs of both families.
    Hook {
        /// `connect()`.
        Outbound = "outbound",
        /// DNS queries.
        Dns = "dns",
        /// `lo`, and the interfaces that a pod declares.
        Loopback = "loopback",
        /// TC ingress of the pod's other interfaces.
        Inbound = "inbound",
        /// The egress guard.
        Egress = "egress",
        /// Packets from a pod, at the host end of its device.
        FromPod = "from_pod",
        /// Packets to a pod, at the host end of its device.
        ToPod = "to_pod",
        /// The kubelet's sockets.
        Probe = "probe",
        /// Packets from a pod, at the gate on the host end of its device.
        HostGate = "host_gate",
    }
}
