//! The lifecycle of enrolled pods. Operations on one pod run in order, independently of other pods. An ADD holds no lock while it
//! waits for a proxy.
//!
//! The CNI plugin adds a pod with its sandbox ([`Pods::add`]), and the agent captures it before anything runs in it. A running
//! pod is adopted instead, once the agent has found its namespace ([`Pods::adopt`]), and captured when a proxy serves it, without
//! losing connections. A pod leaves with its last attachment ([`Pods::del`]), or when the mesh no longer includes it
//! ([`Pods::leave`], [`Pods::forget`]). At its start, an agent adopts the pods of the previous one ([`Pods::restore`]).

mod abandoned;
mod error;
mod log;
mod ownership;
mod report;
mod restore;
mod slots;
#[cfg(test)]
mod tests;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use redirect_ebpf::Family;
use redirect_ebpf::maps::PodFlags;
use tokio::sync::watch;

use super::checkpoints::{Checkpoint, Checkpoints, Failed, Phase};
use super::repairs::Repairs;
use super::watch::Watch;
use crate::metrics::events::events;
pub(crate) use abandoned::Users;
pub(crate) use error::Error;
use ownership::Ownership;
use redirect_datapath::datapath::{self, Adoption, Datapath, Introduction, Observation, Outcome, Target};
use redirect_datapath::handle::DatapathHandle;
use redirect_linux::netns::NetNs;
use redirect_protocol::pod::{PodAddresses, PodIdentity, PodSettings};
use redirect_protocol::wire::Attachment;
use redirect_zds::messages::WorkloadInfo;
use redirect_zds::server::{
    AddError, Announcement, Handle, InvalidWorkload, Peer, PodProxyState, RemoveOutcome, Workload,
};
pub(crate) use report::Standing;
pub(crate) use restore::Restored;
use slots::{Guard, Slots};

/// The time for half-open connections to complete after a running pod is captured. By default, Linux gives up on a SYN after 127
/// seconds.
const HALF_OPEN: Duration = Duration::from_secs(150);

/// How long un-enrollment waits for the proxy to release a pod before it continues without.
const PROXY_RELEASE: Duration = Duration::from_secs(2);

/// The same for all pods together. Nothing is captured during this time, and Kubernetes kills the agent after 30 s.
const ALL_RELEASE: Duration = Duration::from_secs(5);

/// The pods of this node.
pub(crate) struct Pods<D> {
    kernel: DatapathHandle<D>,
    proxies: Handle,
    defaults: Defaults,
    /// The cookie of the host's network namespace, in which the agent runs. It is never a pod's.
    host_cookie: u64,
    /// Reports interfaces that appear later. `None` in tests on a fake kernel.
    watch: Option<Arc<Watch>>,
    checkpoints: Checkpoints,
    repairs: Repairs,
    /// By UID.
    slots: Slots<Enrolled>,
    ownership: Ownership,
    /// The UIDs of the pods that are captured once a proxy serves them.
    awaiting: Mutex<BTreeSet<String>>,
    /// The number of ADDs so far.
    adds: AtomicU64,
    /// The connection number of the proxy whose IPv6 listeners were last checked.
    looked_at: AtomicU64,
}

/// Defaults for pods without settings of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    /// How long an enrollment waits for the proxy.
    pub(crate) proxy_deadline: Duration,
    /// Whether DNS queries go to the proxy's resolver.
    pub(crate) dns: bool,
    /// Whether pods may send from addresses that are not theirs, in placement `node`.
    pub(crate) any_source: bool,
}

/// A pod that should be captured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) identity: PodIdentity,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) settings: PodSettings,
}

/// A captured pod that waits for a proxy to serve it.
struct Attached {
    attachment: Attachment,
    /// The number of the ADD.
    number: u64,
    enrolled: Enrolled,
    /// The pod before the ADD, if it was enrolled.
    before: Option<Enrolled>,
    announcement: Announcement,
}

/// A network namespace in which the agent found processes of a pod, and the containers of these processes.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) netns: NetNs,
    pub(crate) containers: BTreeSet<String>,
}

/// An enrolled pod.
#[derive(Clone)]
struct Enrolled {
    target: Target,
    /// The attachments that the CNI plugin reported, with their addresses.
    attachments: BTreeMap<Attachment, Vec<IpAddr>>,
    /// The attachments whose ADD waits for a proxy, with the number of the ADD.
    adding: BTreeMap<Attachment, u64>,
    /// Whether the enrollment has completed.
    phase: Phase,
    /// The addresses that Kubernetes reports.
    declared: Vec<IpAddr>,
    /// The containers that the agent found in its namespace, if it searched for them.
    containers: BTreeSet<String>,
    settings: PodSettings,
    observation: Observation,
    /// Whether the kernel matched the desired state at the last check.
    captured: bool,
    /// Whether writing its checkpoint failed.
    unsaved: bool,
    /// Whether a removal failed half-way.
    removing: bool,
    /// Whether its namespace was at its path when the agent first saw the pod.
    found: bool,
    /// When the pod began to leave the mesh. Its new connections go directly since then; those at the proxy may continue for a
    /// grace period.
    leaving: Option<Instant>,
    since: Instant,
}

impl Enrolled {
    fn new(target: Target) -> Self {
        Self {
            found: target.netns.path().is_some_and(|path| target.netns.is_at(path)),
            target,
            attachments: BTreeMap::new(),
            adding: BTreeMap::new(),
            phase: Phase::Done,
            declared: Vec::new(),
            containers: BTreeSet::new(),
            settings: PodSettings::default(),
            observation: Observation::default(),
            captured: false,
            unsaved: false,
            removing: false,
            leaving: None,
            since: Instant::now(),
        }
    }

