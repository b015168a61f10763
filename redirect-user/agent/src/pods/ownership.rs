//! Records which pod has a network namespace, an address or a container.
//!
//! The namespace at a path may be another pod's by now. The runtime may also assign an address again before it tears down the pod
//! that had it, or without ever doing so. So the latest pod that was added with a namespace or an address has it, and a repair of
//! an earlier pod must not take it back. One lock protects all records, so that no reader sees half of a change.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;

use parking_lot::{Mutex, MutexGuard};

use redirect_datapath::datapath::Target;
use redirect_protocol::pod::{PodAddresses, PodIdentity};

/// How many torn-down containers are remembered.
const RETIRED: usize = 1024;

/// See the module.
#[derive(Default)]
pub(super) struct Ownership(Mutex<Owned>);

#[derive(Default)]
struct Owned {
    /// Pods by namespace cookie.
    namespaces: HashMap<u64, PodIdentity>,
    /// Namespace cookies by address.
    addresses: HashMap<IpAddr, u64>,
    /// UIDs by container ID, which a DEL names.
    containers: HashMap<String, String>,
    /// Containers whose sandboxes the runtime has torn down, newest last. Their processes and addresses may stay visible for a
    /// moment.
    retired: VecDeque<String>,
}

impl Owned {
    fn is_of(&self, target: &Target) -> bool {
        self.namespaces.get(&target.netns_cookie).is_none_or(|owner| owner.uid == target.identity.uid)
    }
}

/// Namespaces.
impl Ownership {
    /// Attributes a namespace to the pod. Returns the other pod that had it.
    pub(super) fn take(&self, target: &Target) -> Option<PodIdentity> {
        let before = self.owned().namespaces.insert(target.netns_cookie, target.identity.clone());
        before.filter(|before| before.uid != target.identity.uid)
    }

    /// Attributes a namespace to the pod, unless another pod has it. Returns whether this pod has it.
    pub(super) fn take_if_free(&self, target: &Target) -> bool {
        let mut owned = self.owned();
        owned.namespaces.entry(target.netns_cookie).or_insert_with(|| target.identity.clone());
        owned.is_of(target)
    }

    /// Releases the pod's namespace and all of its addresses, unless another pod has the namespace by now.
    pub(super) fn release(&self, target: &Target) {
        let mut owned = self.owned();
        if owned.is_of(target) {
            owned.namespaces.remove(&target.netns_cookie);
            owned.addresses.retain(|_, holder| *holder != target.netns_cookie);
        }
    }

    /// Releases a namespace that the pod took in vain, unless another pod has it by now. The addresses return to the namespace
    /// that had them before.
    pub(super) fn give_back(&self, target: &Target, from: u64, addresses: &PodAddresses) {
        let mut owned = self.owned();
        if owned.is_of(target) {
            owned.namespaces.remove(&target.netns_cookie);
            owned.addresses.extend(addresses.iter().map(|address| (address, from)));
        }
    }

    /// The pod that has a namespace.
    pub(super) fn owner(&self, cookie: u64) -> Option<PodIdentity> {
        self.owned().namespaces.get(&cookie).cloned()
    }

    /// Whether no other pod has the pod's namespace.
    pub(super) fn is_of(&self, target: &Target) -> bool {
        self.owned().is_of(target)
    }

    /// Runs `work`, which must not come after another pod has taken the namespace. Returns `None` if one has.
    pub(super) fn while_owned<T>(&self, target: &Target, work: impl FnOnce() -> T) -> Option<T> {
        let owned = self.owned();
        owned.is_of(target).then(work)
    }

    /// The pods that have namespaces.
    pub(super) fn pods(&self) -> Vec<PodIdentity> {
        self.owned().namespaces.values().cloned().collect()
    }
}

