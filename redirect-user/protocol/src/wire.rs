//! What the CNI plugin and the command line say to the agent.
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

/// The version of this protocol. An agent answers another version with [`ErrorKind::Version`].
pub const VERSION: u16 = 1;

/// Where the agent listens by default.
pub const DEFAULT_SOCKET: &str = "/run/ambient-redirect/agent.sock";

/// The largest packet of either side, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// The longest list of attachments that a [`Request::Gc`] may have. `--max-pods`, which says for how many pods a node's maps
/// have room, can't be more.
pub const MAX_ATTACHMENTS: usize = 65_536;

/// A message with the version of the protocol that its sender speaks.
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

/// What is asked of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Capture this pod, if it is to be enrolled; answer when the kernel does and the proxy knows it. Carries the
    /// namespace's descriptor. Answered by [`Reply::Added`].
    Add {
        /// What was attached.
        attachment: Attachment,
        /// Who the pod is.
        pod: PodIdentity,
        /// Its addresses, as the plugins before us reported them.
        addresses: Vec<IpAddr>,
        /// Where the runtime keeps its network namespace.
        #[serde(default)]
        netns_path: Option<PathBuf>,
    },
    /// Forget this attachment. Done already is done. Answered by [`Reply::Done`].
    Del {
        /// What was detached.
        attachment: Attachment,
    },
    /// Compare the kernel with what `Add` promised. Carries the namespace's descriptor. Answered by [`Reply::Done`].
    Check {
        /// What is attached.
        attachment: Attachment,
        /// Its addresses.
        addresses: Vec<IpAddr>,
    },
    /// Forget every attachment that is neither in this list nor in the parts before it. Answered by [`Reply::Done`].
    Gc {
        /// What the runtime still knows.
        valid: Vec<Attachment>,
    },
    /// The beginning of a list that does not fit one packet; other parts and a [`Request::Gc`] follow, with at most
    /// [`MAX_ATTACHMENTS`] attachments in all. A request of its own, so that no agent takes a part for the whole.
    GcPart {
        /// What the runtime still knows, as far as it fits.
        valid: Vec<Attachment>,
    },
    /// Whether the agent is ready to serve `Add`. Answered by [`Reply::Done`].
    Ready,
    /// What the agent is doing. Answered by [`Reply::Status`].
    Status,
    /// The pods that the agent knows. Answered by [`Reply::Pods`], several times if they do not fit one packet.
    Pods,
    /// What is in the kernel for one pod. Answered by [`Reply::Pod`].
    Pod {
        /// Its UID, its name, or its namespace and name.
        name: String,
    },
    /// What becomes of a connection. Answered by [`Reply::Explained`].
    Explain {
        /// The pod that makes it, as in [`Request::Pod`].
        from: String,
        /// Its destination.
        to: SocketAddr,
        /// Its protocol.
        transport: Transport,
    },
    /// Connections as they are decided on, until the client leaves. Answered by [`Reply::Flows`] again and again: an empty
    /// one at first, as soon as nothing is missed any more.
    Monitor {
        /// Which of them.
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

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The pod is captured, or need not be.
    Added {
        /// Whether the pod is enrolled.
        enrolled: bool,
    },
    /// It is as it was asked for.
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
        /// What became of connections.
        flows: Vec<FlowReport>,
        /// How many the client missed because it read too slowly.
        lost: u64,
    },
    /// It could not be done.
    Error(Error),
}

impl Reply {
    /// Whether no other packet follows this one.
    #[must_use]
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Pods { more: true, .. } | Self::Flows { .. })
    }
}

/// Why the agent could not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure it was.
    pub kind: ErrorKind,
    /// What happened to which pod in which family, and the remedy.
    pub message: String,
}

impl Error {
    /// An error of a kind.
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
    /// The request could not be understood.
    Malformed,
    /// The caller is neither root nor the agent's own user.
    Denied,
    /// Trying again later may help: the proxy is not connected, say.
    TryAgain,
    /// The attachment is not known.
    Unknown,
    /// The kernel is not as it should be (`Check`).
    Mismatch,
    /// The kernel refused, or a map is full.
    Datapath,
    /// The proxy refused the pod.
    Proxy,
    /// Anything else.
    Internal,
}