    fn checkpoint(&self) -> Checkpoint {
        let target = &self.target;
        // If the agent ends during an ADD, the next agent rolls back the whole pod after a first ADD, and forgets the attachment
        // of a later one.
        let counts = |added: &Attachment| self.phase == Phase::Begun || !self.adding.contains_key(added);
        let attachments = self.attachments.iter().filter(|(added, _)| counts(added));
        Checkpoint {
            phase: self.phase,
            identity: target.identity.clone(),
            netns_cookie: target.netns_cookie,
            netns_inode: target.netns.inode().unwrap_or_default(),
            netns_path: target.netns.path().map(Into::into),
            attachments: attachments.map(|(of, addresses)| (of.clone(), addresses.clone())).collect(),
            declared: self.declared.clone(),
            containers: self.containers.clone(),
            settings: self.settings.clone(),
            foreign: target.foreign.clone(),
            earlier_connections: target.flags.contains(PodFlags::EARLIER_CONNECTIONS),
            recent: target.adoption == Adoption::Recent,
            leaving: target.flags.contains(PodFlags::RELEASED),
        }
    }

    /// The introduction from which a changed target is built.
    fn introduction(&self) -> Introduction {
        let mut namespace = self.target.introduction();
        // The pod has run outside the mesh since it began to leave.
        if self.leaving.is_some() && namespace.adoption == Adoption::None {
            namespace.adoption = Adoption::Recent;
        }
        namespace
    }

    /// The containers of its attachments, and those that the agent found in its namespace.
    fn containers(&self) -> impl Iterator<Item = &String> {
        self.attachments.keys().map(|attachment| &attachment.container_id).chain(&self.containers)
    }

    fn knows(&self, container_id: &str) -> bool {
        self.containers().any(|container| container == container_id)
    }
}

