//! Decides for the CNI plugin whether to enroll the pod that is being set up.
//!
//! The kubelet sets up a sandbox as soon as it knows the pod, possibly before the informer does. So this waits for the
//! informer, queries the API server from time to time if that takes long, and gives up early enough for the plugin to report
//! why.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::{Api, Client};
use tokio::time::{Instant, timeout, timeout_at};

use super::api::{ApiPod, NamespaceView, PodView};
use super::labels::Rules;
use super::queue::Queue;
use super::rules::{Decision as Rule, Reason, decide};
use super::store::{Known, Store};
use super::timing::Timing;
use crate::enrollment::{Decision, Enrollment, Verdict};
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::{Error, ErrorKind};

/// Decides by the Kubernetes objects.
pub(crate) struct Admission {
    pub(super) client: Client,
    pub(super) store: Arc<Store>,
    pub(super) queue: Arc<Queue>,
    pub(super) rules: Rules,
    pub(super) timing: Timing,
}

impl Enrollment for Admission {
    fn decide<'a>(&'a self, pod: &'a PodIdentity) -> Decision<'a> {
        Box::pin(self.judge(pod))
    }

    /// The pod may have changed while it was being enrolled.
    fn enrolled(&self, uid: &str) {
        self.queue.add(uid);
    }
}

impl Admission {
    async fn judge(&self, pod: &PodIdentity) -> Result<Verdict, Error> {
        if pod.namespace.is_empty() {
            return Ok(Verdict::Leave("it is no pod of Kubernetes".into()));
        }
        if self.rules.excluded.contains(&pod.namespace) {
            return Ok(Verdict::Leave(Reason::Excluded.to_string()));
        }
        let deadline = Instant::now() + self.timing.admission;
        let Known { pod: view, mut namespace } = self.await_pod(pod, deadline).await?;
        loop {
            return match decide(&view, namespace.as_ref(), &self.rules) {
                Rule::Enroll(settings) => Ok(Verdict::Enroll { identity: view.identity(), settings }),
                Rule::No(Reason::NamespaceUnknown) => {
                    namespace = Some(self.await_namespace(pod, deadline).await?);
                    continue;
                }
                Rule::No(reason) => Ok(Verdict::Leave(reason.to_string())),
                Rule::Refuse(bad) => {
                    // The controller reports it in an event.
                    self.queue.add(&view.uid);
                    Err(Error::new(ErrorKind::Malformed, format!("pod {pod} can't be enrolled: {bad}")))
                }
            };
        }
    }

    async fn await_pod(&self, pod: &PodIdentity, deadline: Instant) -> Result<Known, Error> {
        let mut changes = self.store.changes();
        let mut ask_at = Instant::now() + self.timing.patience;
        let mut failure = "the informer does not show it".to_owned();
        loop {
            changes.borrow_and_update();
            let known = self.store.named(&pod.namespace, &pod.name);
            if let Some(known) = known.filter(|known| known.pod.is(&pod.uid)) {
                return Ok(known);
            }
            if timeout_at(ask_at.min(deadline), changes.changed()).await.is_ok() {
                continue;
            }
            if Instant::now() >= deadline {
                return Err(unknown(format_args!("pod {pod}"), &failure));
            }
            match timeout_at(deadline, self.ask_for_pod(pod)).await {
                Ok(Ok(view)) => self.store.learn_pod(view),
                Ok(Err(Answer::Gone(error))) => return Err(error),
                Ok(Err(Answer::Failed(error))) => failure = error,
                Err(_) => failure = "the API server does not answer".into(),
            }
            ask_at = Instant::now() + self.timing.patience;
        }
    }

    async fn ask_for_pod(&self, pod: &PodIdentity) -> Result<PodView, Answer> {
        let pods: Api<ApiPod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let gone = |what: &str| {
            let message = format!("pod {pod} (UID {}) {what}: its sandbox is not needed any more", pod.uid);
            Answer::Gone(Error::new(ErrorKind::TryAgain, message))
        };
        let found = pods.get_opt(&pod.name).await.map_err(|error| Answer::Failed(error.to_string()))?;
        let found = found.ok_or_else(|| gone("is not in Kubernetes"))?;
        let view = PodView::new(found, &self.rules).map_err(|error| Answer::Failed(error.to_string()))?;
        if view.is(&pod.uid) { Ok(view) } else { Err(gone("was replaced by another of its name")) }
    }

    async fn await_namespace(&self, pod: &PodIdentity, deadline: Instant) -> Result<NamespaceView, Error> {
        let mut changes = self.store.changes();
        let mut failure = "the informer does not show it".to_owned();
        // No initial wait: namespaces exist long before their pods.
        loop {
            changes.borrow_and_update();
            if let Some(namespace) = self.store.namespace(&pod.namespace) {
                return Ok(namespace);
            }
            match timeout_at(deadline, self.ask_for_namespace(&pod.namespace)).await {
                Ok(Ok(namespace)) => {
                    self.store.put_namespace(namespace.clone());
                    return Ok(namespace);
                }
                Ok(Err(error)) => failure = error,
                Err(_) => {}
            }
            if Instant::now() >= deadline {
                return Err(unknown(format_args!("namespace {} of pod {pod}", pod.namespace), &failure));
            }
            let pause = self.timing.patience.min(deadline.saturating_duration_since(Instant::now()));
            let _ = timeout(pause, changes.changed()).await;
        }
    }

    async fn ask_for_namespace(&self, name: &str) -> Result<NamespaceView, String> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let PartialObjectMeta { metadata, .. } =
            namespaces.get_metadata(name).await.map_err(|error| error.to_string())?;
        NamespaceView::new(metadata, &self.rules).map_err(|error| error.to_string())
    }
}

/// Why the API server did not help.
enum Answer {
    Gone(Error),
    Failed(String),
}

fn unknown(what: std::fmt::Arguments<'_>, failure: &str) -> Error {
    let message = format!(
        "{what} is not known to the agent, which can't tell whether to enroll it: {failure}; is the API server reachable \
         from this node?"
    );
    Error::new(ErrorKind::TryAgain, message)
}
