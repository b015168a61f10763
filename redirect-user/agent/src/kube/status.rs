//! Reports to Kubernetes: a pod's annotation, and events.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::{Client, Error};
use serde_json::json;

use super::api::{PodView, REDIRECTION};

/// How events are signed.
const REPORTER: &str = "ambient-redirect";
/// The API takes this many bytes in a note.
const NOTE: usize = 1024;
/// The API takes this many characters in an instance's name.
const INSTANCE: usize = 128;

/// What a pod's annotation says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redirection {
    /// The kernel steers the pod, and the proxy serves it.
    Enabled,
    /// It is to be so and is not yet.
    Pending,
}

impl Redirection {
    pub(super) fn value(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Pending => "pending",
        }
    }
}

/// Tells the API server.
pub(super) struct StatusWriter {
    client: Client,
    node: String,
}

impl StatusWriter {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.chars().take(INSTANCE).collect() }
    }

    /// Sets a pod's annotation, or removes it. A pod that is gone, or was replaced by one of the same name, is no error.
    pub(super) async fn annotate(&self, pod: &PodView, state: Option<Redirection>) -> Result<(), Error> {
        let patch = json!({
            "metadata": {
                // The API server refuses if the pod is another by now.
                "uid": pod.uid,
                "annotations": { REDIRECTION: state.map(Redirection::value) },
            }
        });
        let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(self.client.clone(), &pod.namespace);
        // The subresource takes annotations as well, and the right to it is the smaller one.
        match pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(Error::Api(status)) if status.code == 404 || status.code == 409 => {
                tracing::debug!(pod = %pod.identity(), uid = pod.uid, code = status.code, "pod is gone");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Warns whoever looks at the pod. Events of the same reason are not counted together, for they may say different
    /// things; who calls this sees to it that nothing is said twice.
    pub(super) async fn warn(&self, pod: &PodView, reason: &str, message: &str) -> Result<(), Error> {
        let mut note = message.to_owned();
        note.truncate(note.floor_char_boundary(NOTE));
        let event = Event {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", pod.name)),
                namespace: Some(pod.namespace.clone()),
                ..ObjectMeta::default()
            },
            type_: Some("Warning".into()),
            reason: Some(reason.into()),
            note: Some(note),
            action: Some("Enrol".into()),
            event_time: Some(MicroTime(Timestamp::now())),
            regarding: Some(pod.reference()),
            reporting_controller: Some(REPORTER.into()),
            reporting_instance: Some(self.node.clone()),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), &pod.namespace);
        events.create(&PostParams::default(), &event).await.map(|_| ())
    }
}