impl<D: Datapath + Send + 'static> Pods<D> {
    pub(crate) fn new(
        kernel: DatapathHandle<D>,
        proxies: Handle,
        defaults: Defaults,
        host_cookie: u64,
        watch: Option<Arc<Watch>>,
        checkpoints: Checkpoints,
    ) -> Self {
        Self {
            kernel,
            proxies,
            defaults,
            host_cookie,
            watch,
            checkpoints,
            repairs: Repairs::default(),
            slots: Slots::default(),
            ownership: Ownership::default(),
            awaiting: Mutex::default(),
            adds: AtomicU64::new(0),
            looked_at: AtomicU64::new(u64::MAX),
        }
    }

    /// Captures a pod whose sandbox is being set up, and announces it to the proxy. On an error, it does neither.
    pub(crate) async fn add(
        &self,
        attachment: Attachment,
        wanted: Wanted,
        netns: NetNs,
    ) -> Result<(), Error> {
        let uid = wanted.identity.uid.clone();
        // Registered before the wait, so that a DEL of the container waits for this ADD.
        self.ownership.begin(&attachment.container_id, &uid);
        let mut slot = self.slots.lock(&uid).await;
        let began = Instant::now();
        let (identity, addresses) = (wanted.identity.clone(), wanted.addresses.iter().copied().collect());
        let result = if self.ownership.resume(&attachment.container_id, &uid) {
            self.attach(&mut slot, attachment, wanted, netns).await
        } else {
            Err(Error::TakenDown(identity.clone()))
        };
        self.release(slot, &uid).await;
        let result = match result {
            Ok(attached) => self.serve(attached, began).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            log::not_enrolled(&identity, &addresses, began, error);
        }
        result
    }

    /// Captures the pod and announces it to the proxies. On an error, the pod stays as it was.
    async fn attach(
        &self,
        slot: &mut Guard<Enrolled>,
        attachment: Attachment,
        wanted: Wanted,
        netns: NetNs,
    ) -> Result<Attached, Error> {
        let Wanted { identity, addresses, settings } = wanted;
        refuse_another(slot.as_ref(), &identity)?;
        let namespace = self.introduce(&identity, &netns).await?;
        if let Some(old) = slot.take_if(|known| known.target.netns_cookie != namespace.cookie) {
            tracing::info!(pod = %identity, uid = identity.uid, "pod has a new sandbox");
            self.remove_or_log(&old.target).await;
        }
        // The slot changes last, so that an error leaves an enrolled pod as it was.
        let before = slot.as_ref().cloned();
        let mut enrolled = match &before {
            Some(known) => known.clone(),
            None => Enrolled {
                phase: Phase::Begun,
                ..Enrolled::new(self.defaults.target(
                    identity.clone(),
                    &settings,
                    PodAddresses::default(),
                    netns.clone(),
                    namespace,
                ))
            },
        };
        let number = self.adds.fetch_add(1, Ordering::Relaxed);
        enrolled.attachments.insert(attachment.clone(), addresses.clone());
        enrolled.adding.insert(attachment.clone(), number);
        let all = union(&enrolled.attachments, &enrolled.declared);
        if all.is_empty() {
            return Err(Error::NoAddresses(identity));
        }
        let mut namespace = enrolled.introduction();
        enrolled.leaving = None;
        if namespace.adoption == Adoption::Awaited {
            // The plugin has added the pod, so it is captured at once.
            namespace.adoption = Adoption::Recent;
        }
        enrolled.target = self.defaults.target(identity, &settings, all, netns, namespace);
        enrolled.settings = settings;
        if before.is_none() {
            self.save(&enrolled).await?;
        }
        self.own(&enrolled.target).await;
        self.claim(&enrolled.target, addresses);
        self.follow(&enrolled.target);
        let captured = match self.apply_owned(&enrolled.target).await {
            Ok(outcome) => self.announce(&enrolled.target).map(|announced| (outcome.observation, announced)),
            Err(error) => Err(error),
        };
        match captured {
            Ok((observation, announcement)) => {
                enrolled.observation = observation;
                enrolled.captured = true;
                **slot = Some(enrolled.clone());
                Ok(Attached { attachment, number, enrolled, before, announcement })
            }
            Err(error) => {
                match &before {
                    Some(known) => self.put_back(&known.target).await,
                    None => self.remove_or_log(&enrolled.target).await,
                }
                Err(error)
            }
        }
    }

    /// Waits for the proxy and completes the ADD. On an error, undoes it.
    async fn serve(&self, attached: Attached, began: Instant) -> Result<(), Error> {
        let Attached { attachment, number, enrolled, before, announcement } = attached;
        let target = &enrolled.target;
        let handed = Instant::now();
        let served = announcement.acknowledged(self.defaults.proxy_deadline).await;
        let proxy = handed.elapsed();
        if served.is_ok() {
            events().enrolled("proxy", proxy);
            if enrolled.observation.namespace.ipv6 && !target.addresses.ipv6.is_empty() {
                self.tell_of_ipv6(target).await;
            }
        }
        let uid = &target.identity.uid;
        let withdrawn = || AddError::Withdrawn { pod: target.identity.to_string() }.into();
        let Some(mut slot) = self.slots.find(uid).await else { return Err(withdrawn()) };
        let result = match (&mut *slot, served) {
            (Some(known), served) if known.adding.get(&attachment) == Some(&number) => {
                known.adding.remove(&attachment);
                match served {
                    Ok(()) => {
                        let saved = self.save(&Enrolled { phase: Phase::Done, ..known.clone() }).await;
                        if saved.is_ok() {
                            log::captured(&known.target, &known.observation, began, proxy);
                            if known.phase == Phase::Begun {
                                known.phase = Phase::Done;
                                known.since = Instant::now();
                            }
                        } else {
                            // The next agent would roll the enrollment back, and the pod would run outside the mesh.
                            self.detach(&mut slot, &attachment, &enrolled, before).await;
                        }
                        saved
                    }
                    Err(error) => {
                        self.detach(&mut slot, &attachment, &enrolled, before).await;
                        Err(error.into())
                    }
                }
            }
            // A DEL removed the attachment, or another ADD replaced it.
            (_, Ok(())) => Err(withdrawn()),
            (_, Err(error)) => Err(error.into()),
        };
        self.release(slot, uid).await;
        result
    }

    /// Undoes an ADD's changes to a pod, but no later changes.
    async fn detach(
        &self,
        slot: &mut Guard<Enrolled>,
        attachment: &Attachment,
        added: &Enrolled,
        before: Option<Enrolled>,
    ) {
        let Some(known) = &mut **slot else { return };
        // An earlier ADD of this attachment counts only if it had completed before this one replaced it.
        let ended = before.as_ref().filter(|before| !before.adding.contains_key(attachment));
        match ended.and_then(|before| before.attachments.get(attachment)) {
            Some(addresses) => _ = known.attachments.insert(attachment.clone(), addresses.clone()),
            None => _ = known.attachments.remove(attachment),
        }
        // An adopted pod has no attachments.
        let was_adopted = before.as_ref().is_some_and(|before| before.attachments.is_empty());
        if known.attachments.is_empty() && !was_adopted {
            self.remove_or_log(&known.target).await;
            **slot = None;
            return;
        }
        if let Some(before) = before {
            if known.settings == added.settings {
                known.settings = before.settings;
            }
            if known.target.identity == added.target.identity {
                known.target.identity = before.target.identity;
            }
        }
        let all = union(&known.attachments, &known.declared);
        let Target { identity, netns, .. } = known.target.clone();
        let namespace = known.target.introduction();
        known.target = self.defaults.target(identity, &known.settings, all, netns, namespace);
        self.put_back(&known.target).await;
        self.keep(known).await;
    }

    /// Restores an enrolled pod after a failed change.
    async fn put_back(&self, target: &Target) {
        self.ownership.keep(target.netns_cookie, &target.addresses);
        if let Err(error) = self.apply(target).await {
            // The pod is still captured, and the next resync tries again.
            tracing::warn!(pod = %target.identity, %error, "cannot roll back a failed change to the pod yet");
        }
        if let Err(error) = self.hand_over(target) {
            tracing::warn!(pod = %target.identity, %error, "cannot announce the pod to the node proxy again");
        }
    }

    /// Warns of a proxy that listens only in IPv4, because it acknowledges pods all the same. Checks only the first pod of each
    /// proxy: the kernel takes milliseconds to list sockets, too long to do for every pod.
    async fn tell_of_ipv6(&self, target: &Target) {
        let newest = self.proxies.connections().borrow().iter().map(|peer| peer.id).max();
        let Some(newest) = newest else { return };
        if self.looked_at.swap(newest, Ordering::Relaxed) == newest {
            return;
        }
        let netns = target.netns.clone();
        let served = self.kernel.run(move |datapath| datapath.served(&netns)).await;
        match served {
            Ok(Ok(served)) if served.contains(&Family::Ipv6) => {}
            Err(_) => {}
            Ok(Ok(_)) => tracing::warn!(
                pod = %target.identity,
                uid = target.identity.uid,
                "node proxy listens in IPv4 only: the pod's IPv6 connections fail; was the proxy started \
                 with IPV6_ENABLED=false?"
            ),
            Ok(Err(error)) => {
                tracing::warn!(pod = %target.identity, %error, "cannot observe the node proxy's listeners");
            }
        }
    }

    /// Enrolls a running pod in the namespace that has its addresses. The agent announces it to the proxies first, and captures
    /// nothing until one serves it ([`Self::served`]).
    pub(crate) async fn adopt(&self, wanted: Wanted, sandboxes: Vec<Sandbox>) -> Result<(), Error> {
        let uid = wanted.identity.uid.clone();
        // Registered before the check for a DEL, so that a later DEL waits for this adoption.
        let containers = || sandboxes.iter().flat_map(|sandbox| &sandbox.containers);
        self.ownership.find(containers(), &uid);
        let mut slot = self.slots.lock(&uid).await;
        // The previous holder of the slot has reset the pod's containers.
        self.ownership.find(containers(), &uid);
        let result = match &mut *slot {
            // The plugin has added the pod in the meantime.
            Some(known) => self.change(known, &wanted).await,
            None => match self.take_in(&wanted, sandboxes).await {
                Ok(enrolled) => self.capture(slot.insert(enrolled)).await,
                Err(error) => Err(error),
            },
        };
        self.release(slot, &uid).await;
        result
    }

    async fn take_in(&self, wanted: &Wanted, sandboxes: Vec<Sandbox>) -> Result<Enrolled, Error> {
        let began = Instant::now();
        let Wanted { identity, addresses, settings } = wanted.clone();
        let mut foreign = None;
        let mut found = None;
        for Sandbox { netns, containers } in sandboxes {
            if self.ownership.is_retired(&containers) {
                foreign = Some(Error::TakenDown(identity.clone()));
                continue;
            }
            let namespace = match self.introduce(&identity, &netns).await {
                Err(Error::HostNetwork(_)) => continue,
                namespace => namespace?,
            };
            match self.holds(&identity, &netns, &addresses).await {
                Ok(()) => found = Some((netns, namespace, containers)),
                Err(error) => foreign = Some(error),
            }
            if found.is_some() {
                break;
            }
        }
        let Some((netns, namespace, containers)) = found else {
            return Err(foreign.unwrap_or(Error::NoNamespace(identity)));
        };
        let all = addresses.iter().copied().collect();
        // A pod that the kernel already captures stays captured, even without a checkpoint.
        let adoption = if namespace.enrolled { Adoption::None } else { Adoption::Awaited };
        // The pod may open connections until it is captured.
        let namespace = Introduction { adoption, earlier_connections: true, ..namespace };
        let target = self.defaults.target(identity, &settings, all, netns, namespace);
        let target = self.divided(target).await?;
        let mut enrolled = Enrolled { declared: addresses, containers, settings, ..Enrolled::new(target) };
        self.own(&enrolled.target).await;
        self.claim(&enrolled.target, enrolled.target.addresses.iter());
        self.follow(&enrolled.target);
        // For a pod that waits for a proxy, this only checks that it can be captured.
        let captured = match self.apply_owned(&enrolled.target).await {
            Ok(outcome) => self.hand_over(&enrolled.target).map(|()| outcome.observation),
            Err(error) => Err(error),
        };
        match captured {
            Ok(observation) => enrolled.observation = observation,
            Err(error) => {
                self.clear(&enrolled.target).await;
                return Err(error);
            }
        }
        if adoption == Adoption::None {
            enrolled.captured = true;
            self.keep(&mut enrolled).await;
            log::captured(&enrolled.target, &enrolled.observation, began, Duration::ZERO);
        }
        Ok(enrolled)
    }

    /// Captures a waiting pod if a proxy serves it.
    async fn capture(&self, known: &mut Enrolled) -> Result<(), Error> {
        let uid = &known.target.identity.uid;
        if !known.target.adoption.awaits() || self.proxies.pod(uid) != PodProxyState::Acknowledged {
            return Ok(());
        }
        let netns = known.target.netns.clone();
        match self.kernel.run(move |datapath| datapath.served(&netns)).await? {
            Ok(served) if known.target.addresses.families().any(|family| served.contains(&family)) => {}
            Ok(_) => {
                tracing::debug!(pod = %known.target.identity, "the node proxy does not listen for the pod yet");
                return Ok(());
            }
            Err(source) => return Err(Error::Listeners { pod: known.target.identity.clone(), source }),
        }
        if known.target.adoption == Adoption::Elsewhere {
            self.come_over(known).await
        } else {
            self.capture_served(known).await
        }
    }

    /// Takes a pod over from the other placement: attaches everything first, then moves new connections to this placement in one
    /// step.
    async fn come_over(&self, known: &mut Enrolled) -> Result<(), Error> {
        let began = Instant::now();
        self.apply(&known.target.adopted(Adoption::Joining)).await?;
        let target = known.target.adopted(Adoption::Moved);
        let observation = self.apply(&target).await?.observation;
        *known = Enrolled { target, observation, captured: true, since: Instant::now(), ..known.clone() };
        self.keep(known).await;
        log::captured(&known.target, &known.observation, began, Duration::ZERO);
        Ok(())
    }

    /// Continues to take a pod over from the other placement. Once that placement's proxies have none of the pod's connections,
    /// removes what it left.
    pub(crate) async fn settle(&self, uid: &str) -> Result<(), Error> {
        let Some(mut slot) = self.slots.find_idle(uid).await else { return Ok(()) };
        let Some(known) = slot.as_mut().filter(|known| known.target.adoption.is_divided()) else {
            return Ok(());
        };
        self.capture(known).await?;
        let target = known.target.clone();
        if target.adoption == Adoption::Moved
            && matches!(self.kernel.run(move |datapath| datapath.drained(&target)).await?, Ok(true))
        {
            known.target = known.target.adopted(Adoption::None);
            self.keep(known).await;
            self.repair(known).await;
        }
        self.note_awaiting(uid, slot.as_ref());
        Ok(())
    }

    /// The target with the progress of its move from the other placement, if there is one.
    async fn divided(&self, target: Target) -> Result<Target, Error> {
        let copy = target.clone();
        let division = self.kernel.run(move |datapath| datapath.division(&copy)).await??;
        Ok(division.map_or(target.clone(), |adoption| target.adopted(adoption)))
    }

    async fn capture_served(&self, known: &mut Enrolled) -> Result<(), Error> {
        let began = Instant::now();
        // An application may have set sysctls in the meantime.
        let foreign = self.introduce(&known.target.identity, &known.target.netns).await?.sysctls;
        let target = Target { foreign, ..known.target.adopted(Adoption::Recent) };
        let begun = Enrolled { target, phase: Phase::Begun, ..known.clone() };
        self.save(&begun).await?;
        match self.apply(&begun.target).await {
            Ok(Outcome { observation, .. }) => {
                let phase = Phase::Done;
                *known = Enrolled { observation, phase, captured: true, since: Instant::now(), ..begun };
                self.keep(known).await;
                log::captured(&known.target, &known.observation, began, Duration::ZERO);
                if known.observation.namespace.ipv6 && !known.target.addresses.ipv6.is_empty() {
                    self.tell_of_ipv6(&known.target).await;
                }
                Ok(())
            }
            Err(error) => {
                self.discard_or_log(begun.target.netns_cookie).await;
                Err(error)
            }
        }
    }

    /// The waiting pods that a proxy serves by now. The caller has to [`Self::update`] them.
    pub(crate) fn served(&self) -> Vec<String> {
        let served = |uid: &&String| self.proxies.pod(uid) == PodProxyState::Acknowledged;
        self.awaiting.lock().iter().filter(served).cloned().collect()
    }

    /// Notifies of possible changes to the set of pods that proxies serve.
    pub(crate) fn proxy_changes(&self) -> watch::Receiver<u64> {
        self.proxies.changes()
    }

    /// Applies a pod's state in Kubernetes, if the pod is enrolled. Returns whether it is. On an error, the pod stays as it was.
    pub(crate) async fn update(&self, wanted: &Wanted) -> Result<bool, Error> {
        let uid = &wanted.identity.uid;
        let Some(mut slot) = self.slots.find(uid).await else { return Ok(false) };
        let Some(known) = &mut *slot else { return Ok(false) };
        let mut result = self.change(known, wanted).await;
        if result.is_ok() {
            result = self.capture(known).await;
        }
        self.note_awaiting(uid, slot.as_ref());
        result.map(|()| true)
    }

    async fn change(&self, known: &mut Enrolled, wanted: &Wanted) -> Result<(), Error> {
        let began = Instant::now();
        refuse_another(Some(known), &wanted.identity)?;
        let readdressed = known.declared != wanted.addresses && !wanted.addresses.is_empty();
        if readdressed {
            self.holds(&wanted.identity, &known.target.netns, &wanted.addresses).await?;
        }
        // Kubernetes clears the addresses of a pod that has ended before it deletes the pod.
        let declared = if readdressed { &wanted.addresses } else { &known.declared }.clone();
        let namespace = known.introduction();
        let wanted_target = self.defaults.target(
            wanted.identity.clone(),
            &wanted.settings,
            union(&known.attachments, &declared),
            known.target.netns.clone(),
            namespace,
        );
        if !differs(&wanted_target, &known.target) {
            known.declared = declared;
            return Ok(());
        }
        if readdressed {
            self.claim(&wanted_target, wanted.addresses.iter().copied());
        }
        known.observation = self.apply(&wanted_target).await?.observation;
        self.ownership.keep(wanted_target.netns_cookie, &wanted_target.addresses);
        self.hand_over(&wanted_target)?;
        log::changed(&wanted_target, began);
        known.declared = declared;
        known.settings = wanted.settings.clone();
        known.target = wanted_target;
        if known.leaving.take().is_some() {
            known.since = Instant::now();
        }
        known.captured = known.target.adoption != Adoption::Awaited;
        self.keep(known).await;
        Ok(())
    }

    /// Begins to un-enroll a pod: its new connections go directly at once, and those at the proxy may continue for the grace
    /// period. Returns how much of that is left; `None` means that the caller can forget the pod.
    pub(crate) async fn leave(&self, uid: &str, grace: Duration) -> Option<Duration> {
        let mut slot = self.slots.find(uid).await?;
        // A waiting pod needs no grace: nothing of it is captured, or only in the other placement, which is about to end.
        let known = slot.as_mut().filter(|known| !known.target.adoption.awaits())?;
        let since = known.leaving.unwrap_or_else(Instant::now);
        let left = grace.checked_sub(since.elapsed()).filter(|left| !left.is_zero())?;
        if known.leaving.is_none() {
            known.leaving = Some(since);
            known.target = known.target.released();
            self.stop_capturing([&known.target]).await;
            self.keep(known).await;
            log::leaving(&known.target, grace);
        }
        Some(left)
    }

    /// Un-enrolls a pod. Returns whether it was enrolled. On an error, the pod stays known, so that the caller can try again.
    pub(crate) async fn forget(&self, uid: &str) -> Result<bool, Error> {
        let Some(mut slot) = self.slots.find(uid).await else { return Ok(false) };
        let outcome = self.let_go(&mut slot).await;
        self.release(slot, uid).await;
        outcome
    }

    /// Forgets an attachment, and un-enrolls the pod with its last one. Succeeds if the attachment is unknown. On an error, the
    /// pod stays known, so that the runtime can repeat the DEL.
    pub(crate) async fn del(&self, attachment: &Attachment) -> Result<(), Error> {
        self.ownership.retire(&attachment.container_id);
        let Some(uid) = self.ownership.pod_of(&attachment.container_id) else { return Ok(()) };
        let Some(mut slot) = self.slots.find(&uid).await else { return Ok(()) };
        let mut outcome = Ok(());
        if let Some(known) = &mut *slot {
            let attached = known.attachments.remove(attachment);
            known.adding.remove(attachment);
            // An adopted pod has no attachments: its sandbox's container stands for all of them.
            if attached.is_none() && !known.containers.contains(&attachment.container_id) {
                tracing::debug!(pod = %known.target.identity, ?attachment, "late removal of an older \
                     sandbox");
            } else if known.attachments.is_empty() {
                outcome = self.end(known).await;
                if outcome.is_ok() {
                    *slot = None;
                } else {
                    known.removing = true;
                    known.attachments.extend(attached.map(|addresses| (attachment.clone(), addresses)));
                }
            } else {
                known.target.addresses = union(&known.attachments, &known.declared);
                self.ownership.keep(known.target.netns_cookie, &known.target.addresses);
                self.repair(known).await;
                self.keep(known).await;
            }
        }
        self.release(slot, &uid).await;
        outcome
    }

    /// Un-enrolls the pod in a slot, and returns whether there was one. On an error, the pod stays known, so that the caller can
    /// try again.
    async fn let_go(&self, slot: &mut Guard<Enrolled>) -> Result<bool, Error> {
        let Some(known) = &mut **slot else { return Ok(false) };
        let outcome = self.end(known).await;
        known.removing = outcome.is_err();
        outcome?;
        **slot = None;
        Ok(true)
    }

    async fn end(&self, known: &Enrolled) -> Result<(), Error> {
        let began = Instant::now();
        let proxy = self.remove(&known.target).await?;
        if known.removing {
            self.tidy(&known.target).await?;
        }
        log::no_longer_captured(&known.target, began, proxy);
        Ok(())
    }

    /// Removes the pod from the proxy and then from the kernel, so that the proxy's connections work until the proxy closes them.
    /// Returns how long the proxy took.
    async fn remove(&self, target: &Target) -> Result<Duration, Error> {
        let owned = self.ownership.is_of(target);
        self.stop_capturing([target]).await;
        let asked = Instant::now();
        self.take_from_proxies(target, PROXY_RELEASE).await;
        let proxy = asked.elapsed();
        // A second attempt removes what an error left.
        let failed = self.unenroll(target).await.is_err();
        if failed {
            self.unenroll(target).await?;
        }
        // Another pod may have taken the namespace in the meantime.
        if owned && self.ownership.is_of(target) {
            if failed {
                self.tidy(target).await?;
            }
            self.discard(target).await?;
            self.ownership.release(target);
        }
        Ok(proxy)
    }

    /// Stops the capture of these pods' new connections at once. If that fails for a pod, it is captured until it is un-enrolled.
    async fn stop_capturing(&self, targets: impl IntoIterator<Item = &Target>) {
        let owned = targets.into_iter().filter(|target| self.ownership.is_of(target));
        let owned: Vec<Target> = owned.cloned().collect();
        let released = self.kernel.run(move |datapath| {
            owned.iter().filter_map(|target| datapath::release(datapath, target).err()).collect::<Vec<_>>()
        });
        for error in released.await.into_iter().flatten() {
            tracing::warn!(%error, "pod is captured until it is un-enrolled");
        }
    }

    /// Makes the proxies release the pod: they close its connections and their listeners in it.
    async fn take_from_proxies(&self, target: &Target, within: Duration) {
        if let RemoveOutcome::Pending(peers) = self.proxies.remove(&target.identity.uid, within).await {
            let peers = list(peers.iter());
            tracing::warn!(pod = %target.identity, peers, "node proxy did not release the pod in time; \
                 un-enrolling anyway");
        }
    }

    /// Removes the remains of a failed step.
    async fn tidy(&self, target: &Target) -> Result<(), Error> {
        let copy = target.clone();
        let tidied = self.kernel.run(move |datapath| datapath.tidy(&copy)).await?;
        tidied.map_err(|error| Error::NotRemoved {
            pod: target.identity.clone(),
            causes: vec![error.to_string()],
        })
    }

    /// [`Self::remove`] for callers that cannot try again.
    async fn remove_or_log(&self, target: &Target) {
        if let Err(error) = self.remove(target).await {
            tracing::error!(%error, "pod was not removed completely");
            self.ownership.release(target);
        }
    }

    /// Removes the pod from the kernel without notifying the proxies, for callers that cannot try again.
    async fn clear(&self, target: &Target) {
        if !self.ownership.is_of(target) {
            return;
        }
        if let Err(error) = self.unenroll(target).await {
            tracing::error!(%error, "pod was not removed completely");
        }
        self.ownership.release(target);
        self.discard_or_log(target.netns_cookie).await;
    }

    /// Removes the pod from the kernel, unless another pod has its namespace by now.
    async fn unenroll(&self, target: &Target) -> Result<(), Error> {
        if !self.ownership.is_of(target) {
            return Ok(());
        }
        let copy = target.clone();
        let errors = self.kernel.run(move |datapath| datapath::unenroll(datapath, &copy)).await?;
        if errors.is_empty() {
            return Ok(());
        }
        let causes = errors.iter().map(ToString::to_string).collect();
        Err(Error::NotRemoved { pod: target.identity.clone(), causes })
    }

    /// Compares the kernel with the state that enrollment set up.
    pub(crate) async fn check(&self, attachment: &Attachment, addresses: &[IpAddr]) -> Result<(), Error> {
        let unknown = || Error::Unknown(attachment.container_id.clone());
        let uid = self.ownership.pod_of(&attachment.container_id).ok_or_else(unknown)?;
        let slot = self.slots.find(&uid).await.ok_or_else(unknown)?;
        let known =
            slot.as_ref().filter(|known| known.knows(&attachment.container_id)).ok_or_else(unknown)?;
        let mut target = known.target.clone();
        target.addresses.extend(addresses.iter().copied());
        let identity = target.identity.clone();
        let missing = self.kernel.run(move |datapath| datapath::missing(datapath, &target)).await??;
        let proxy = report::proxy(&self.proxies, &identity).err();
        let missing: Vec<String> = missing.iter().map(ToString::to_string).chain(proxy).collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(Error::Missing { pod: identity, missing: missing.join(", ") })
        }
    }

    /// Forgets every attachment that is not in the list.
    pub(crate) async fn collect(&self, valid: &[Attachment]) {
        let valid: HashSet<&Attachment> = valid.iter().collect();
        // An attachment whose ADD is in progress may be newer than the list.
        let added = |known: &Enrolled| {
            let added = known.attachments.keys().filter(|added| !known.adding.contains_key(added));
            added.cloned().collect::<Vec<_>>()
        };
        let known = self.slots.each(|_, known| added(known)).await;
        for stale in known.into_iter().flatten().filter(|known| !valid.contains(known)) {
            tracing::info!(
                container = stale.container_id,
                interface = stale.interface,
                "removing stale attachment"
            );
            if let Err(error) = self.del(&stale).await {
                tracing::warn!(%error, "cannot un-enroll a pod that the runtime does not know any more");
            }
        }
    }

    async fn apply(&self, target: &Target) -> Result<Outcome, Error> {
        let copy = self.ownership.held(target);
        let began = Instant::now();
        let outcome = self.kernel.run(move |datapath| datapath::enroll(datapath, &copy)).await??;
        if !outcome.made.is_empty() {
            events().enrolled("kernel", began.elapsed());
        }
        Ok(outcome)
    }

    /// [`Self::apply`] for a pod whose namespace another pod may have taken. If that pod is gone, takes the namespace back.
    async fn apply_owned(&self, target: &Target) -> Result<Outcome, Error> {
        if self.ownership.take_if_free(target) {
            self.apply(target).await
        } else {
            Err(Error::NamespaceTaken(target.identity.clone()))
        }
    }

    /// Un-enrolls every pod. Stops the capture of new connections first, then makes the proxies release all pods at once, and
    /// removes everything last.
    pub(crate) async fn shut_down(&self) {
        let pods = self.slots.drain().await;
        let began = Instant::now();
        self.stop_capturing(pods.iter().map(|known| &known.target)).await;
        let released = began.elapsed();
        join_all(pods.iter().map(|known| self.take_from_proxies(&known.target, ALL_RELEASE))).await;
        let closed = began.elapsed();
        for known in &pods {
            self.clear(&known.target).await;
        }
        tracing::info!(
            pods = pods.len(),
            capture_milliseconds = released.as_millis() as u64,
            proxy_milliseconds = (closed - released).as_millis() as u64,
            kernel_milliseconds = (began.elapsed() - closed).as_millis() as u64,
            "un-enrolled all pods"
        );
    }

    /// Writes a pod's checkpoint on a blocking thread, because its file system may be slow.
    async fn save(&self, enrolled: &Enrolled) -> Result<(), Error> {
        if enrolled.target.adoption == Adoption::Awaited {
            return Ok(());
        }
        let (checkpoints, checkpoint) = (self.checkpoints.clone(), enrolled.checkpoint());
        let saved = on_disk(move || checkpoints.write(&checkpoint)).await;
        saved.map_err(|source| Error::Checkpoint {
            pod: enrolled.target.identity.clone(),
            source: source.into(),
        })
    }

    /// [`Self::save`] for a pod that stays enrolled in any case. After a failure, the next resync writes the checkpoint.
    async fn keep(&self, enrolled: &mut Enrolled) {
        let saved = self.save(enrolled).await;
        enrolled.unsaved = saved.is_err();
        if let Err(error) = saved {
            tracing::warn!(%error, "the next agent would not find the pod as it is");
        }
    }

    /// Removes a pod's checkpoint.
    async fn discard(&self, target: &Target) -> Result<(), Error> {
        let (checkpoints, netns_cookie) = (self.checkpoints.clone(), target.netns_cookie);
        let removed = on_disk(move || checkpoints.remove(netns_cookie)).await;
        removed.map_err(|source| Error::Checkpoint { pod: target.identity.clone(), source: source.into() })
    }

    /// [`Self::discard`] for callers that cannot try again.
    async fn discard_or_log(&self, netns_cookie: u64) {
        let checkpoints = self.checkpoints.clone();
        if let Err(error) = on_disk(move || checkpoints.remove(netns_cookie)).await {
            tracing::warn!(%error, "the next agent will find a pod that is gone");
        }
    }

    /// The UIDs of all pods.
    pub(crate) async fn uids(&self) -> Vec<String> {
        self.slots.names().await
    }

    /// The connected proxies, updated as they come and go.
    pub(crate) fn connections(&self) -> watch::Receiver<Vec<Peer>> {
        self.proxies.connections()
    }

    /// Examines a pod's namespace. Fails if it is the host's.
    async fn introduce(&self, identity: &PodIdentity, netns: &NetNs) -> Result<Introduction, Error> {
        let netns = netns.clone();
        match self.kernel.run(move |datapath| datapath.introduce(&netns)).await? {
            Ok(namespace) if namespace.cookie == self.host_cookie => {
                Err(Error::HostNetwork(identity.clone()))
            }
            Ok(namespace) => Ok(namespace),
            Err(source) => Err(Error::Cookie { pod: identity.clone(), source }),
        }
    }

    /// Fails unless the namespace has all of these addresses.
    async fn holds(&self, identity: &PodIdentity, netns: &NetNs, addresses: &[IpAddr]) -> Result<(), Error> {
        let netns = netns.clone();
        let held = self.kernel.run(move |datapath| datapath.addresses(&netns)).await?;
        let held = held.map_err(|source| Error::Addresses { pod: identity.clone(), source })?;
        match addresses.iter().map(IpAddr::to_canonical).find(|address| !held.contains(address)) {
            Some(address) => Err(Error::ForeignAddress { pod: identity.clone(), address }),
            None => Ok(()),
        }
    }

    /// Attributes the namespace to the pod, and makes the proxy release the pod that had it before.
    async fn own(&self, target: &Target) {
        if let Some(before) = self.ownership.take(target) {
            tracing::info!(pod = %target.identity, %before, "network namespace was attributed to another \
                 pod");
            self.proxies.remove(&before.uid, PROXY_RELEASE).await;
        }
    }

    /// Announces a pod to the proxies, without waiting for them.
    fn hand_over(&self, target: &Target) -> Result<(), Error> {
        self.tell_proxies(target, || self.proxies.set(workload(target)))
    }

    /// The same, but the caller can wait for the acknowledgement.
    fn announce(&self, target: &Target) -> Result<Announcement, Error> {
        self.tell_proxies(target, || self.proxies.announce(workload(target)))
    }

    /// Runs `tell` unless another pod has the namespace by now: the proxies would attribute that pod's connections to this one.
    fn tell_proxies<T>(
        &self,
        target: &Target,
        tell: impl FnOnce() -> Result<T, InvalidWorkload>,
    ) -> Result<T, Error> {
        // A pod that takes the namespace later makes the proxies release this pod, after this announcement.
        let told = self.ownership.while_owned(target, tell);
        Ok(told.ok_or_else(|| Error::NamespaceTaken(target.identity.clone()))??)
    }

    /// Attributes addresses to the pod.
    fn claim(&self, target: &Target, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses = addresses.into_iter().map(|address| address.to_canonical());
        for (address, before) in self.ownership.claim(target.netns_cookie, addresses) {
            tracing::warn!(
                pod = %target.identity,
                %address,
                before = %before.unwrap_or_default(),
                "address belongs to another pod that was not torn down: that pod is no longer captured at \
                 this address"
            );
        }
    }

    /// The pod that has this namespace, even while an operation on it runs.
    pub(crate) fn owner(&self, netns_cookie: u64) -> Option<PodIdentity> {
        self.ownership.owner(netns_cookie)
    }

    fn follow(&self, target: &Target) {
        if let Some(watch) = &self.watch
            && let Err(error) = watch.follow(&target.identity.uid, &target.netns)
        {
            tracing::warn!(pod = %target.identity, %error, "cannot watch the pod's interfaces; interfaces \
                 that it gets later are not captured");
        }
    }

    fn note_awaiting(&self, uid: &str, known: Option<&Enrolled>) {
        let mut awaiting = self.awaiting.lock();
        if known.is_some_and(|known| known.target.adoption.awaits()) {
            awaiting.insert(uid.to_owned());
        } else {
            awaiting.remove(uid);
        }
    }

    /// Releases a pod's slot after an operation.
    async fn release(&self, slot: Guard<Enrolled>, uid: &str) {
        self.ownership.settle(uid, slot.iter().flat_map(Enrolled::containers));
        self.note_awaiting(uid, slot.as_ref());
        if slot.is_none()
            && let Some(watch) = &self.watch
        {
            watch.unfollow(uid);
        }
        self.slots.release(uid, slot).await;
    }
}

