//! The known pods of this node and the known namespaces. Changes queue the pods concerned.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::api::{NamespaceView, PodView};
use super::queue::Queue;

#[derive(Debug)]
pub(super) struct Store {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    queue: Arc<Queue>,
}

#[derive(Debug, Default)]
struct State {
    /// By UID.
    pods: HashMap<String, PodView>,
    /// UIDs by namespace and name.
    names: HashMap<(String, String), String>,
    namespaces: HashMap<String, NamespaceView>,
    pods_synced: bool,
    namespaces_synced: bool,
    /// Queried individually, and not yet seen by the informer.
    learned: HashSet<String>,
}

/// The known objects of one pod.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) pod: PodView,
    pub(super) namespace: Option<NamespaceView>,
}

impl Store {
    pub(super) fn new(queue: Arc<Queue>) -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(0), queue }
    }

    /// A pod was created or changed.
    pub(super) fn put_pod(&self, pod: PodView) {
        self.update(|state, dirty| {
            state.learned.remove(&pod.uid);
            state.put(pod, dirty);
        });
    }

    /// A pod that was queried before the informer saw it.
    pub(super) fn learn_pod(&self, pod: PodView) {
        self.update(|state, dirty| {
            state.learned.insert(pod.uid.clone());
            state.put(pod, dirty);
        });
    }

    /// A pod was deleted.
    pub(super) fn delete_pod(&self, uid: &str, namespace: &str, name: &str) {
        self.update(|state, dirty| state.delete(uid, namespace, name, dirty));
    }

    /// A list of all pods begins.
    pub(super) fn begin_pods(&self) {
        self.state().learned.clear();
    }

    /// A list of all pods is complete.
    pub(super) fn replace_pods(&self, pods: Vec<PodView>) {
        self.update(|state, dirty| {
            let listed: HashSet<&str> = pods.iter().map(|pod| pod.uid.as_str()).collect();
            let gone: Vec<PodView> = state
                .pods
                .values()
                .filter(|pod| !listed.contains(pod.uid.as_str()) && !state.learned.contains(&pod.uid))
                .cloned()
                .collect();
            for pod in gone {
                state.delete(&pod.uid, &pod.namespace, &pod.name, dirty);
            }
            for pod in pods {
                state.put(pod, dirty);
            }
            if !std::mem::replace(&mut state.pods_synced, true) {
                dirty.extend(state.pods.keys().cloned());
            }
        });
    }

    /// A namespace was created or changed.
    pub(super) fn put_namespace(&self, namespace: NamespaceView) {
        self.update(|state, dirty| {
            let before = state.namespaces.get(&namespace.name);
            if before != Some(&namespace) {
                state.touch(&namespace.name, dirty);
                state.namespaces.insert(namespace.name.clone(), namespace);
            }
        });
    }

    /// A namespace was deleted. So are its pods, or they will be; until then its last label counts.
    pub(super) fn delete_namespace(&self, name: &str) {
        self.update(|state, _| {
            if !state.pods.values().any(|pod| pod.namespace == name) {
                state.namespaces.remove(name);
            }
        });
    }

    /// A list of all namespaces is complete.
    pub(super) fn replace_namespaces(&self, namespaces: Vec<NamespaceView>) {
        self.update(|state, dirty| {
            let used: HashSet<&str> = state.pods.values().map(|pod| pod.namespace.as_str()).collect();
            let listed: HashSet<&str> = namespaces.iter().map(|namespace| namespace.name.as_str()).collect();
            state.namespaces.retain(|name, _| listed.contains(name.as_str()) || used.contains(name.as_str()));
            for namespace in namespaces {
                if state.namespaces.get(&namespace.name) != Some(&namespace) {
                    state.touch(&namespace.name, dirty);
                    state.namespaces.insert(namespace.name.clone(), namespace);
                }
            }
            state.namespaces_synced = true;
        });
    }

    pub(super) fn pod(&self, uid: &str) -> Option<Known> {
        let state = self.state();
        state.known(state.pods.get(uid)?)
    }

    pub(super) fn named(&self, namespace: &str, name: &str) -> Option<Known> {
        let state = self.state();
        let uid = state.names.get(&(namespace.to_owned(), name.to_owned()))?;
        state.known(state.pods.get(uid)?)
    }

    pub(super) fn namespace(&self, name: &str) -> Option<NamespaceView> {
        self.state().namespaces.get(name).cloned()
    }

    pub(super) fn uids(&self) -> Vec<String> {
        self.state().pods.keys().cloned().collect()
    }

    /// Whether all initial lists are complete.
    pub(super) fn is_synced(&self) -> bool {
        let state = self.state();
        state.pods_synced && state.namespaces_synced
    }

    /// Counts changes.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn update(&self, change: impl FnOnce(&mut State, &mut Vec<String>)) {
        let mut dirty = Vec::new();
        change(&mut self.state(), &mut dirty);
        self.changed.send_modify(|version| *version += 1);
        for uid in dirty {
            self.queue.add(&uid);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn put(&mut self, pod: PodView, dirty: &mut Vec<String>) {
        let name = (pod.namespace.clone(), pod.name.clone());
        match self.pods.get(&pod.uid) {
            Some(known) if *known == pod => return,
            Some(known) if (&known.namespace, &known.name) != (&pod.namespace, &pod.name) => {
                tracing::warn!(
                    uid = pod.uid,
                    pod = %pod.identity(),
                    other = %known.identity(),
                    "two pods from the API server have the same UID: keeping the first, ignoring this one"
                );
                return;
            }
            Some(_) | None => {}
        }
        // A pod with the same name is another pod: its deletion was missed.
        if let Some(old) = self.names.insert(name, pod.uid.clone())
            && old != pod.uid
        {
            self.pods.remove(&old);
            dirty.push(old);
        }
        dirty.push(pod.uid.clone());
        self.pods.insert(pod.uid.clone(), pod);
    }

    fn delete(&mut self, uid: &str, namespace: &str, name: &str, dirty: &mut Vec<String>) {
        let is_it = |pod: &PodView| pod.namespace == namespace && pod.name == name;
        if !self.pods.get(uid).is_some_and(is_it) {
            return;
        }
        self.pods.remove(uid);
        self.learned.remove(uid);
        let name = (namespace.to_owned(), name.to_owned());
        if self.names.get(&name).is_some_and(|current| current == uid) {
            self.names.remove(&name);
        }
        dirty.push(uid.to_owned());
    }

    fn touch(&self, namespace: &str, dirty: &mut Vec<String>) {
        let uids = self.pods.values().filter(|pod| pod.namespace == namespace).map(|pod| pod.uid.clone());
        dirty.extend(uids);
    }

    fn known(&self, pod: &PodView) -> Option<Known> {
        Some(Known { pod: pod.clone(), namespace: self.namespaces.get(&pod.namespace).cloned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, name: &str) -> PodView {
        PodView { uid: uid.into(), namespace: "shop".into(), name: name.into(), ..PodView::default() }
    }

    fn store() -> (Store, Arc<Queue>) {
        let queue = Arc::new(Queue::default());
        (Store::new(Arc::clone(&queue)), queue)
    }

    /// The queued pods.
    async fn drain(queue: &Queue) -> Vec<String> {
        let mut uids = Vec::new();
        while let Ok(uid) = tokio::time::timeout(std::time::Duration::ZERO, queue.next()).await {
            queue.done(&uid);
            uids.push(uid);
        }
        uids.sort();
        uids
    }

    #[tokio::test]
    async fn a_list_replaces_what_was_known_but_not_what_was_learned_meanwhile() {
        let (store, queue) = store();
        store.put_pod(pod("1", "a"));
        store.put_pod(pod("2", "b"));
        drain(&queue).await;
        store.begin_pods();
        store.learn_pod(pod("4", "d"));
        store.replace_pods(vec![pod("2", "b"), pod("3", "c")]);
        let mut uids = store.uids();
        uids.sort();
        assert_eq!(uids, ["2", "3", "4"]);
        assert_eq!(drain(&queue).await, ["1", "2", "3", "4"], "all, for it is the first list");
        store.begin_pods();
        store.replace_pods(vec![pod("2", "b"), pod("3", "c")]);
        assert_eq!(drain(&queue).await, ["4"]);
        store.put_pod(pod("2", "b"));
        assert!(drain(&queue).await.is_empty(), "nothing has changed");
    }

    #[tokio::test]
    async fn a_new_pod_of_the_same_name_replaces_the_old_one_whose_late_removal_does_nothing() {
        let (store, queue) = store();
        store.put_pod(pod("1", "a"));
        drain(&queue).await;
        store.put_pod(pod("2", "a"));
        assert_eq!(drain(&queue).await, ["1", "2"]);
        store.delete_pod("1", "shop", "a");
        assert_eq!(store.named("shop", "a").unwrap().pod.uid, "2");
        store.delete_pod("2", "shop", "a");
        assert!(store.named("shop", "a").is_none());
    }

    #[tokio::test]
    async fn of_two_pods_with_one_uid_the_first_stays() {
        let (store, queue) = store();
        store.put_pod(pod("1", "a"));
        drain(&queue).await;
        store.put_pod(pod("1", "b"));
        store.delete_pod("1", "shop", "b");
        assert_eq!(store.pod("1").unwrap().pod.name, "a");
        assert!(store.named("shop", "b").is_none());
        assert!(drain(&queue).await.is_empty());
    }

    #[tokio::test]
    async fn a_namespaces_label_concerns_its_pods() {
        let (store, queue) = store();
        store.put_pod(pod("1", "a"));
        drain(&queue).await;
        let namespace = NamespaceView { name: "shop".into(), mode: Some("ambient".into()) };
        store.put_namespace(namespace.clone());
        assert_eq!(drain(&queue).await, ["1"]);
        store.replace_namespaces(vec![namespace.clone()]);
        assert!(drain(&queue).await.is_empty());
        assert!(!store.is_synced());
        store.delete_namespace("shop");
        assert_eq!(store.namespace("shop"), Some(namespace), "it has a pod yet");
    }
}
