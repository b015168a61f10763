//! Adopts the pods of the previous agent.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use redirect_ebpf::maps::PodFlags;

use super::super::checkpoints::{Checkpoint, Found, Phase};
use super::{Enrolled, Pods, workload};
use redirect_datapath::datapath::Datapath;
use redirect_datapath::facts::Fact;
use redirect_linux::netns::NetNs;

/// How many pods became of the checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restored {
    /// They go on being captured.
    pub(crate) adopted: usize,
    /// Their enrollment had not come to its end; what there was of it is removed.
    pub(crate) undone: usize,
    /// They are gone.
    pub(crate) gone: usize,
}

impl<D: Datapath + Send + 'static> Pods<D> {
    /// Takes the pods over. Done before proxies are served, lest these drop them.
    pub(crate) async fn restore(&self, found: Vec<Found>) -> Restored {
        let mut restored = Restored::default();
        self.recall_holders(&found).await;
        for Found { mut checkpoint, netns } in found {
            let cookie = checkpoint.netns_cookie;
            let netns = match netns {
                Some(netns) => Some(netns),
                None if checkpoint.phase == Phase::Done => self.successor(&mut checkpoint).await,
                None => None,
            };
            let Some(netns) = netns else {
                tracing::info!(pod = %checkpoint.identity, uid = checkpoint.identity.uid, "pod ended while no \
                     agent ran");
                self.discard_or_log(cookie).await;
                restored.gone += 1;
                continue;
            };
            let target = self.defaults.checkpointed(&checkpoint, netns);
            if checkpoint.phase == Phase::Begun {
                tracing::info!(
                    pod = %checkpoint.identity,
                    uid = checkpoint.identity.uid,
                    "rolled back an enrollment that a previous agent did not complete; the pod has to be \
                     added again"
                );
                self.clear(&target).await;
                let tidied = self.kernel.run(move |datapath| datapath.tidy(&target)).await;
                if let Ok(Err(error)) = tidied {
                    tracing::warn!(pod = %checkpoint.identity, %error, "pod was not removed completely");
                }
                restored.undone += 1;
                continue;
            }
            let target = match self.divided(target.clone()).await {
                Ok(target) => target,
                Err(error) => {
                    tracing::warn!(pod = %checkpoint.identity, %error, "cannot find out where the pod is captured");
                    target
                }
            };
            let Checkpoint { identity, attachments, declared, containers, settings, .. } = checkpoint;
            let mut slot = self.slots.lock(&identity.uid).await;
            let attachments = attachments.into_iter().collect();
            let leaving = target.flags.contains(PodFlags::RELEASED).then(Instant::now);
            let mut enrolled =
                Enrolled { attachments, declared, containers, settings, leaving, ..Enrolled::new(target) };
            let held = self.ownership.held(&enrolled.target).addresses;
            self.claim(&enrolled.target, held.iter());
            self.follow(&enrolled.target);
            match self.apply(&enrolled.target).await {
                Ok(outcome) => {
                    self.repairs.of_facts(&identity, &outcome.made);
                    enrolled.observation = outcome.observation;
                    enrolled.captured = true;
                }
                Err(error) => {
                    tracing::warn!(pod = %identity, %error, "cannot adopt the pod completely");
                }
            }
            if let Err(error) = self.proxies.set(workload(&enrolled.target)) {
                tracing::warn!(pod = %identity, %error, "pod is not announced to node proxies");
            }
            self.own(&enrolled.target).await;
            if enrolled.target.netns_cookie != cookie {
                self.repairs.of_namespace(&identity);
                self.keep(&mut enrolled).await;
                self.discard_or_log(cookie).await;
            }
            *slot = Some(enrolled);
            self.release(slot, &identity.uid).await;
            restored.adopted += 1;
        }
        restored
    }

    /// Where the checkpoints of two pods name an address, the kernel knows which of them had it last.
    async fn recall_holders(&self, found: &[Found]) {
        for Found { checkpoint, netns } in found {
            let Some(netns) = netns else { continue };
            let target = self.defaults.checkpointed(checkpoint, netns.clone());
            let named: BTreeSet<IpAddr> = target.addresses.iter().collect();
            if let Ok(Ok(facts)) = self.kernel.run(move |datapath| datapath.observe_facts(&target)).await {
                let held = facts.into_iter().filter_map(|fact| match fact {
                    Fact::Address(address) => Some(address).filter(|address| named.contains(address)),
                    _ => None,
                });
                self.ownership.claim(checkpoint.netns_cookie, held);
            }
        }
    }

    /// The namespace that is now where the pod's was, if it holds the pod's addresses: it was made anew without a word from
    /// the runtime. The checkpoint is then about that one.
    async fn successor(&self, checkpoint: &mut Checkpoint) -> Option<NetNs> {
        let netns = NetNs::open(checkpoint.netns_path.as_deref()?).ok()?;
        let namespace = self.introduce(&checkpoint.identity, &netns).await.ok()?;
        let addresses: Vec<_> =
            self.defaults.checkpointed(checkpoint, netns.clone()).addresses.iter().collect();
        self.holds(&checkpoint.identity, &netns, &addresses).await.ok()?;
        checkpoint.netns_cookie = namespace.cookie;
        checkpoint.foreign = namespace.sysctls;
        checkpoint.earlier_connections = namespace.earlier_connections;
        Some(netns)
    }

    /// The cookies of the namespaces of all pods.
    pub(crate) async fn cookies(&self) -> BTreeSet<u64> {
        self.slots.each(|_, enrolled| enrolled.target.netns_cookie).await.into_iter().collect()
    }
}