impl ErrorKind {
    /// The label that metrics show.
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

/// What the agent is doing.
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
    /// What the agent found of the kernel when it started, by trying.
    #[serde(default)]
    pub features: Vec<FeatureReport>,
    /// The loaded programs.
    pub programs: Vec<ProgramReport>,
    /// The maps.
    pub maps: Vec<MapReport>,
    /// The connected node proxies, newest first.
    pub proxies: Vec<ProxyReport>,
    /// Connections that were counted, non-zero counters only.
    pub counters: Vec<CounterReport>,
    /// What others had changed and the agent put right, non-zero counters only.
    #[serde(default)]
    pub repairs: Vec<RepairReport>,
    /// The events of connections.
    #[serde(default)]
    pub flows: FlowStatus,
}

/// How it is with the events of connections ([`Request::Monitor`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// How many listen. The kernel side tells of nothing while nobody does.
    pub listeners: usize,
    /// Events that were lost to the limit of events in a second.
    pub rate_limit: u64,
    /// Events that were lost because the agent did not read fast enough.
    pub ring_full: u64,
    /// Events that listeners lost because they did not read fast enough.
    pub slow_listener: u64,
}

/// Something that the kernel, or the node, has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureReport {
    /// What, as `redirect doctor` names it.
    pub name: String,
    /// What was found.
    pub found: String,
}

/// Repairs of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepairReport {
    /// The label of its kind.
    pub kind: String,
    /// How many.
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
    /// The process at the other end.
    pub pid: u32,
    /// Its cgroup v2 path, if it has one.
    pub cgroup: Option<String>,
    /// Whether the snapshot was sent and acknowledged.
    pub synced: bool,
    /// Pods that it acknowledged.
    pub acknowledged: usize,
    /// Pods that it refused, and why.
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
    /// How many connections.
    pub connections: u64,
}

/// What is in the kernel for one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodDetail {
    /// What the agent knows of it.
    pub report: PodReport,
    /// What has to be in the kernel, and how it is.
    pub expectations: Vec<Expectation>,
}

/// Something that has to be in the kernel for a pod, or that nobody expects there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expectation {
    /// What.
    pub what: String,
    /// How it is.
    pub state: FactState,
}

/// How a fact is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactState {
    /// As it should be.
    Present,
    /// It is not there.
    Missing,
    /// It is there, but detached, without its pin, or of another build.
    Damaged,
    /// It is there, and nobody wants it.
    Surplus,
    /// It is not there, and need not be: the node proxy does without it.
    Unused,
}

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Who makes it.
    pub pod: PodIdentity,
    /// Its destination.
    pub to: SocketAddr,
    /// Its protocol.
    pub transport: Transport,
    /// `IPv4` or `IPv6`: that of the packets.
    pub family: String,
    /// How the decision is found.
    pub steps: Vec<Step>,
    /// Whether the node proxy gets it.
    pub captured: bool,
    /// What becomes of it, in words.
    pub verdict: String,
    /// What is wrong on its way, the first thing first.
    pub wrong: Vec<String>,
    /// What may be wrong where the agent can't see it.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A question that the kernel side asks about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The question.
    pub question: String,
    /// Its answer.
    pub answer: bool,
}

/// What the agent knows of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodReport {
    /// Who it is.
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
    /// Devices of the host that led to the pod and whose other ends somebody moved into another namespace. What comes from there
    /// and is not the proxy's is dropped.
    #[serde(default)]
    pub strayed: Vec<String>,
    /// Interfaces without an end on the host where what leaves them past the pod's own programs could be stopped.
    #[serde(default)]
    pub unguarded: Vec<String>,
    /// How it is with the pod.
    pub state: PodState,
    /// Whether the newest proxy acknowledged the pod; if not, what it said or that it is not connected.
    pub proxy: Result<(), String>,
    /// Seconds since the pod was enrolled.
    pub since: u64,
    /// Its connections and DNS questions since then, non-zero counters only.
    #[serde(default)]
    pub counters: Vec<PodCounter>,
}

/// One counter of a pod. What the node proxy connects on is in none of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodCounter {
    /// `IPv4` or `IPv6`: that of the packets.
    pub family: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// See [`redirect_ebpf::Verdict`].
    pub verdict: String,
    /// How many connections.
    pub connections: u64,
}

/// How it is with a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// The kernel gives its connections to the node proxy, which knows the pod.
    Captured,
    /// The kernel is as it should be, but the node proxy does not serve the pod: connections wait, or are refused.
    Waiting,
    /// The kernel was not as it should be when it was last looked at; the agent tries again.
    Broken,
    /// Its new connections go directly; those that the node proxy has may end, and then the pod is un-enrolled.
    Leaving,
}

impl PodState {
    /// The word that tables show.
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
