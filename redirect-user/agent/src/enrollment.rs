//! Decides which of the pods that the CNI plugin adds are enrolled.

use std::future::Future;
use std::pin::Pin;

use super::pods::{self, Pods, Wanted};
use super::service_accounts::{self, ServiceAccount};
use redirect_datapath::datapath::Datapath;
use redirect_linux::netns::NetNs;
use redirect_protocol::pod::{PodIdentity, PodSettings};
use redirect_protocol::wire::{Attachment, Error, Reply};

/// The decision about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Capture it.
    Enroll {
        /// Its identity, completed with what the plugin does not know.
        identity: PodIdentity,
        settings: PodSettings,
    },
    /// Do not enroll it, for this reason.
    Leave(String),
}

/// A [`Verdict`] that may take a while.
pub(crate) type Decision<'a> = Pin<Box<dyn Future<Output = Result<Verdict, Error>> + Send + 'a>>;

/// Decides which pods are captured.
pub(crate) trait Enrollment: Send + Sync {
    /// Decides well before the plugin's deadline.
    fn decide<'a>(&'a self, pod: &'a PodIdentity) -> Decision<'a>;

    /// Called after a pod has been enrolled.
    fn enrolled(&self, _uid: &str) {}

    /// Whether every pod is enrolled, so that an unknown one has been lost.
    fn is_for_all(&self) -> bool {
        false
    }
}

/// Enrolls every pod that the plugin brings: where there is no Kubernetes, the plugin's configuration is the choice.
#[derive(Clone, Debug)]
pub(crate) struct Everybody {
    pub(crate) accounts: Vec<ServiceAccount>,
}

impl Enrollment for Everybody {
    fn decide<'a>(&'a self, pod: &'a PodIdentity) -> Decision<'a> {
        let verdict = Verdict::Enroll {
            identity: service_accounts::complete(pod, &self.accounts),
            settings: PodSettings::default(),
        };
        Box::pin(std::future::ready(Ok(verdict)))
    }

    fn is_for_all(&self) -> bool {
        true
    }
}

/// Enrolls a pod that the plugin adds, if the decision says so.
pub(super) async fn add<D: Datapath + Send + 'static>(
    pods: &Pods<D>,
    enrollment: &dyn Enrollment,
    attachment: Attachment,
    wanted: Wanted,
    netns: NetNs,
) -> Reply {
    match enrollment.decide(&wanted.identity).await {
        Ok(Verdict::Leave(reason)) => {
            tracing::debug!(pod = %wanted.identity, reason, "pod is not enrolled");
            Reply::Added { enrolled: false }
        }
        Ok(Verdict::Enroll { identity, settings }) => {
            let uid = identity.uid.clone();
            match pods.add(attachment, Wanted { identity, settings, ..wanted }, netns).await {
                Ok(()) => {
                    enrollment.enrolled(&uid);
                    Reply::Added { enrolled: true }
                }
                Err(error) => Reply::Error(error.into()),
            }
        }
        Err(error) => {
            tracing::warn!(pod = %wanted.identity, uid = wanted.identity.uid, %error, "cannot enroll pod");
            Reply::Error(error)
        }
    }
}

/// Compares the kernel with the state that enrollment established.
pub(super) async fn check<D: Datapath + Send + 'static>(
    pods: &Pods<D>,
    enrollment: &dyn Enrollment,
    attachment: &Attachment,
    addresses: &[std::net::IpAddr],
) -> Reply {
    match pods.check(attachment, addresses).await {
        Ok(()) => Reply::Done,
        Err(pods::Error::Unknown(_)) if !enrollment.is_for_all() => Reply::Done,
        Err(error) => Reply::Error(error.into()),
    }
}
