//! The agent's side: tells every connected proxy which pods to serve.
//!
//! There is no queue of messages. The agent keeps one set of pods it wants served ([`Handle::add`], [`Handle::remove`]),
//! the server keeps for each connection what that proxy has been told, and each connection's task sends the difference,
//! one request at a time. The snapshot for a new proxy, live updates, a replaced namespace, the retry of a refused pod
//! and the take-over by an older proxy are all that same difference, and memory is bounded by pods × connections.
//!
//! Several proxies are connected during an upgrade. A new pod goes to the newest only, a removal to all that know the
//! pod. When the newest leaves, the next-newest is told what it missed.
//!
//! # What ztunnel does
//!
//! From its `src/inpod/workloadmanager.rs` and `statemanager.rs`; the rules in `desired.rs` rest on it.
//!
//! - It answers an `Add` with an error if it cannot open its listeners in the pod, keeps connection and pod, and tries
//!   again by itself every 5 s for as long as the connection lives. It never reports that a later attempt succeeded.
//! - An `Add` of a pod it serves, with the same namespace (same device and inode), does nothing and is acknowledged; the
//!   `WorkloadInfo` in it is ignored. An `Add` of a refused pod is one more attempt, and replaces what its own retries
//!   use. So repeating an `Add` harms nothing, and is the only way to learn that a refused pod is served by now.
//! - An `Add` of a pod it serves, with another namespace, drops the old one first.
//! - `SnapshotSent` drops what it serves and was not told of since the connection began. It does not drop what was
//!   refused and is still being retried: only `Del` does.
//! - `Del` of an unknown pod is acknowledged.
//! - An `Add` without `WorkloadInfo`, a `Keep` after the snapshot, a second `SnapshotSent` end the proxy's process. A
//!   packet it cannot read is answered with an error and followed by a new connection.
//! - When the agent closes a connection after the hello, it reconnects at once, without any pause.

mod connection;
mod desired;
mod handle;
mod listener;
mod options;
mod peer;
mod serve;
mod shared;
mod workload;

#[cfg(test)]
mod tests;

pub use handle::{AddError, Announcement, Handle, RemoveOutcome};
pub use options::{AdmitError, Event, OnConnect, Options, Recorder};
pub use peer::Peer;
pub use redirect_linux::socket_file::BindError;
pub use serve::Server;
pub use shared::{PodProxyState, ProxyState};
pub use workload::{InvalidWorkload, Workload};
