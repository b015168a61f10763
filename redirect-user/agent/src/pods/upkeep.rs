//! Reconciles pods whose data path other software has changed.

use std::time::Instant;

use redirect_ebpf::maps::PodFlags;

use super::super::repairs::Repairs;
use super::{Enrolled, Error, HALF_OPEN, Pods, log};
use redirect_datapath::datapath::{Adoption, Datapath, Introduction};
use redirect_datapath::facts::Fact;
use redirect_linux::netns::NetNs;

impl<D: Datapath + Send + 'static> Pods<D> {
    /// The repairs so far.
    pub(crate) fn repairs(&self) -> &Repairs {
        &self.repairs
    }

    /// Restores a pod's facts after a change in its namespace, such as a new interface.
    pub(crate) async fn reconcile(&self, uid: &str) {
        if let Some(Some(known)) = self.slots.find(uid).await.as_deref_mut() {
            self.repair(known).await;
        }
    }

    /// The same periodically, unless another operation holds the pod.
    pub(crate) async fn resync(&self, uid: &str) {
        if let Some(Some(known)) = self.slots.find_idle(uid).await.as_deref_mut() {
            self.repair(known).await;
        }
    }

    /// Repairs changes that cause no notification, unless another operation holds the pod.
    pub(crate) async fn check_drift(&self, uid: &str) {
        let Some(mut slot) = self.slots.find_idle(uid).await else { return };
        let Some(known) = slot.as_mut().filter(|known| known.target.adoption != Adoption::Awaited) else {
            return;
        };
        if let Some(netns) = successor(known) {
            match self.change_over(known, netns).await {
                Ok(()) => self.repairs.of_namespace(&known.target.identity),
                Err(error) => {
                    let pod = &known.target.identity;
                    tracing::debug!(%pod, %error, "the namespace at the pod's path is no longer the pod's");
                }
            }
        }
        if known.unsaved {
            self.keep(known).await;
        }
        if !self.ownership.is_of(&known.target) {
            known.captured = false;
            return;
        }
        let settled = known.target.adoption == Adoption::Recent && known.since.elapsed() > HALF_OPEN;
        if settled {
            known.target = known.target.adopted(Adoption::None);
            self.keep(known).await;
        }
        let target = self.ownership.held(&known.target);
        let facts = &known.observation.facts;
        // Another pod may have had some of the addresses until now.
        let complete = target.addresses.iter().all(|address| facts.contains(&Fact::Address(address)));
        let mut quiet = facts.iter().filter(|fact| fact.is_quiet());
        let intact = match self.kernel.run(move |datapath| datapath.observe_facts(&target)).await {
            Ok(Ok(facts)) => quiet.all(|fact| facts.contains(fact)),
            Ok(Err(_)) | Err(_) => false,
        };
        if !intact || !complete || !known.captured || settled {
            self.repair(known).await;
        }
    }

    /// Captures the pod in the namespace that something recreated at its path without a CNI call, if that has the pod's
    /// addresses.
    async fn change_over(&self, known: &mut Enrolled, netns: NetNs) -> Result<(), Error> {
        let identity = known.target.identity.clone();
        let addresses: Vec<_> = known.target.addresses.iter().collect();
        let Introduction { cookie, sysctls, earlier_connections, .. } =
            self.introduce(&identity, &netns).await?;
        self.holds(&identity, &netns, &addresses).await?;
        let old = known.target.clone();
        known.target.netns = netns;
        known.target.netns_cookie = cookie;
        known.target.foreign = sysctls;
        known.target.flags = known.target.flags.with(PodFlags::EARLIER_CONNECTIONS, earlier_connections);
        if !self.ownership.take_if_free(&known.target) {
            known.target = old;
            return Err(Error::NamespaceTaken(identity));
        }
        let addresses = self.ownership.held(&old).addresses;
        self.claim(&known.target, addresses.iter());
        self.follow(&known.target);
        let captured = match self.apply(&known.target).await {
            // The plugin may have added the namespace's own pod in the meantime.
            Ok(outcome) => self.hand_over(&known.target).map(|()| outcome.observation),
            Err(error) => Err(error),
        };
        match captured {
            Ok(observation) => known.observation = observation,
            Err(error) => {
                self.ownership.give_back(&known.target, old.netns_cookie, &addresses);
                known.target = old;
                self.follow(&known.target);
                return Err(error);
            }
        }
        known.captured = true;
        self.keep(known).await;
        self.clear(&old).await;
        Ok(())
    }

    pub(super) async fn repair(&self, known: &mut Enrolled) {
        if known.target.adoption == Adoption::Awaited {
            return;
        }
        // Another pod may have taken the namespace and ended, and its end removed the checkpoint.
        let is_free = self.ownership.owner(known.target.netns_cookie).is_none();
        if !self.ownership.take_if_free(&known.target) {
            known.captured = false;
            return;
        }
        let began = Instant::now();
        let captured = self.apply(&known.target).await;
        if is_free {
            self.keep(known).await;
        }
        match captured {
            Ok(outcome) => {
                let before = &known.observation.facts;
                let lost: Vec<Fact> = outcome.made.into_iter().filter(|fact| before.contains(fact)).collect();
                self.repairs.of_facts(&known.target.identity, &lost);
                known.observation = outcome.observation;
                if !known.captured {
                    log::repaired(&known.target, began);
                }
                known.captured = true;
            }
            Err(error) => {
                if known.captured {
                    log::broken(&known.target, began, &error);
                } else {
                    tracing::debug!(pod = %known.target.identity, %error, "pod is still broken");
                }
                known.captured = false;
            }
        }
    }
}

/// The namespace that is now at the pod's path, if it is another one.
fn successor(known: &Enrolled) -> Option<NetNs> {
    let now = NetNs::open(known.target.netns.path()?).ok()?;
    (now != known.target.netns).then_some(now)
}
