//! Keeps the store in sync with the API server, across failures and restarts of watches.

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, ObjectMeta};
use kube::core::{DeserializeGuard, PartialObjectMeta, Resource};
use kube::runtime::watcher::{self, Config, Event, InitialListStrategy, watcher};
use kube::{Client, ResourceExt};
use tokio::time::{sleep, timeout};

use super::api::{ApiPod, NamespaceView, PodView};
use super::labels::Rules;
use super::store::Store;
use crate::metrics::events as metrics;

/// The informer's timing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// The pause after the first failure; doubled after each further one.
    pub(crate) first_pause: Duration,
    pub(crate) longest_pause: Duration,
    /// The deadline for a list.
    pub(crate) list: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(30),
            list: Duration::from_secs(60),
        }
    }
}

/// The receiver of watched objects.
pub(super) trait Sink<K>: Send + Sync {
    /// The name in messages.
    fn name(&self) -> &'static str;
    /// A list begins; the one before may be incomplete.
    fn begin(&mut self);
    fn listed(&mut self, object: K);
    fn complete(&mut self);
    fn changed(&self, object: K);
    fn deleted(&self, object: K);
}

/// Watches the pods of a node. Never returns.
pub(super) async fn pods(client: Client, node: String, rules: Rules, store: Arc<Store>, patience: Patience) {
    let config = Config::default().fields(&format!("spec.nodeName={node}"));
    let start = |config| watcher(Api::<DeserializeGuard<ApiPod>>::all(client.clone()), config);
    follow(start, config, PodSink { store, rules, listed: Vec::new() }, patience).await;
}

/// Watches all namespaces' metadata. Never returns.
pub(super) async fn namespaces(client: Client, rules: Rules, store: Arc<Store>, patience: Patience) {
    let start = |config| watcher(Api::<PartialObjectMeta<Namespace>>::all(client.clone()), config);
    let sink = NamespaceSink { store, rules, listed: Vec::new() };
    follow(start, Config::default(), sink, patience).await;
}

/// Lists and watches. Never returns.
///
/// The list is a stream that the API server answers from its cache. From a server without streaming lists, the agent reads the
/// list in one piece, because that also comes from the cache (since Kubernetes 1.31), whereas pages come from etcd, each time
/// with all pods of the cluster.
pub(super) async fn follow<K, S>(
    start: impl Fn(Config) -> S,
    config: Config,
    mut sink: impl Sink<K>,
    patience: Patience,
) where
    K: Resource + Debug,
    S: Stream<Item = watcher::Result<Event<K>>>,
{
    let mut config = Config { page_size: None, ..config.streaming_lists() };
    let mut failures: u32 = 0;
    loop {
        let mut events = std::pin::pin!(start(config.clone()));
        let mut listing = true;
        loop {
            // A watch may be silent, a list may not. The watcher detects dead watches.
            let limit = if listing { patience.list } else { Duration::MAX };
            let event = match timeout(limit, events.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) if is_streaming(&config) && lacks_streams(&error) => {
                    tracing::debug!(of = sink.name(), %error, "API server has no streaming lists");
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                    break;
                }
                Ok(Some(Err(error))) => {
                    failures = failures.saturating_add(1);
                    metrics::events().watch_failed(sink.name());
                    tell(&error, failures, sink.name());
                    sleep(pause(failures, patience)).await;
                    continue;
                }
                Ok(None) | Err(_) => {
                    failures = failures.saturating_add(1);
                    metrics::events().watch_failed(sink.name());
                    tracing::warn!(of = sink.name(), "API server did not finish its list, restarting it");
                    // A server without streaming lists never ends one.
                    config.initial_list_strategy = InitialListStrategy::ListWatch;
                    sleep(pause(failures, patience)).await;
                    break;
                }
            };
            listing = matches!(event, Event::Init | Event::InitApply(_));
            // Every attempt at a list begins with it, even a failing one.
            if !matches!(event, Event::Init) && std::mem::take(&mut failures) > 0 {
                tracing::info!(of = sink.name(), "API server answers again");
            }
            match event {
                Event::Init => sink.begin(),
                Event::InitApply(object) => sink.listed(object),
                Event::InitDone => sink.complete(),
                Event::Apply(object) => sink.changed(object),
                Event::Delete(object) => sink.deleted(object),
            }
        }
    }
}

fn is_streaming(config: &Config) -> bool {
    config.initial_list_strategy == InitialListStrategy::StreamingList
}

