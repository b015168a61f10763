//! Reports to Kubernetes: annotations of pods, and events.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::{Client, Error, ResourceExt as _};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::timeout;

use super::api::{PodView, REDIRECTION};

/// The reporter of events.
const REPORTER: &str = "ambient-redirect";
/// The API's limit for a note, in bytes.
const NOTE: usize = 1024;
/// The API's limit for an instance's name, in characters.
const INSTANCE: usize = 128;

/// An event that recurs after this time becomes a new one.
const SERIES: Duration = Duration::from_mins(6);
/// The API server's deadline for counting a repeated event.
const COUNT: Duration = Duration::from_secs(10);

/// The values of a pod's annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redirection {
    /// The kernel captures the pod, and the proxy serves it.
    Enabled,
    /// The pod is to be captured, and is not yet.
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

/// Writes to the API server.
pub(super) struct StatusWriter {
    client: Client,
    node: String,
    events: Mutex<HashMap<Said, Series>>,
}

/// An event's text and pod.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Said {
    uid: String,
    namespace: String,
    reason: String,
    note: String,
}

/// An event in the API server.
struct Series {
    name: String,
    /// How often it occurred.
    times: u32,
    /// How often according to the API server.
    known: u32,
    last: Instant,
    last_time: Timestamp,
}

impl StatusWriter {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.chars().take(INSTANCE).collect(), events: Mutex::default() }
    }

    /// Sets or removes a pod's annotation. A pod that is gone, or was replaced by one with the same name, is no error.
    pub(super) async fn annotate(&self, pod: &PodView, state: Option<Redirection>) -> Result<(), Error> {
        let patch = json!({
            "metadata": {
                // The API server refuses if the pod has been replaced.
                "uid": pod.uid,
                "annotations": { REDIRECTION: state.map(Redirection::value) },
            }
        });
        let pods: Api<PartialObjectMeta<Pod>> = Api::namespaced(self.client.clone(), &pod.namespace);
        // The status subresource accepts annotations as well, and needs the smaller permission.
        match pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => Ok(()),
            Err(Error::Api(status)) if status.code == 404 || status.code == 409 => {
                tracing::debug!(pod = %pod.identity(), uid = pod.uid, code = status.code, "pod is gone");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Creates a warning event on the pod. A repeated one is only counted, for [`Self::count_repeated`].
    pub(super) async fn warn(&self, pod: &PodView, reason: &str, message: &str) -> Result<(), Error> {
        let mut note = message.to_owned();
        note.truncate(note.floor_char_boundary(NOTE));
        let said = Said {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            reason: reason.to_owned(),
            note: note.clone(),
        };
        {
            let mut events = self.events.lock();
            events.retain(|_, series| series.last.elapsed() < SERIES);
            if let Some(series) = events.get_mut(&said) {
                series.times += 1;
                series.last = Instant::now();
                series.last_time = Timestamp::now();
                return Ok(());
            }
        }
        let event = Event {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}-", pod.name)),
                namespace: Some(pod.namespace.clone()),
                ..ObjectMeta::default()
            },
            type_: Some("Warning".into()),
            reason: Some(reason.into()),
            note: Some(note),
            action: Some("Enroll".into()),
            event_time: Some(MicroTime(Timestamp::now())),
            regarding: Some(pod.reference()),
            reporting_controller: Some(REPORTER.into()),
            reporting_instance: Some(self.node.clone()),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), &pod.namespace);
        let name = events.create(&PostParams::default(), &event).await?.name_any();
        let series = Series { name, times: 1, known: 1, last: Instant::now(), last_time: Timestamp::now() };
        self.events.lock().insert(said, series);
        Ok(())
    }

    /// Updates the counts of repeated events, with one request per event.
    pub(super) async fn count_repeated(&self) {
        let repeated: Vec<_> = {
            let events = self.events.lock();
            let repeated = events.iter().filter(|(_, series)| series.known < series.times);
            repeated
                .map(|(said, series)| (said.clone(), series.name.clone(), series.times, series.last_time))
                .collect()
        };
        for (said, name, times, last) in repeated {
            let patch = json!({"series": {"count": times, "lastObservedTime": MicroTime(last)}});
            let events: Api<Event> = Api::namespaced(self.client.clone(), &said.namespace);
            let params = PatchParams::default();
            let patched = timeout(COUNT, events.patch(&name, &params, &Patch::Merge(&patch))).await;
            let mut events = self.events.lock();
            match patched {
                Ok(Ok(_)) => {
                    if let Some(series) = events.get_mut(&said) {
                        series.known = times;
                    }
                }
                // The API server deletes events after a while.
                Ok(Err(Error::Api(status))) if status.code == 404 => _ = events.remove(&said),
                Ok(Err(error)) => tracing::debug!(reason = said.reason, %error, "cannot count an event"),
                Err(_) => tracing::debug!(reason = said.reason, "counting an event timed out"),
            }
        }
    }
}
