//! Reports about pods.

use std::collections::BTreeSet;

use super::{Enrolled, Error, Ownership, Pods};
use redirect_datapath::datapath::{self, Adoption, Datapath, Finding, Target};
use redirect_datapath::facts::{Fact, Interface};
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::{FactState, PodReport, PodState};
use redirect_zds::server::{Handle, PodProxyState};

/// The state of an enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Whether the kernel matched the desired state at the last check.
    pub(crate) captured: bool,
    /// Whether the pod waits for a proxy, and nothing of it is captured until then.
    pub(crate) awaiting: bool,
    /// The pod's state at the newest proxy.
    pub(crate) proxy: PodProxyState,
}

impl<D: Datapath + Send + 'static> Pods<D> {
    /// Reports on all pods, without the kernel side's counters.
    pub(crate) async fn report(&self) -> Vec<PodReport> {
        self.slots.each(|_, enrolled| report(enrolled, &self.ownership, &self.proxies)).await
    }

    /// The pods that a name may refer to. Waits for operations in progress.
    pub(crate) async fn called(&self, name: &str) -> Vec<PodReport> {
        let others = self.ownership.pods().into_iter().filter(|owner| !owner.is_called(name));
        let others: BTreeSet<_> = others.map(|owner| owner.uid).collect();
        let mut called = Vec::new();
        for uid in self.slots.names().await.into_iter().filter(|uid| !others.contains(uid)) {
            if let Some(Some(enrolled)) = self.slots.find(&uid).await.as_deref()
                && enrolled.target.identity.is_called(name)
            {
                called.push(report(enrolled, &self.ownership, &self.proxies));
            }
        }
        called
    }

    /// Compares the kernel with the target of an enrolled pod. Also returns the target.
    pub(crate) async fn inspect(&self, uid: &str) -> Result<(Target, Vec<Finding>), Error> {
        let unknown = || Error::Unknown(uid.into());
        let slot = self.slots.find(uid).await.ok_or_else(unknown)?;
        let target = slot.as_ref().ok_or_else(unknown)?.target.clone();
        drop(slot);
        let copy = target.clone();
        let findings = self.kernel.run(move |datapath| datapath::inspect(datapath, &copy)).await??;
        let mut target = target;
        target.addresses.extend(findings.iter().filter_map(|finding| match finding.fact {
            Fact::Address(address) if finding.state == FactState::Present => Some(address),
            _ => None,
        }));
        Ok((target, findings))
    }

    /// The UID of the pod that has a namespace.
    pub(crate) fn uid_of(&self, netns_cookie: u64) -> Option<String> {
        self.ownership.owner(netns_cookie).map(|owner| owner.uid)
    }

    /// A pod's state; `None` if it is not enrolled.
    pub(crate) async fn standing(&self, uid: &str) -> Option<Standing> {
        let slot = self.slots.find(uid).await?;
        let enrolled = slot.as_ref()?;
        let awaiting = enrolled.target.adoption == Adoption::Awaited;
        let captured = enrolled.captured && enrolled.leaving.is_none();
        Some(Standing { captured, awaiting, proxy: self.proxies.pod(uid) })
    }
}

fn report(enrolled: &Enrolled, ownership: &Ownership, proxies: &Handle) -> PodReport {
    let Enrolled { attachments, observation, since, .. } = enrolled;
    let target = ownership.held(&enrolled.target);
    let mut addresses = target.addresses.clone();
    addresses.extend(observation.namespace.addresses.iter());
    let proxy = proxy(proxies, &target.identity);
    let interfaces = observation.namespace.interfaces.iter().filter(|interface| !interface.is_loopback());
    let interfaces: Vec<String> = interfaces.map(|interface| interface.name.clone()).collect();
    PodReport {
        pod: target.identity.clone(),
        attachments: attachments.keys().cloned().collect(),
        addresses: addresses.iter().collect(),
        netns_cookie: target.netns_cookie,
        captured: if target.adoption == Adoption::Awaited || enrolled.leaving.is_some() {
            Vec::new()
        } else {
            addresses.families().map(|family| family.to_string()).collect()
        },
        strayed: names(&observation.namespace.devices.strayed),
        unguarded: if observation.namespace.gated {
            observation.namespace.devices.unreachable.clone()
        } else {
            interfaces.clone()
        },
        interfaces,
        state: match &proxy {
            _ if target.adoption.awaits() => PodState::Waiting,
            _ if !enrolled.captured
                || target.addresses.is_empty()
                || !observation.namespace.devices.strayed.is_empty() =>
            {
                PodState::Broken
            }
            _ if enrolled.leaving.is_some() => PodState::Leaving,
            Ok(()) => PodState::Captured,
            Err(_) => PodState::Waiting,
        },
        proxy,
        since: since.elapsed().as_secs(),
        counters: Vec::new(),
    }
}

fn names(interfaces: &[Interface]) -> Vec<String> {
    interfaces.iter().map(|interface| interface.name.clone()).collect()
}

/// The pod's state at the newest proxy, as text.
pub(super) fn proxy(proxies: &Handle, identity: &PodIdentity) -> Result<(), String> {
    match proxies.pod(&identity.uid) {
        PodProxyState::Acknowledged | PodProxyState::Kept => Ok(()),
        PodProxyState::Refused(why) => Err(format!("the node proxy refused the pod: {why}")),
        PodProxyState::Pending => Err("the node proxy has not acknowledged the pod yet".into()),
        PodProxyState::NoProxy => Err("no node proxy is connected".into()),
        PodProxyState::Unknown => Err("the node proxy was not told of the pod".into()),
    }
}
