//! The holders of each address: the pods for which it was named (by the CNI plugin or by Kubernetes), and those whose interfaces
//! have it.
//!
//! A process that may configure a pod's interfaces can put any address there. So such an address counts as the pod's only if it
//! is named for no other pod and is on no other pod's interfaces: independent networks may use the same addresses.

use std::collections::HashMap;
use std::net::IpAddr;

use redirect_protocol::pod::PodAddresses;

/// How many addresses are learned from a pod's interfaces: all pods share the maps, and an interface can have any number of
/// addresses. Connections of the others are captured as well, but count for no pod.
const MOST: usize = 64;

/// The holders of addresses, by the cookies of their namespaces.
#[derive(Debug, Default)]
pub(super) struct Holders {
    by_address: HashMap<IpAddr, Vec<Holder>>,
    by_pod: HashMap<u64, Vec<IpAddr>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    cookie: u64,
    /// Whether it was named for the pod.
    named: bool,
}

/// The result of comparing a pod's interfaces with the other pods.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Learned {
    /// The pod's addresses that were not named.
    pub(super) own: PodAddresses,
    /// Addresses that are on several pods' interfaces and named for none.
    pub(super) contested: Vec<IpAddr>,
}

impl Holders {
    /// Records the addresses named for a pod, and those on its interfaces.
    pub(super) fn note(&mut self, cookie: u64, named: &PodAddresses, found: &[IpAddr]) -> Learned {
        self.forget(cookie);
        let mut learned = Learned::default();
        for address in named.iter() {
            self.add(address, Holder { cookie, named: true });
        }
        for address in found.iter().take(MOST) {
            let others = self.by_address.get(address).map_or(&[][..], Vec::as_slice);
            if others.iter().any(|other| other.cookie == cookie) {
                continue;
            }
            match others {
                [] => learned.own.extend([*address]),
                others if others.iter().any(|other| other.named) => {}
                _ => learned.contested.push(*address),
            }
            self.add(*address, Holder { cookie, named: false });
        }
        learned
    }

    /// Removes the pod.
    pub(super) fn forget(&mut self, cookie: u64) {
        for address in self.by_pod.remove(&cookie).into_iter().flatten() {
            if let Some(holders) = self.by_address.get_mut(&address) {
                holders.retain(|holder| holder.cookie != cookie);
                if holders.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
    }

    fn add(&mut self, address: IpAddr, holder: Holder) {
        self.by_address.entry(address).or_default().push(holder);
        self.by_pod.entry(holder.cookie).or_default().push(address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn note(
        holders: &mut Holders,
        cookie: u64,
        named: &[&str],
        found: &[&str],
    ) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let learned = holders.note(cookie, &list(named).into_iter().collect(), &list(found));
        (learned.own.iter().collect(), learned.contested)
    }

    #[test]
    fn what_is_on_one_pod_s_interfaces_alone_is_its_own() {
        for [named, found] in [["10.0.0.1", "192.168.5.7"], ["fd00::1", "fd05::7"]] {
            let mut holders = Holders::default();
            let own = (list(&[found]), Vec::new());
            for _ in 0..2 {
                assert_eq!(note(&mut holders, 1, &[named], &[named, found]), own);
            }
            // Another network has the same address, until its pod ends or loses it.
            assert_eq!(note(&mut holders, 2, &[], &[found]), (Vec::new(), list(&[found])));
            assert_eq!(note(&mut holders, 1, &[named], &[found]), (Vec::new(), list(&[found])));
            assert_eq!(note(&mut holders, 2, &[], &[]), Default::default());
            assert_eq!(note(&mut holders, 1, &[named], &[found]), own);
            holders.forget(1);
            assert!(holders.by_address.is_empty() && holders.by_pod.is_empty());
        }
    }

    #[test]
    fn only_so_many_count() {
        let found: Vec<IpAddr> = (0..=MOST).map(|number| [10, 0, 0, number as u8].into()).collect();
        let learned = Holders::default().note(1, &PodAddresses::default(), &found);
        assert_eq!(learned.own.iter().collect::<Vec<_>>(), found[..MOST]);
    }

    #[test]
    fn what_was_named_is_nobody_else_s() {
        for address in ["10.0.0.1", "fd00::1"] {
            let mut holders = Holders::default();
            assert_eq!(note(&mut holders, 1, &[], &[address]), (list(&[address]), Vec::new()));
            assert_eq!(note(&mut holders, 2, &[address], &[address]), Default::default());
            for _ in 0..2 {
                assert_eq!(note(&mut holders, 1, &[], &[address]), Default::default());
            }
        }
    }
}
