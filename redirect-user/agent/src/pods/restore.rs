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

/// What happened to the pods of the checkpoints, as counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restored {
    /// They are still captured.
    pub(crate) adopted: usize,
    /// Their enrollment was incomplete, and was rolled back.
    pub(crate) undone: usize,
    /// They have ended.
    pub(crate) gone: usize,
}

impl<D: Datapath + Send + 'static> Pods<D> {
    /// Adopts the pods. Must run before the agent serves proxies, because these drop pods that are not announced.
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

    /// If the checkpoints of two pods name the same address, asks the kernel which of them had it last.
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

    /// The namespace that is now at the pod's path, if it has the pod's addresses: something recreated it without a CNI call.
    /// Updates the checkpoint to it.
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