/// Fails if the agent ends in the meantime.
async fn on_disk(work: impl FnOnce() -> Result<(), Failed> + Send + 'static) -> Result<(), Failed> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Failed::Ending))
}

/// Refuses a second pod with a known UID.
fn refuse_another(known: Option<&Enrolled>, identity: &PodIdentity) -> Result<(), Error> {
    match known.map(|known| &known.target.identity) {
        Some(other) if (&other.namespace, &other.name) != (&identity.namespace, &identity.name) => {
            Err(Error::SameUid {
                pod: identity.to_string(),
                other: other.to_string(),
                uid: identity.uid.clone(),
            })
        }
        Some(_) | None => Ok(()),
    }
}

impl Defaults {
    fn target(
        self,
        identity: PodIdentity,
        settings: &PodSettings,
        addresses: PodAddresses,
        netns: NetNs,
        namespace: Introduction,
    ) -> Target {
        let flags = PodFlags::default()
            .with(PodFlags::BYPASS_INBOUND, settings.bypass_inbound)
            .with(PodFlags::DNS, settings.dns.unwrap_or(self.dns))
            .with(PodFlags::ANY_SOURCE, settings.any_source.unwrap_or(self.any_source))
            .with(
                PodFlags::EARLIER_CONNECTIONS,
                namespace.earlier_connections || namespace.adoption.is_divided(),
            )
            .with(PodFlags::HALF_OPEN, namespace.adoption.is_live());
        Target {
            identity,
            netns,
            netns_cookie: namespace.cookie,
            addresses,
            flags,
            virtual_interfaces: settings.virtual_interfaces.clone(),
            exclusions: settings.exclusions.clone(),
            foreign: namespace.sysctls,
            adoption: namespace.adoption,
        }
    }

