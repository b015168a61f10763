//! Why a pod could not be enrolled, changed or checked.

use std::net::IpAddr;

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
    #[error("pod {pod}: its network namespace can't be identified (this needs Linux 5.14): {source}")]
    Cookie { pod: PodIdentity, source: std::io::Error },
    #[error("pod {0} is in the node's own network namespace (hostNetwork), which is never steered")]
    HostNetwork(PodIdentity),
    #[error("pod {0} has no addresses: the plugin has to come after one that sets them")]
    NoAddresses(PodIdentity),
    #[error(
        "pod {pod} has the UID {uid} of pod {other}, which is enrolled: pods can't share a UID, remove one of them"
    )]
    SameUid { pod: String, other: String, uid: String },
    #[error(
        "pod {0} has no process on this node that shows its network namespace: it is looked for again; if this stays, \
         does the agent run with hostPID, and is the pod's sandbox up?"
    )]
    NoNamespace(PodIdentity),
    #[error(
        "pod {0}: another pod was brought with its network namespace: it is not steered until it has one of its own"
    )]
    NamespaceTaken(PodIdentity),
    #[error(
        "pod {0}: its sandbox has been taken down by the runtime: a new one will be enrolled when it is set up"
    )]
    TakenDown(PodIdentity),
    #[error(
        "pod {pod}: {}: Kubernetes says that its address is {address}, but no interface in its network namespace has it: \
         restart the pod if its status.podIPs are right",
        family(*address)
    )]
    ForeignAddress { pod: PodIdentity, address: IpAddr },
    #[error("pod {pod}: the addresses in its network namespace can't be read: {source}")]
    Addresses { pod: PodIdentity, source: std::io::Error },
    #[error("container {0} is not enrolled: add it again")]
    Unknown(String),
    #[error("pod {pod} is not steered as it should be, missing: {missing}; add it again")]
    Missing { pod: PodIdentity, missing: String },
}
