//! Reconciles pods as soon as the watch reports a change in their namespaces.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::pods::Pods;
use super::upkeep;
use super::watch::{Event, Watch};
use redirect_datapath::datapath::Datapath;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;

/// How long to wait for further changes of interfaces before a pod is reconciled.
const SETTLE: Duration = Duration::from_millis(20);

/// Reconciles pods when their namespaces change. If no subscriber was listening before, any pod may have changed.
pub(super) async fn follow(
    listening: Option<mpsc::Receiver<io::Result<Event>>>,
    watch: Arc<Watch>,
    kernel: DatapathHandle<Linux>,
    pods: Arc<Pods<Linux>>,
) -> anyhow::Result<()> {
    let mut batch = Vec::new();
    let mut events = match listening {
        Some(events) => events,
        None => {
            batch.push(Event::Lost);
            watch.listen()?
        }
    };
    let mut reconciling = Reconciling::default();
    loop {
        if batch.is_empty() {
            batch.push(tokio::select! {
                event = events.recv() => event.context("the watch's thread ended")??,
                () = reconciling.settle(&pods) => continue,
            });
        }
        // An interface causes several messages.
        tokio::time::sleep(SETTLE).await;
        while let Ok(more) = events.try_recv() {
            batch.push(more?);
        }
        let on_host = batch.contains(&Event::Host);
        if on_host {
            upkeep::repair(&kernel, &pods).await?;
        }
        let devices: BTreeSet<u32> = batch
            .iter()
            .filter_map(|event| if let Event::Device(index) = event { Some(*index) } else { None })
            .collect();
        let changed: BTreeSet<String> = if on_host || batch.contains(&Event::Lost) {
            pods.uids().await.into_iter().collect()
        } else {
            batch
                .drain(..)
                .filter_map(|event| if let Event::Changed(uid) = event { Some(uid) } else { None })
                .collect()
        };
        batch.clear();
        for uid in changed.union(&behind(&devices, &kernel, &pods).await) {
            reconciling.begin(uid, &pods);
        }
    }
}

/// The pods behind these devices of the host. Filters of other software come and go as well.
async fn behind(
    devices: &BTreeSet<u32>,
    kernel: &DatapathHandle<Linux>,
    pods: &Pods<Linux>,
) -> BTreeSet<String> {
    if devices.is_empty() {
        return BTreeSet::new();
    }
    let devices = devices.clone();
    let found = kernel.run(move |linux| {
        devices.into_iter().filter_map(|index| linux.pod_behind(index)).collect::<Vec<u64>>()
    });
    found.await.unwrap_or_default().into_iter().filter_map(|cookie| pods.uid_of(cookie)).collect()
}

/// The pods that are being reconciled, in parallel: one that is locked delays no other.
#[derive(Default)]
struct Reconciling {
    tasks: JoinSet<String>,
    /// Whether the pod has changed again in the meantime.
    again: HashMap<String, bool>,
}

impl Reconciling {
    fn begin<D: Datapath + Send + 'static>(&mut self, uid: &str, pods: &Arc<Pods<D>>) {
        if let Some(again) = self.again.get_mut(uid) {
            *again = true;
            return;
        }
        self.again.insert(uid.into(), false);
        let (uid, pods) = (uid.to_owned(), Arc::clone(pods));
        self.tasks.spawn(async move {
            pods.reconcile(&uid).await;
            uid
        });
    }

    /// Waits until one is done, and starts again if the pod has changed in the meantime.
    async fn settle<D: Datapath + Send + 'static>(&mut self, pods: &Arc<Pods<D>>) {
        match self.tasks.join_next().await {
            Some(Ok(uid)) => {
                if self.again.remove(&uid) == Some(true) {
                    self.begin(&uid, pods);
                }
            }
            Some(Err(error)) => tracing::error!(%error, "reconciling a pod failed"),
            None => std::future::pending().await,
        }
    }
}
