//! What is told to developers of things that should not occur, where the agent's log is to have it.
//!
//! | map | type | value |
//! |---|---|---|
//! | `DIAGNOSTICS` | per-CPU array of one | [`FlowState`](crate::flow::FlowState): how many there were, and how many were one too many |
//!
//! The ring buffer is aya-log's (`AYA_LOGS`), and so is the level at which it is on (`AYA_LOG_LEVEL`).

use crate::count::counted;
use crate::flow::FlowLimits;

/// The module whose level in the agent's log turns them on.
pub const TARGET: &str = "redirect_ebpf";

/// How many are told of on each CPU: whoever sends malformed packets must not fill the node's log.
pub const LIMITS: FlowLimits = FlowLimits { one_of: 1, rate: 10 };

/// How many numbers a record has: [`Fault`], [`Hook`], [`Family`](crate::Family), and four that depend on the hook, in the
/// order of the arguments of `kernel::diagnostics::tell`.
pub const NUMBERS: usize = 7;

counted! {
    /// What went wrong.
    Fault {
        /// A packet's headers end too early, or never end. The error: what the kernel says of the last byte that they have
        /// at least.
        Malformed = "malformed packet",
        /// A socket did not take its mark.
        Mark = "a socket refuses its mark",
        /// The kernel does not give a connection to the proxy's listener, or has no room to note who is to have it.
        Assign = "a listener can't be assigned",
        /// A socket can't be freed from its interface.
        Interface = "a socket can't leave its interface",
        /// The kernel has no memory to keep something with a socket.
        Storage = "nothing can be kept with a socket",
        /// A packet can't be changed.
        Rewrite = "a packet can't be changed",
        /// A probe of the kubelet can't be noted.
        Probe = "a probe can't be noted",
    }
}

counted! {
    /// Where: the programs of both families.
    Hook {
        /// On their way out, at `connect()`.
        Outbound = "outbound",
        /// DNS questions.
        Dns = "dns",
        /// On `lo`, and on the interfaces that a pod declares.
        Loopback = "loopback",
        /// On their way in.
        Inbound = "inbound",
        /// At the last gate.
        Egress = "egress",
        /// What a pod sends, at the host's end of its device.
        FromPod = "from_pod",
        /// What is sent to a pod, at the same.
        ToPod = "to_pod",
        /// At the kubelet's sockets.
        Probe = "probe",
    }
}
