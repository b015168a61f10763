//! A fake kernel that records operations, and fails on request. One instance plays every namespace; files stand in
//! for those, identified by their inodes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use redirect_ebpf::Family;

use super::{Datapath, Error, Introduction, Observation, Target};
use crate::facts::{Fact, Interface, Namespace, Op};
use redirect_linux::netns::NetNs;

/// The fake kernel's state of one namespace.
#[derive(Clone, Debug, Default)]
pub struct FakeNamespace {
    /// The namespace.
    pub namespace: Namespace,
    /// The facts that hold.
    pub facts: BTreeSet<Fact>,
    /// The addresses on its interfaces.
    pub addresses: Vec<IpAddr>,
}

/// The fake kernel's state, and a record of the calls.
#[derive(Debug, Default)]
pub struct State {
    /// By cookie.
    pub namespaces: BTreeMap<u64, FakeNamespace>,
    /// The operations that were executed.
    pub applied: Vec<Op>,
    /// How often it was observed.
    pub observed: usize,
    /// The operation that fails, counted from the first one ever executed.
    pub fail_at: Option<usize>,
    /// Whether the operations after it fail as well.
    pub fails_on: bool,
    /// By cookie.
    pub virtual_interfaces: BTreeMap<u64, Vec<String>>,
}

/// Clones share the same kernel: one works on the datapath's thread while a test inspects another.
#[derive(Clone, Debug, Default)]
pub struct Fake(Arc<Mutex<State>>);

impl Fake {
    /// Access for inspection and changes.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test has panicked")
    }

    /// Adds a namespace with `lo` and `eth0`.
    pub fn insert(&self, cookie: u64, addresses: &[IpAddr]) {
        let interface = |index, name: &str| Interface { index, name: name.into() };
        let interfaces = vec![interface(1, "lo"), interface(7, "eth0")];
        let namespace = Namespace { interfaces, ipv6: true, ..Namespace::default() };
        let addresses = addresses.to_vec();
        let namespace = FakeNamespace { namespace, facts: BTreeSet::new(), addresses };
        self.state().namespaces.insert(cookie, namespace);
    }

    /// The facts that hold in a namespace.
    pub fn facts(&self, cookie: u64) -> BTreeSet<Fact> {
        self.state().namespaces.get(&cookie).map(|known| known.facts.clone()).unwrap_or_default()
    }
}

impl Datapath for Fake {
    fn introduce(&mut self, netns: &NetNs) -> io::Result<Introduction> {
        let cookie = netns.inode()?;
        let enrolled = self.facts(cookie).iter().any(|fact| matches!(fact, Fact::Pod(_)));
        Ok(Introduction { cookie, enrolled, ..Introduction::default() })
    }

    fn observe_facts(&mut self, target: &Target) -> io::Result<BTreeSet<Fact>> {
        Ok(self.facts(target.netns_cookie))
    }

    fn addresses(&mut self, netns: &NetNs) -> io::Result<Vec<IpAddr>> {
        let inode = netns.inode()?;
        Ok(self.state().namespaces.get(&inode).map(|known| known.addresses.clone()).unwrap_or_default())
    }

    fn tidy(&mut self, _: &Target) -> io::Result<()> {
        Ok(())
    }

    fn served(&mut self, _: &NetNs) -> io::Result<BTreeSet<Family>> {
        Ok(Family::ALL.into())
    }

    fn observe(&mut self, target: &Target) -> Result<Observation, Error> {
        let mut state = self.state();
        state.observed += 1;
        match state.namespaces.get(&target.netns_cookie) {
            Some(known) => Ok(Observation {
                namespace: known.namespace.clone(),
                facts: known.facts.clone(),
                ..Observation::default()
            }),
            None => Err(Error::Namespace {
                pod: target.identity.to_string(),
                source: io::ErrorKind::NotFound.into(),
            }),
        }
    }

    fn apply(&mut self, target: &Target, op: &Op) -> Result<(), Error> {
        let (Op::Ensure(fact) | Op::Remove(fact)) = op;
        let mut state = self.state();
        if state.fail_at == Some(state.applied.len()) {
            if !state.fails_on {
                state.fail_at = None;
            }
            return Err(Error::Step {
                pod: target.identity.to_string(),
                fact: Box::new(fact.clone()),
                cause: "no room".into(),
            });
        }
        state.applied.push(op.clone());
        state.virtual_interfaces.insert(target.netns_cookie, target.virtual_interfaces.clone());
        if let Op::Ensure(Fact::Address(_)) = op {
            // An address belongs to one pod.
            state.namespaces.values_mut().for_each(|other| _ = other.facts.remove(fact));
        }
        let facts = &mut state.namespaces.entry(target.netns_cookie).or_default().facts;
        if let (Op::Ensure(_), Some(place)) = (op, fact.place()) {
            facts.retain(|other| other.place() != Some(place) || other == fact);
        }
        match op {
            // The next attempt releases a pod again after a failed removal.
            Op::Ensure(fact) => {
                assert!(facts.insert(fact.clone()) || matches!(fact, Fact::Pod(_)), "{fact} twice");
            }
            Op::Remove(fact) => assert!(facts.remove(fact), "{fact} was not there"),
        }
        Ok(())
    }
}
