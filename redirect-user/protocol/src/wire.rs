//! The protocol between the agent and its clients: the CNI plugin and the command line.
//!
//! `AF_UNIX`, `SOCK_SEQPACKET`: a packet is a message. A client sends one [`Envelope`] with a [`Request`] and reads
//! [`Reply`] packets until one that is final ([`Reply::is_final`]). Messages are JSON. An `Add` or `Check` carries exactly
//! one file descriptor (`SCM_RIGHTS`): the pod's network namespace.

pub mod client;
pub mod deletions;
mod flows;
mod gc;
mod packet;
#[cfg(feature = "server")]
mod parts;
mod pods;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use flows::{FlowFilter, FlowReport};
pub use packet::{PacketError, decode, encode};

use crate::pod::PodIdentity;

/// The version of this protocol. An agent rejects other versions with [`ErrorKind::Version`].
pub const VERSION: u16 = 1;

/// The agent's default socket.
pub const DEFAULT_SOCKET: &str = "/run/ambient-redirect/agent.sock";

/// The largest packet of either side, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// The maximum number of attachments in a [`Request::Gc`]. `--max-pods`, the capacity of a node's maps, can't be larger.
pub const MAX_ATTACHMENTS: usize = 65_536;

/// A message with its sender's protocol version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// See [`VERSION`].
    pub version: u16,
    /// The message.
    pub body: T,
}

/// One attachment of a sandbox to a network: what CNI calls a container ID and an interface name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub interface: String,
}

/// A request to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Captures this pod if it is to be enrolled, and answers when the kernel captures it and the proxy serves
    /// it. Carries the namespace's descriptor. Answered by [`Reply::Added`].
    Add {
        /// The new attachment.
        attachment: Attachment,
        /// The pod's identity.
        pod: PodIdentity,
        /// Its addresses, as reported by the previous plugins.
        addresses: Vec<IpAddr>,
        /// The runtime's path of its network namespace.
        #[serde(default)]
        netns_path: Option<PathBuf>,
    },
    /// Removes this attachment; succeeds if it is already removed. Answered by [`Reply::Done`].
    Del {
        /// The removed attachment.
        attachment: Attachment,
    },
    /// Compares the kernel with the state that `Add` established. Carries the namespace's descriptor. Answered by
    /// [`Reply::Done`].
    Check {
        /// The attachment.
        attachment: Attachment,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// Removes every attachment that is neither in this list nor in the parts before it. Answered by
    /// [`Reply::Done`].
    Gc {
        /// The attachments that the runtime still knows.
        valid: Vec<Attachment>,
    },
    /// The beginning of a list that does not fit in one packet. Other parts and a [`Request::Gc`] follow, with at
    /// most [`MAX_ATTACHMENTS`] attachments in all. A separate request, so that no agent mistakes a part for the
    /// whole list.
    GcPart {
        /// A part of the attachments that the runtime still knows.
        valid: Vec<Attachment>,
    },
    /// Asks whether the agent is ready for `Add`. Answered by [`Reply::Done`].
    Ready,
    /// Reads the agent's status. Answered by [`Reply::Status`].
    Status,
    /// Lists the pods that the agent knows. Answered by [`Reply::Pods`], several times if they do not fit in
    /// one packet.
    Pods,
    /// Reads the kernel's state of one pod. Answered by [`Reply::Pod`].
    Pod {
        /// Its UID, its name, or its namespace and name.
        name: String,
    },
    /// Explains the decision on a connection. Answered by [`Reply::Explained`].
    Explain {
        /// The pod that makes it, as in [`Request::Pod`].
        from: String,
        /// Its destination.
        to: SocketAddr,
        /// Its protocol.
        transport: Transport,
    },
    /// Streams decisions on connections until the client disconnects. Answered by a series of [`Reply::Flows`]: the first
    /// one is empty, and no event is missed after it.
    Monitor {
        /// The filter for events.
        filter: FlowFilter,
    },
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Request {
    /// Whether the request carries the descriptor of a network namespace.
    #[must_use]
    pub fn carries_netns(&self) -> bool {
        matches!(self, Self::Add { .. } | Self::Check { .. })
    }
}

/// A reply of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The pod is captured, or does not have to be.
    Added {
        /// Whether the pod is enrolled.
        enrolled: bool,
    },
    /// The request is complete.
    Done,
    /// See [`Request::Status`].
    Status(Box<Status>),
    /// See [`Request::Pods`].
    Pods {
        /// Some of the pods.
        pods: Vec<PodReport>,
        /// Whether another packet follows.
        more: bool,
    },
    /// See [`Request::Pod`].
    Pod(Box<PodDetail>),
    /// See [`Request::Explain`].
    Explained(Box<Explanation>),
    /// See [`Request::Monitor`].
    Flows {
        /// Events.
        flows: Vec<FlowReport>,
        /// The number of events that the client missed because it read too slowly.
        lost: u64,
    },
    /// The request failed.
    Error(Error),
}