    /// The target of a checkpoint's pod.
    pub(crate) fn checkpointed(self, checkpoint: &Checkpoint, netns: NetNs) -> Target {
        let attached = checkpoint.attachments.iter().flat_map(|(_, addresses)| addresses);
        let addresses = attached.chain(&checkpoint.declared).copied().collect();
        let namespace = Introduction {
            cookie: checkpoint.netns_cookie,
            sysctls: checkpoint.foreign.clone(),
            earlier_connections: checkpoint.earlier_connections,
            enrolled: true,
            adoption: if checkpoint.recent { Adoption::Recent } else { Adoption::None },
        };
        let target =
            self.target(checkpoint.identity.clone(), &checkpoint.settings, addresses, netns, namespace);
        if checkpoint.leaving { target.released() } else { target }
    }
}

fn differs(a: &Target, b: &Target) -> bool {
    let of = |target: &Target| {
        let Target { identity, addresses, flags, virtual_interfaces, exclusions, .. } = target.clone();
        (identity, addresses, flags, virtual_interfaces, exclusions)
    };
    of(a) != of(b)
}

fn workload(target: &Target) -> Workload {
    let identity = &target.identity;
    Workload {
        uid: identity.uid.clone(),
        info: WorkloadInfo {
            name: identity.name.clone(),
            namespace: identity.namespace.clone(),
            service_account: identity.service_account.clone(),
        },
        netns: Some(target.netns.descriptor()),
    }
}

fn union(attachments: &BTreeMap<Attachment, Vec<IpAddr>>, declared: &[IpAddr]) -> PodAddresses {
    attachments.values().flatten().chain(declared).copied().collect()
}

fn list(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
