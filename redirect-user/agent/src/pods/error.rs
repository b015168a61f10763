//! Why a pod could not be enrolled, changed or checked.

use std::net::IpAddr;

use super::super::checkpoints::Failed;
use redirect_datapath::datapath;
use redirect_datapath::handle::Gone;
use redirect_protocol::pod::{PodIdentity, family};
use redirect_zds::server::{AddError, InvalidWorkload};

/// Why a pod could not be enrolled, changed or checked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    #[error(transparent)]
    Thread(#[from] Gone),
    #[error(transparent)]
    Proxy(#[from] AddError),
    #[error(transparent)]
    Workload(#[from] InvalidWorkload),
    #[error("pod {pod}: cannot identify its network namespace (needs Linux 5.14): {source}")]
    Cookie { pod: PodIdentity, source: std::io::Error },
    #[error("pod {0} is in the node's network namespace (hostNetwork), which is never enrolled")]
    HostNetwork(PodIdentity),
    #[error("pod {0} has no addresses: chain the plugin after one that sets addresses")]
    NoAddresses(PodIdentity),
    #[error("pod {pod} has the same UID {uid} as enrolled pod {other}: remove one of them")]
    SameUid { pod: String, other: String, uid: String },
    #[error(
        "pod {0}: no process on this node reveals its network namespace, retrying; if this persists, check \
         that the agent runs with hostPID and that the pod's sandbox is up"
    )]
    NoNamespace(PodIdentity),
    #[error(
        "pod {0}: its network namespace belongs to another pod: it is not enrolled until it has one of its \
         own"
    )]
    NamespaceTaken(PodIdentity),
    #[error("pod {0}: the runtime has torn down its sandbox: the next one will be enrolled")]
    TakenDown(PodIdentity),
    #[error(
        "pod {pod}: {}: Kubernetes says that its address is {address}, but no interface in its network namespace has it: \
         restart the pod if its status.podIPs are right",
        family(*address)
    )]
    ForeignAddress { pod: PodIdentity, address: IpAddr },
    #[error("pod {pod}: cannot read the addresses in its network namespace: {source}")]
    Addresses { pod: PodIdentity, source: std::io::Error },
    #[error("pod {pod}: cannot observe the node proxy's listeners: {source}")]
    Listeners { pod: PodIdentity, source: std::io::Error },
    #[error("pod {pod}: {source}")]
    Checkpoint { pod: PodIdentity, source: Box<Failed> },
    #[error("pod {pod} is not removed completely: {}; delete it again", causes.join("; "))]
    NotRemoved { pod: PodIdentity, causes: Vec<String> },
    #[error("container {0} is not enrolled: add it again")]
    Unknown(String),
    #[error("pod {pod} is not captured completely, missing: {missing}; add it again")]
    Missing { pod: PodIdentity, missing: String },
}
