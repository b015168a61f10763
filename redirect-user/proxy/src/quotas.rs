//! Each pod's share of a common resource, so that no pod can exhaust it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use parking_lot::Mutex;
use redirect_protocol::placement::Placement;

/// A pod, as a proxy distinguishes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Asker {
    /// The only pod of these listeners.
    Pod,
    /// The pod with this address; a pod has one or two.
    Address(IpAddr),
}

impl Asker {
    pub(super) fn of(placement: Placement, source: SocketAddr) -> Self {
        match placement {
            Placement::Pod => Self::Pod,
            Placement::Node => Self::Address(source.ip().to_canonical()),
        }
    }
}

/// The quota of each pod.
#[derive(Debug)]
pub(super) struct Quotas {
    most: usize,
    /// The pods that use any.
    taken: Mutex<HashMap<Asker, usize>>,
}

/// A used unit, released when it is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    quotas: Arc<Quotas>,
    asker: Asker,
}

impl Quotas {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// Takes a unit, unless the pod has reached its quota.
    pub(super) fn take(self: &Arc<Self>, asker: Asker) -> Option<Taken> {
        let mut all = self.taken.lock();
        let taken = all.entry(asker).or_default();
        if *taken >= self.most {
            return None;
        }
        *taken += 1;
        Some(Taken { quotas: Arc::clone(self), asker })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut all = self.quotas.taken.lock();
        if let Some(taken) = all.get_mut(&self.asker) {
            *taken -= 1;
            if *taken == 0 {
                all.remove(&self.asker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_takes_nothing_from_another() {
        let of = |placement, source: &str| Asker::of(placement, source.parse().unwrap());
        let quotas = Quotas::new(2);
        for (greedy, other) in [
            ("10.0.0.1:1", "10.0.0.2:1"),
            ("[fd00::1]:1", "[fd00::2]:1"),
            ("[::ffff:10.0.0.3]:1", "10.0.0.4:1"),
        ] {
            let (greedy, other) = (of(Placement::Node, greedy), of(Placement::Node, other));
            let mut taken = vec![quotas.take(greedy).unwrap(), quotas.take(greedy).unwrap()];
            assert!(quotas.take(greedy).is_none());
            assert!(quotas.take(other).is_some());
            taken.pop();
            taken.push(quotas.take(greedy).unwrap());
            assert!(quotas.take(greedy).is_none());
        }
        assert!(quotas.taken.lock().is_empty(), "who has nothing is not known");
        assert_eq!(of(Placement::Node, "[::ffff:10.0.0.3]:1"), of(Placement::Node, "10.0.0.3:2"));
        assert_eq!(of(Placement::Pod, "127.0.0.1:1"), of(Placement::Pod, "[::1]:2"));
    }
}
