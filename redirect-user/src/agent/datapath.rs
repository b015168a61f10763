//! The seam between what should be and the kernel: one trait, the Linux implementation in [`super::linux`], and a
//! recording fake for tests.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use redirect_ebpf::maps::PodFlags;

use super::facts::{Fact, Namespace, Op, Wanted, desired, diff};
use crate::netns::NetNs;
use crate::pod::{Exclusion, PodAddresses, PodIdentity};

/// A pod as the datapath sees it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Who it is, for messages.
    pub identity: PodIdentity,
    /// Its network namespace.
    pub netns: NetNs,
    /// The namespace's cookie.
    pub netns_cookie: u64,
    /// Its addresses.
    pub addresses: PodAddresses,
    /// Its switches.
    pub flags: PodFlags,
    /// See [`PodSettings::virtual_interfaces`](crate::pod::PodSettings::virtual_interfaces).
    pub virtual_interfaces: Vec<String>,
    /// What is not to be steered.
    pub exclusions: BTreeSet<Exclusion>,
}

impl Target {
    fn desired(&self, namespace: &Namespace) -> BTreeSet<Fact> {
        let wanted = Wanted {
            flags: self.flags,
            addresses: &self.addresses,
            virtual_interfaces: &self.virtual_interfaces,
            exclusions: &self.exclusions,
        };
        desired(&wanted, namespace)
    }
}

/// What is in the kernel for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// What its namespace is like.
    pub namespace: Namespace,
    /// What of ours is there.
    pub facts: BTreeSet<Fact>,
}

/// Why the kernel is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace can't be entered or read.
    #[error("pod {pod}: its network namespace can't be read: {source}")]
    Namespace {
        /// The pod.
        pod: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The pod has IPv6 addresses and no IPv6 to steer them with.
    #[error(
        "pod {pod}: IPv6: it has the address {address}, but IPv6 is off on its lo, so that its connections can't be \
         steered: set net.ipv6.conf.lo.disable_ipv6=0 in the pod, or give it no IPv6 address"
    )]
    Ipv6Off {
        /// The pod.
        pod: String,
        /// One of its IPv6 addresses.
        address: Ipv6Addr,
    },
    /// A step failed.
    #[error("pod {pod}: {fact}: {cause}")]
    Step {
        /// The pod.
        pod: String,
        /// What was to be made true or untrue.
        fact: Box<Fact>,
        /// The cause, with a remedy where there is one.
        cause: String,
    },
}

/// The kernel, or something that behaves like it.
pub trait Datapath {
    /// The cookie by which the kernel side knows a namespace.
    fn cookie(&mut self, netns: &NetNs) -> io::Result<u64>;

    /// The addresses on a namespace's interfaces.
    fn addresses(&mut self, netns: &NetNs) -> io::Result<Vec<IpAddr>>;

    /// Reads what is there for a pod.
    fn observe(&mut self, target: &Target) -> Result<Observation, Error>;

    /// Takes one step.
    fn apply(&mut self, target: &Target, op: &Op) -> Result<(), Error>;

    /// Called between one piece of work and the next: lets go of namespaces, so that they can end.
    fn rest(&mut self) {}
}

/// Makes the pod steered. On an error everything that this call did is undone.
///
/// Returns what is there now.
pub fn enroll(datapath: &mut impl Datapath, target: &Target) -> Result<Observation, Error> {
    let before = datapath.observe(target)?;
    if let (false, Some(address)) = (before.namespace.ipv6, target.addresses.ipv6.first()) {
        return Err(Error::Ipv6Off { pod: target.identity.to_string(), address: *address });
    }
    let wanted = target.desired(&before.namespace);
    let ops = diff(&wanted, &before.facts);
    for (done, op) in ops.iter().enumerate() {
        if let Err(error) = datapath.apply(target, op) {
            for undo in ops.iter().take(done).rev().map(Op::inverse) {
                if let Err(error) = datapath.apply(target, &undo) {
                    tracing::warn!(pod = %target.identity, %error, "could not undo a step of a failed enrolment");
                }
            }
            return Err(error);
        }
    }
    Ok(Observation { namespace: before.namespace, facts: wanted })
}

/// How much of a pod's enrolment is to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// What catches new connections. Those that the proxy has go on.
    Capture,
    /// Everything.
    Everything,
}

/// Removes what is ours for the pod. Goes on after errors and returns them.
pub fn unenroll(datapath: &mut impl Datapath, target: &Target, removal: Removal) -> Vec<Error> {
    let facts = match datapath.observe(target) {
        Ok(observation) => observation.facts,
        Err(error) => return vec![error],
    };
    let goes = |fact: &Fact| match removal {
        Removal::Capture => {
            matches!(fact, Fact::Program { .. } | Fact::Address(_) | Fact::Pod(_) | Fact::Guard { .. })
        }
        Removal::Everything => true,
    };
    let stay = facts.iter().filter(|fact| !goes(fact)).cloned().collect();
    diff(&stay, &facts).iter().filter_map(|op| datapath.apply(target, op).err()).collect()
}

/// What is missing for the pod to be steered.
pub fn missing(datapath: &mut impl Datapath, target: &Target) -> Result<Vec<Fact>, Error> {
    let actual = datapath.observe(target)?;
    let wanted = target.desired(&actual.namespace);
    Ok(wanted.difference(&actual.facts).cloned().collect())
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