impl Reply {
    /// Whether no other packet follows this one.
    #[must_use]
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Pods { more: true, .. } | Self::Flows { .. })
    }
}

/// An error of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind of error.
    pub kind: ErrorKind,
    /// What happened to which pod and family, and the remedy.
    pub message: String,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Kinds of [`Error`]; the plugin maps them to the error codes of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The two sides speak different versions of this protocol.
    Version,
    /// The request could not be parsed.
    Malformed,
    /// The caller is neither root nor the agent's own user.
    Denied,
    /// A later attempt may succeed, e.g. when the proxy is connected.
    TryAgain,
    /// The attachment is unknown.
    Unknown,
    /// The kernel's state differs from the desired one (`Check`).
    Mismatch,
    /// The kernel refused, or a map is full.
    Datapath,
    /// The proxy refused the pod.
    Proxy,
    /// Anything else.
    Internal,
}

impl ErrorKind {
    /// The label in metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Malformed => "malformed",
            Self::Denied => "denied",
            Self::TryAgain => "try_again",
            Self::Unknown => "unknown",
            Self::Mismatch => "mismatch",
            Self::Datapath => "datapath",
            Self::Proxy => "proxy",
            Self::Internal => "internal",
        }
    }
}

/// The agent's status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The agent's process ID.
    pub pid: u32,
    /// Seconds since the agent started.
    pub uptime: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The cgroup2 directory that the outbound programs are attached to.
    pub cgroup: String,
    /// Whether TC programs are attached by tcx links (else clsact filters).
    pub tcx: bool,
    /// The kernel features that the agent found when it started, by trying.
    #[serde(default)]
    pub features: Vec<FeatureReport>,
    /// The loaded programs.
    pub programs: Vec<ProgramReport>,
    /// The maps.
    pub maps: Vec<MapReport>,
    /// The connected node proxies, newest first.
    pub proxies: Vec<ProxyReport>,
    /// Counters of connections that are not zero.
    pub counters: Vec<CounterReport>,
    /// Counters of repairs that are not zero.
    #[serde(default)]
    pub repairs: Vec<RepairReport>,
    /// The state of connection events.
    #[serde(default)]
    pub flows: FlowStatus,
}

/// The state of connection events ([`Request::Monitor`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// The number of monitors. The kernel side reports events only while there are any.
    pub listeners: usize,
    /// Events lost to the rate limit.
    pub rate_limit: u64,
    /// Events lost because the agent read too slowly.
    pub ring_full: u64,
    /// Events lost because a monitor read too slowly.
    pub slow_listener: u64,
}

/// A feature of the kernel or the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureReport {
    /// Its name, as in `redirect doctor`.
    pub name: String,
    /// The finding.
    pub found: String,
}

/// Repairs of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReport {
    /// The label of its kind.
    pub kind: String,
    /// The number of repairs.
    pub repairs: u64,
}

/// A loaded program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramReport {
    /// Its name in the kernel.
    pub name: String,
    /// Its ID in the kernel, as bpftool shows it.
    pub id: u32,
    /// How many times it is attached.
    pub links: usize,
}

