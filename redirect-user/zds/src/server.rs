//! The agent's side: tells every connected proxy which pods to serve.
//!
//! There is no queue of messages. The agent maintains one set of wanted pods ([`Handle::add`], [`Handle::remove`]), the
//! server remembers what it has sent on each connection, and each connection's task sends the difference, one request at
//! a time. The snapshot for a new proxy, live updates, a replaced namespace, the retry of a refused pod and the fallback
//! to an older proxy are all the same difference, and memory is bounded by pods × connections.
//!
//! Several proxies are connected during an upgrade. A new pod goes to the newest only, a removal to all that know the
//! pod. When the newest disconnects, the next-newest gets what it missed.
//!
//! # What ztunnel does
//!
//! From its `src/inpod/workloadmanager.rs` and `statemanager.rs`. The rules in `desired.rs` rely on it.
//!
//! - It answers an `Add` with an error if it cannot open its listeners in the pod, keeps connection and pod, and
//!   retries every 5 s for as long as the connection lives. It never reports that a later attempt succeeded.
//! - An `Add` of a pod that it serves in the same namespace (same device and inode) is acknowledged without effect; its
//!   `WorkloadInfo` is ignored. An `Add` of a refused pod is another attempt, and replaces the data of ztunnel's own
//!   retries. So repeating an `Add` is harmless, and the only way to learn that a refused pod is served by now.
//! - An `Add` of a pod that it serves in another namespace drops the old one first.
//! - `SnapshotSent` drops the pods that it serves and that were not mentioned since the connection began. It does
//!   not drop refused pods that it still retries: only `Del` does.
//! - `Del` of an unknown pod is acknowledged.
//! - An `Add` without `WorkloadInfo`, a `Keep` after the snapshot, and a second `SnapshotSent` end the proxy's
//!   process. It answers a packet that it can't parse with an error, and reconnects.
//! - When the agent closes a connection after the hello, it reconnects at once, without a pause.

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