/// Addresses.
impl Ownership {
    /// Attributes addresses to the pod in a namespace. Returns those that another namespace had, with its pod if that is known.
    pub(super) fn claim(
        &self,
        cookie: u64,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Vec<(IpAddr, Option<PodIdentity>)> {
        let mut owned = self.owned();
        let Owned { addresses: holders, namespaces, .. } = &mut *owned;
        let taken = |address| {
            let before = holders.insert(address, cookie).filter(|before| *before != cookie)?;
            Some((address, namespaces.get(&before).cloned()))
        };
        addresses.into_iter().filter_map(taken).collect()
    }

    /// Releases the addresses of the pod in a namespace, except these.
    pub(super) fn keep(&self, cookie: u64, addresses: &PodAddresses) {
        let kept = |address: &IpAddr| addresses.iter().any(|other| other == *address);
        self.owned().addresses.retain(|address, holder| *holder != cookie || kept(address));
    }

    /// The pod without the addresses that other pods have.
    pub(super) fn held(&self, target: &Target) -> Target {
        let owned = self.owned();
        let is_held = |address: &IpAddr| {
            owned.addresses.get(address).is_none_or(|holder| *holder == target.netns_cookie)
        };
        Target { addresses: target.addresses.iter().filter(is_held).collect(), ..target.clone() }
    }
}

/// Containers.
impl Ownership {
    /// Registers a container that is being set up, so that its DEL finds the pod.
    pub(super) fn begin(&self, container: &str, uid: &str) {
        let mut owned = self.owned();
        owned.containers.insert(container.into(), uid.into());
        owned.retired.retain(|retired| retired != container);
    }

    /// Registers the container again, once no other operation can reset the pod's containers. Returns `false` if the runtime has
    /// torn it down in the meantime.
    pub(super) fn resume(&self, container: &str, uid: &str) -> bool {
        let mut owned = self.owned();
        let is_retired = owned.retired.iter().any(|retired| retired == container);
        if !is_retired {
            owned.containers.insert(container.into(), uid.into());
        }
        !is_retired
    }

    /// Registers running containers.
    pub(super) fn find<'a>(&self, containers: impl Iterator<Item = &'a String>, uid: &str) {
        self.owned().containers.extend(containers.map(|container| (container.clone(), uid.to_owned())));
    }

