//! A pod from the agent, checked to fit in a packet.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;

use crate::messages::{AddWorkload, Request, WorkloadInfo, WorkloadRequest};
use crate::packet::{self, PacketError};

/// A pod for proxies to serve.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The pod's UID.
    pub uid: String,
    /// The pod's identity.
    pub info: WorkloadInfo,
    /// The pod's network namespace. `None` while the agent does not have it, after a restart: the proxy is then asked
    /// to keep the pod if it already serves it.
    pub netns: Option<Arc<OwnedFd>>,
}

/// Why a pod can't be sent to a proxy.
#[derive(Debug, thiserror::Error)]
pub enum InvalidWorkload {
    /// The pod has no UID.
    #[error("pod {0} has no UID: the runtime or Kubernetes has to supply one")]
    NoUid(String),
    /// The request for the pod does not fit in a packet.
    #[error("pod {pod} cannot be sent to the node proxy: {error}")]
    Packet {
        /// The pod.
        pod: String,
        /// The cause.
        error: PacketError,
    },
    /// The descriptor is not usable.
    #[error("the network namespace of pod {pod} cannot be examined, add the pod again: {error}")]
    Namespace {
        /// The pod.
        pod: String,
        /// The cause.
        error: nix::Error,
    },
}

/// A network namespace: the descriptor, and its identity.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub(super) descriptor: Arc<OwnedFd>,
    identity: (u64, u64),
}

impl PartialEq for Namespace {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Workload {
    /// Checks the limits of a packet, and identifies the namespace.
    pub(super) fn check(self) -> Result<(String, WorkloadInfo, Option<Namespace>), InvalidWorkload> {
        let pod = pod_name(&self.uid, &self.info);
        if self.uid.is_empty() {
            return Err(InvalidWorkload::NoUid(pod));
        }
        // Add is the largest request for a pod.
        if let Err(error) = packet::encode(&add_request(&self.uid, &self.info)) {
            return Err(InvalidWorkload::Packet { pod, error });
        }
        let namespace = match self.netns {
            None => None,
            Some(descriptor) => {
                let stat =
                    fstat(descriptor.as_fd()).map_err(|error| InvalidWorkload::Namespace { pod, error })?;
                Some(Namespace { descriptor, identity: (stat.st_dev, stat.st_ino) })
            }
        };
        Ok((self.uid, self.info, namespace))
    }
}

/// The request that hands the pod to a proxy.
pub(super) fn add_request(uid: &str, info: &WorkloadInfo) -> WorkloadRequest {
    let add = AddWorkload { uid: uid.to_owned(), workload_info: Some(info.clone()) };
    WorkloadRequest { payload: Some(Request::Add(add)) }
}

/// A pod's name for messages.
pub(super) fn pod_name(uid: &str, info: &WorkloadInfo) -> String {
    format!("{}/{} ({uid})", info.namespace, info.name)
}
