//! The embedded node proxy: passes connections of enrolled pods through, as an ambient mesh's proxy would.
//!
//! It follows ztunnel's contract inside pods (placement `pod`): listeners in each pod's network namespace; marked,
//! transparent, dual-stack sockets; the original destination is the accepted socket's local address. In placement `node` it
//! listens once, in the host's namespace, identifies pods by their addresses, and does not connect to the agent. It has no
//! tunnel and no policy: it exists to test and measure the redirection, and for clusters that only want the access log.
//!
//! | file | |
//! |---|---|
//! | `sockets` | sockets of a pod: made in its namespace by one thread, options set here |
//! | `pods` | which pods are served; carries out the agent's requests |
//! | `listener` | one pod's listeners, and its connections until it is removed |
//! | `connection` | one connection: where to, from which address, what came of it |
//! | `clients` | the pod's open inbound connections, whose ports deliveries must avoid |
//! | `relay` | bytes both ways |
//! | `quotas` | what each pod may have of what all share |
//! | `resolver` | DNS questions of the pod |
//! | `access_log` | lines about connections and questions, written by a thread of their own |
//! | `run` | options, signals, the end |

mod access_log;
mod clients;
mod connection;
mod context;
mod listener;
mod pods;
mod quotas;
mod relay;
mod resolver;
mod run;
mod sockets;

#[cfg(test)]
mod tests;

pub use run::{Options, OriginalDestination, run};

use std::sync::Arc;
use std::time::Duration;

use access_log::AccessLog;
use redirect_protocol::placement::Placement;
use resolver::Upstreams;
use sockets::Namespaces;

/// The state shared by all pods.
#[derive(Clone, Debug)]
struct Shared {
    namespaces: Namespaces,
    access_log: Option<AccessLog>,
    ipv6: bool,
    original_destination: OriginalDestination,
    placement: Placement,
    /// The upstream DNS servers.
    upstreams: Arc<Upstreams>,
    /// The pause before another attempt to open a pod's listeners.
    retry: Duration,
}

/// A pod's identity, for messages and the access log.
#[derive(Debug)]
struct Identity {
    /// `namespace/name`.
    name: Arc<str>,
    uid: Arc<str>,
}

/// The direction of a connection, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    Outbound,
    Inbound,
}

impl Direction {
    fn port(self) -> u16 {
        match self {
            Self::Outbound => redirect_ebpf::constants::PORT_OUTBOUND,
            Self::Inbound => redirect_ebpf::constants::PORT_INBOUND,
        }
    }
}

/// The transport of a query, in which it is also forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Transport {
    Udp,
    Tcp,
}