    /// Sets the containers of a pod, and drops its others.
    pub(super) fn settle<'a>(&self, uid: &str, containers: impl Iterator<Item = &'a String>) {
        let mut owned = self.owned();
        owned.containers.retain(|_, of| of != uid);
        owned.containers.extend(containers.map(|container| (container.clone(), uid.to_owned())));
    }

    /// The UID of the pod that has a container.
    pub(super) fn pod_of(&self, container: &str) -> Option<String> {
        self.owned().containers.get(container).cloned()
    }

    /// Remembers that the runtime tears down a container's sandbox.
    pub(super) fn retire(&self, container: &str) {
        let mut owned = self.owned();
        if owned.retired.iter().any(|known| known == container) {
            return;
        }
        if owned.retired.len() == RETIRED {
            owned.retired.pop_front();
        }
        owned.retired.push_back(container.into());
    }

    /// Whether the runtime has torn down one of these containers.
    pub(super) fn is_retired(&self, containers: &BTreeSet<String>) -> bool {
        self.owned().retired.iter().any(|container| containers.contains(container))
    }

    /// The containers of pods.
    #[cfg(test)]
    pub(super) fn containers(&self) -> BTreeSet<String> {
        self.owned().containers.keys().cloned().collect()
    }

    /// The addresses that pods have.
    #[cfg(test)]
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.owned().addresses.keys().copied().collect()
    }

    fn owned(&self) -> MutexGuard<'_, Owned> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::maps::PodFlags;
    use redirect_linux::netns::NetNs;

    use redirect_datapath::datapath::Adoption;

    use super::*;

    fn target(uid: &str, netns_cookie: u64, addresses: &[&str]) -> Target {
        Target {
            identity: PodIdentity { uid: uid.into(), name: uid.into(), ..PodIdentity::default() },
            netns: NetNs::current().unwrap(),
            netns_cookie,
            addresses: addresses.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect(),
            flags: PodFlags::default(),
            virtual_interfaces: Vec::new(),
            exclusions: BTreeSet::new(),
            foreign: BTreeSet::new(),
            adoption: Adoption::None,
        }
    }

    fn addresses(target: &Target) -> Vec<String> {
        target.addresses.iter().map(|address| address.to_string()).collect()
    }

    #[test]
    fn a_namespace_is_the_latest_pod_s() {
        let ownership = Ownership::default();
        let (old, new) = (target("old", 1, &[]), target("new", 1, &[]));
        assert!(ownership.is_of(&old) && ownership.is_of(&new), "nobody has it yet");
        assert_eq!(ownership.take(&old), None);
        assert_eq!(ownership.take(&old), None, "its own");
        assert!(ownership.take_if_free(&old) && !ownership.take_if_free(&new));
        assert_eq!(ownership.take(&new), Some(old.identity.clone()));
        assert!(!ownership.is_of(&old) && ownership.owner(1) == Some(new.identity.clone()));
        assert_eq!(ownership.while_owned(&old, || panic!("not while another has it")), None::<()>);
        assert_eq!(ownership.while_owned(&new, || 7), Some(7));
        ownership.release(&old);
        assert_eq!(ownership.owner(1), Some(new.identity.clone()), "another's");
        ownership.release(&new);
        assert_eq!(ownership.owner(1), None);
    }

    #[test]
    fn an_address_of_either_family_is_the_latest_pod_s() {
        let both = ["10.0.0.1", "fd00::1"];
        let ownership = Ownership::default();
        let (old, new) = (target("old", 1, &both), target("new", 2, &both));
        ownership.take(&old);
        assert_eq!(ownership.claim(1, old.addresses.iter()), []);
        let taken = ownership.claim(2, new.addresses.iter());
        assert_eq!(
            taken.iter().map(|(_, before)| before.clone()).collect::<Vec<_>>(),
            vec![Some(old.identity.clone()); 2]
        );
        assert_eq!(addresses(&ownership.held(&old)), [""; 0]);
        assert_eq!(addresses(&ownership.held(&new)), both);
        // An address that one pod releases is the other's again.
        ownership.keep(2, &["fd00::1".parse().unwrap()].into_iter().collect::<PodAddresses>());
        assert_eq!(addresses(&ownership.held(&old)), ["10.0.0.1"]);
        ownership.release(&new);
        assert_eq!(addresses(&ownership.held(&old)), both);
    }

    #[test]
    fn what_was_taken_for_nothing_goes_back_unless_another_has_it() {
        let ownership = Ownership::default();
        let (before, after) = (target("pod", 1, &["fd00::1"]), target("pod", 2, &["fd00::1"]));
        ownership.take(&after);
        ownership.claim(2, after.addresses.iter());
        ownership.give_back(&after, 1, &before.addresses);
        assert_eq!(ownership.owner(2), None);
        assert_eq!(addresses(&ownership.held(&before)), ["fd00::1"]);
        let other = target("other", 2, &["fd00::1"]);
        ownership.take(&other);
        ownership.claim(2, other.addresses.iter());
        ownership.give_back(&after, 1, &before.addresses);
        assert_eq!(ownership.owner(2), Some(other.identity.clone()));
        assert_eq!(addresses(&ownership.held(&before)), [""; 0]);
    }

    #[test]
    fn containers_lead_to_pods_until_they_are_taken_down() {
        let ownership = Ownership::default();
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        ownership.begin("a", "pod");
        ownership.find(set(&["b"]).iter(), "other");
        assert_eq!(ownership.pod_of("a").as_deref(), Some("pod"));
        ownership.settle("pod", set(&["c"]).iter());
        assert_eq!(ownership.containers(), set(&["b", "c"]));
        for number in 0..=RETIRED {
            ownership.retire(&number.to_string());
            ownership.retire(&number.to_string());
        }
        assert!(!ownership.is_retired(&set(&["0"])), "only so many are remembered");
        assert!(ownership.is_retired(&set(&["x", "1"])));
        // The runtime may set up a torn-down container again.
        ownership.begin("1", "pod");
        assert!(!ownership.is_retired(&set(&["1"])));
        // Another operation's `settle` drops a container that is being set up. A DEL may tear it down as well.
        ownership.settle("pod", set(&["c"]).iter());
        assert!(ownership.resume("1", "pod") && ownership.pod_of("1").as_deref() == Some("pod"));
        ownership.settle("pod", set(&["c"]).iter());
        ownership.retire("1");
        assert!(!ownership.resume("1", "pod") && ownership.pod_of("1").is_none());
    }
}