/// Whether the API server refuses the request as such.
fn lacks_streams(error: &watcher::Error) -> bool {
    matches!(
        error,
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 400 || status.code == 422
    )
}

/// Logs the first failure and every tenth.
fn tell(error: &watcher::Error, failures: u32, of: &str) {
    if failures % 10 != 1 {
        return tracing::debug!(of, %error, failures, "API server watch failed");
    }
    let forbidden = matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) if status.code == 401 || status.code == 403
    );
    let remedy = if forbidden {
        format!("allow the agent's service account to list and watch {of}")
    } else {
        "the agent goes on with what it knows, and tries again".to_owned()
    };
    tracing::warn!(of, %error, failures, remedy, "API server watch failed");
}

/// Doubles with every failure. Random, because all nodes lose the API server at once.
pub(super) fn pause(failures: u32, patience: Patience) -> Duration {
    let doubled = patience.first_pause.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let pause = doubled.min(patience.longest_pause);
    let share = u32::try_from(RandomState::new().hash_one(failures) % 500).unwrap_or_default();
    pause.saturating_mul(750 + share) / 1000
}

struct PodSink {
    store: Arc<Store>,
    rules: Rules,
    listed: Vec<PodView>,
}

impl PodSink {
    /// An unreadable object changes nothing.
    fn view(&self, pod: DeserializeGuard<ApiPod>) -> Option<PodView> {
        let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
        let uid = pod.uid();
        let error = match pod.0.map(|pod| PodView::new(pod, &self.rules)) {
            Ok(Ok(view)) => return Some(view),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            pod = name,
            uid,
            error,
            "ignoring an invalid pod from the API server; keeping its last valid state"
        );
        self.store.pod(&uid?).map(|known| known.pod)
    }
}

impl Sink<DeserializeGuard<ApiPod>> for PodSink {
    fn name(&self) -> &'static str {
        "pods"
    }

    fn begin(&mut self) {
        self.listed.clear();
        self.store.begin_pods();
    }

    fn listed(&mut self, pod: DeserializeGuard<ApiPod>) {
        self.listed.extend(self.view(pod));
    }

    fn complete(&mut self) {
        self.store.replace_pods(std::mem::take(&mut self.listed));
    }

    fn changed(&self, pod: DeserializeGuard<ApiPod>) {
        if let Some(view) = self.view(pod) {
            self.store.put_pod(view);
        }
    }

    fn deleted(&self, pod: DeserializeGuard<ApiPod>) {
        let DeserializeGuard(pod) = pod;
        let metadata = match &pod {
            Ok(pod) => pod.meta(),
            Err(invalid) => &invalid.metadata,
        };
        let ObjectMeta { uid: Some(uid), namespace: Some(namespace), name: Some(name), .. } = metadata else {
            return;
        };
        self.store.delete_pod(uid, namespace, name);
    }
}

struct NamespaceSink {
    store: Arc<Store>,
    rules: Rules,
    listed: Vec<NamespaceView>,
}

impl NamespaceSink {
    fn view(&self, namespace: PartialObjectMeta<Namespace>) -> Option<NamespaceView> {
        NamespaceView::new(namespace.metadata, &self.rules)
            .inspect_err(|error| tracing::warn!(%error, "ignoring an invalid namespace from the API server"))
            .ok()
    }
}

impl Sink<PartialObjectMeta<Namespace>> for NamespaceSink {
    fn name(&self) -> &'static str {
        "namespaces"
    }

    fn begin(&mut self) {
        self.listed.clear();
    }

    fn listed(&mut self, namespace: PartialObjectMeta<Namespace>) {
        self.listed.extend(self.view(namespace));
    }

    fn complete(&mut self) {
        self.store.replace_namespaces(std::mem::take(&mut self.listed));
    }

    fn changed(&self, namespace: PartialObjectMeta<Namespace>) {
        if let Some(view) = self.view(namespace) {
            self.store.put_namespace(view);
        }
    }

    fn deleted(&self, namespace: PartialObjectMeta<Namespace>) {
        self.store.delete_namespace(&namespace.name_any());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_differ() {
        let patience = Patience::default();
        for (failures, from, to) in [(1, 375, 625), (2, 750, 1250), (3, 1500, 2500), (40, 22_500, 37_500)] {
            for _ in 0..50 {
                let milliseconds = pause(failures, patience).as_millis();
                assert!((from..=to).contains(&milliseconds), "{failures}: {milliseconds} ms");
            }
        }
    }
}
