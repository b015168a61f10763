//! The protocol between agent and node proxy: Istio's ZDS, as ztunnel implements it.
//!
//! `AF_UNIX`, `SOCK_SEQPACKET`, one protobuf message per packet. The agent listens, the proxy connects and sends
//! [`Hello`]; from then on the agent sends one [`WorkloadRequest`] at a time and waits for its [`WorkloadResponse`].
//! Source: `pkg/zdsapi` of istio/istio, `src/inpod` of istio/ztunnel.

pub mod client;
pub mod messages;
pub mod packet;
pub mod server;

pub use messages::{Hello, WorkloadRequest, WorkloadResponse};

/// ztunnel's default path of the agent's socket.
pub const DEFAULT_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";

/// The largest packet of either side, in bytes: ztunnel reads into a buffer of this size.
pub const MAX_PACKET: usize = 1024;
