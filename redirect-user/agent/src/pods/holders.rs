//! Which pod has an address. The runtime may hand one out anew before it takes down the pod that had it, or without ever
//! doing so: the pod that was brought with it last has it, and keeping the other steered must not take it back.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Target;
use redirect_protocol::pod::PodAddresses;

/// The cookies of pods' namespaces, by address.
#[derive(Default)]
pub(super) struct Holders(Mutex<HashMap<IpAddr, u64>>);

impl Holders {
    /// Gives addresses to a pod. Returns which of them were another's, with the cookie of its namespace.
    pub(super) fn claim(
        &self,
        cookie: u64,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Vec<(IpAddr, u64)> {
        let mut holders = self.holders();
        let taken = |address| Some((address, holders.insert(address, cookie)?));
        addresses.into_iter().filter_map(taken).filter(|(_, before)| *before != cookie).collect()
    }

    /// Takes away from a pod what it has, but for these addresses.
    pub(super) fn keep(&self, cookie: u64, addresses: &PodAddresses) {
        let kept = |address: &IpAddr| addresses.iter().any(|other| other == *address);
        self.holders().retain(|address, holder| *holder != cookie || kept(address));
    }

    /// Takes away from a pod what it has.
    pub(super) fn release(&self, cookie: u64) {
        self.holders().retain(|_, holder| *holder != cookie);
    }

    /// A pod with those of its addresses that no other pod has.
    pub(super) fn held(&self, target: &Target) -> Target {
        let holders = self.holders();
        let is_held =
            |address: &IpAddr| holders.get(address).is_none_or(|holder| *holder == target.netns_cookie);
        Target { addresses: target.addresses.iter().filter(is_held).collect(), ..target.clone() }
    }

    fn holders(&self) -> MutexGuard<'_, HashMap<IpAddr, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