/// A map's fill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapReport {
    /// Its name in the kernel.
    pub name: String,
    /// Entries in use.
    pub entries: usize,
    /// Entries it can hold.
    pub capacity: u32,
}

/// A connected node proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyReport {
    /// Its process ID.
    pub pid: u32,
    /// Its cgroup v2 path, if it has one.
    pub cgroup: Option<String>,
    /// Whether it acknowledged the end of its snapshot.
    pub synced: bool,
    /// The number of pods that it acknowledged.
    pub acknowledged: usize,
    /// The pods that it refused, with the reasons.
    pub refused: Vec<(String, String)>,
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterReport {
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// See [`redirect_ebpf::Direction`].
    pub direction: String,
    /// See [`redirect_ebpf::Verdict`].
    pub verdict: String,
    /// See [`redirect_ebpf::Reason`].
    pub reason: String,
    /// The number of connections.
    pub connections: u64,
}

/// The kernel's state of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodDetail {
    /// The agent's report.
    pub report: PodReport,
    /// The expected facts and their states.
    pub expectations: Vec<Expectation>,
}

/// A fact that is expected for a pod, or that is surplus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expectation {
    /// A description.
    pub what: String,
    /// Its state.
    pub state: FactState,
}

/// The state of a fact in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactState {
    /// It holds.
    Present,
    /// It does not hold.
    Missing,
    /// It is detached, without its pin, or of another build.
    Damaged,
    /// It exists, but is not wanted.
    Surplus,
    /// It does not exist, and the node proxy does not need it.
    Unused,
}

/// The decision on a connection, explained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The pod that opens it.
    pub pod: PodIdentity,
    /// Its destination.
    pub to: SocketAddr,
    /// Its protocol.
    pub transport: Transport,
    /// `IPv4` or `IPv6`: that of the packets.
    pub family: String,
    /// The steps to the decision.
    pub steps: Vec<Step>,
    /// Whether the node proxy gets it.
    pub captured: bool,
    /// The outcome, in words.
    pub verdict: String,
    /// Problems on its way, in order.
    pub wrong: Vec<String>,
    /// Possible problems that the agent can't verify.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A lookup by the kernel side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The question.
    pub question: String,
    /// Its result.
    pub answer: bool,
}

/// The agent's report on one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodReport {
    /// Its identity.
    pub pod: PodIdentity,
    /// Its attachments.
    pub attachments: Vec<Attachment>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// The families that are captured: `IPv4`, `IPv6`.
    pub captured: Vec<String>,
    /// The interfaces whose inbound connections are captured.
    pub interfaces: Vec<String>,
    /// Devices of the host that led to the pod until their other ends were moved into another namespace. TCP from there that is
    /// not the proxy's is dropped.
    #[serde(default)]
    pub strayed: Vec<String>,
    /// Interfaces without a host gate.
    #[serde(default)]
    pub unguarded: Vec<String>,
    /// The pod's state.
    pub state: PodState,
    /// Whether the newest proxy acknowledged the pod; otherwise its error, or that no proxy is connected.
    pub proxy: Result<(), String>,
    /// Seconds since the pod was enrolled.
    pub since: u64,
    /// Counters of its connections and DNS queries since then that are not zero.
    #[serde(default)]
    pub counters: Vec<PodCounter>,
}

/// One counter of a pod. The node proxy's own connections are not counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodCounter {
    /// `IPv4` or `IPv6`: that of the packets.
    pub family: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// See [`redirect_ebpf::Verdict`].
    pub verdict: String,
    /// The number of connections.
    pub connections: u64,
}

/// The state of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// The kernel captures the pod, and the node proxy serves it.
    Captured,
    /// The kernel captures the pod, but the node proxy does not serve it: connections wait, or are refused.
    Waiting,
    /// The last observation found the kernel's state incomplete; the agent retries.
    Broken,
    /// Its new connections go directly; those that the node proxy has may end, and then the pod is un-enrolled.
    Leaving,
}

impl PodState {
    /// The word in tables.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Waiting => "waiting",
            Self::Broken => "broken",
            Self::Leaving => "leaving",
        }
    }
}
