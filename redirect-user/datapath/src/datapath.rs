//! The seam between the desired state and the kernel: one trait, the Linux implementation in [`super::linux`], and a recording
//! fake for tests.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

use redirect_ebpf::Family;
use redirect_ebpf::maps::{Pod, PodFlags};

use super::facts::{Fact, Namespace, Op, Sysctl, Wanted, desired, diff};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::{Exclusion, PodAddresses, PodIdentity};
use redirect_protocol::wire::FactState;

/// A pod as the datapath sees it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its identity, for messages.
    pub identity: PodIdentity,
    /// Its network namespace.
    pub netns: NetNs,
    /// The namespace's cookie.
    pub netns_cookie: u64,
    /// Its addresses.
    pub addresses: PodAddresses,
    /// Its flags.
    pub flags: PodFlags,
    /// See [`PodSettings::virtual_interfaces`](redirect_protocol::pod::PodSettings::virtual_interfaces).
    pub virtual_interfaces: Vec<String>,
    /// Exclusions from capture.
    pub exclusions: BTreeSet<Exclusion>,
    /// Sysctls that were on before the enrollment, and stay on after it.
    pub foreign: BTreeSet<Sysctl>,
    /// The progress of its adoption, if its applications ran before.
    pub adoption: Adoption,
}

/// The progress of a pod that ran before it was enrolled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Adoption {
    /// It did not run before, or its adoption is long complete.
    #[default]
    None,
    /// No traffic of it is captured until a proxy serves it.
    Awaited,
    /// It has just been captured: packets are on their way while programs are attached, and half-open connections may complete
    /// as they began.
    /// complete as they began.
    Recent,
    /// The previous agent had the other placement, which captures the pod until a proxy serves it in this
    /// one.
    Elsewhere,
    /// The same, with everything of this placement attached.
    Joining,
    /// This placement captures new connections. Connections that the other one captured continue with what it
    /// left.
    Moved,
}

impl Adoption {
    /// Whether nothing of this placement captures the pod before a proxy serves it.
    #[must_use]
    pub const fn awaits(self) -> bool {
        matches!(self, Self::Awaited | Self::Elsewhere)
    }

    /// Whether the other placement still has a part in the pod.
    #[must_use]
    pub const fn is_divided(self) -> bool {
        matches!(self, Self::Elsewhere | Self::Joining | Self::Moved)
    }

    /// Whether applications send while programs are attached, and connections may be half open.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Recent) || self.is_divided()
    }
}

impl Target {
    fn wanted(&self) -> Wanted<'_> {
        Wanted {
            flags: self.flags,
            elsewhere: matches!(self.adoption, Adoption::Elsewhere | Adoption::Joining),
            addresses: &self.addresses,
            virtual_interfaces: &self.virtual_interfaces,
            exclusions: &self.exclusions,
        }
    }

    /// The facts about its namespace that are known from its enrollment.
    #[must_use]
    pub fn introduction(&self) -> Introduction {
        Introduction {
            cookie: self.netns_cookie,
            sysctls: self.foreign.clone(),
            earlier_connections: self.flags.contains(PodFlags::EARLIER_CONNECTIONS),
            enrolled: self.adoption != Adoption::Awaited,
            adoption: self.adoption,
        }
    }

    /// The pod's map entry.
    #[must_use]
    pub fn kernel_pod(&self) -> Pod {
        self.wanted().kernel_pod()
    }

    /// The same pod at another stage of its adoption.
    #[must_use]
    pub fn adopted(&self, adoption: Adoption) -> Self {
        let mut flags = self.flags.with(PodFlags::HALF_OPEN, adoption.is_live());
        if adoption.is_live() {
            flags = flags.with(PodFlags::RELEASED, false);
        }
        if adoption.is_divided() {
            flags = flags.with(PodFlags::EARLIER_CONNECTIONS, true);
        }
        Self { adoption, flags, ..self.clone() }
    }

    /// The same pod as it leaves the mesh: no program captures its new connections.
    #[must_use]
    pub fn released(&self) -> Self {
        Self { flags: self.flags.released(), ..self.clone() }
    }

    fn desired(&self, namespace: &Namespace) -> BTreeSet<Fact> {
        if self.adoption == Adoption::Awaited {
            return BTreeSet::new();
        }
        let mut facts = desired(&self.wanted(), namespace);
        if self.adoption == Adoption::Elsewhere {
            facts.retain(Fact::is_of_both);
        }
        facts
    }
}

/// The facts about a namespace that are needed before a pod in it is enrolled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Introduction {
    /// The cookie by which the kernel side identifies it.
    pub cookie: u64,
    /// The sysctls that are on, unless we turned them on.
    pub sysctls: BTreeSet<Sysctl>,
    /// Whether connections may be open in it that have to continue unchanged.
    pub earlier_connections: bool,
    /// Whether a pod in it is already captured.
    pub enrolled: bool,
    /// The stage of its pod's adoption.
    pub adoption: Adoption,
}

/// The kernel's state for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// The namespace.
    pub namespace: Namespace,
    /// The facts that hold.
    pub facts: BTreeSet<Fact>,
    /// Facts in the form of another build: they don't hold, but have to be removed.
    pub stale: BTreeSet<Fact>,
    /// Damaged facts: a link that is detached or no longer pinned.
    pub damaged: BTreeSet<Fact>,
    /// Facts that an agent of the other placement left, in any form.
    pub elsewhere: BTreeSet<Fact>,
}

impl Observation {
    /// All facts, in any form.
    fn present(&self) -> BTreeSet<Fact> {
        [&self.facts, &self.stale, &self.damaged, &self.elsewhere].into_iter().flatten().cloned().collect()
    }
}

/// An error of the data path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace can't be entered or read.
    #[error("pod {pod}: cannot read its network namespace: {source}")]
    Namespace {
        /// The pod.
        pod: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The pod has IPv6 addresses, but no working IPv6 to capture them with.
    #[error(
        "pod {pod}: IPv6: it has the address {address}, but IPv6 is disabled on its lo, so its connections \
         cannot be captured: set net.ipv6.conf.lo.disable_ipv6=0 in the pod, or give it no IPv6 address"
    )]
    Ipv6Off {
        /// The pod.
        pod: String,
        /// One of its IPv6 addresses.
        address: Ipv6Addr,
    },
    /// Placement `node`: a device does not lead to the host.
    #[error(
        "pod {pod}: interface {interface} is not a veth whose other end is in the host's network \
         namespace, so the host cannot see its packets: leave the pod out of the mesh, or use placement \
         `pod`"
    )]
    Unreachable {
        /// The pod.
        pod: String,
        /// The interface.
        interface: String,
    },
    /// A step failed.
    #[error("pod {pod}: {fact}: {cause}")]
    Step {
        /// The pod.
        pod: String,
        /// The fact to establish or to remove.
        fact: Box<Fact>,
        /// The cause, with a remedy where there is one.
        cause: String,
    },
}

/// The kernel, or a fake of it.
pub trait Datapath {
    /// Reads a new namespace.
    fn introduce(&mut self, netns: &NetNs) -> io::Result<Introduction>;

    /// The addresses on a namespace's interfaces.
    fn addresses(&mut self, netns: &NetNs) -> io::Result<Vec<IpAddr>>;

    /// Reads the facts about a pod for which the kernel sends no notifications: sysctls, map entries, the
    /// socket lookup. Cheap.
    fn observe_facts(&mut self, target: &Target) -> io::Result<BTreeSet<Fact>>;

    /// The families in which a proxy listens for captured connections.
    fn served(&mut self, netns: &NetNs) -> io::Result<BTreeSet<Family>>;

    /// Reads the kernel's state for a pod.
    fn observe(&mut self, target: &Target) -> Result<Observation, Error>;

    /// Executes one operation. Removing a fact that is already gone is no error.
    fn apply(&mut self, target: &Target, op: &Op) -> Result<(), Error>;

    /// Removes the leftovers of interrupted operations that no fact represents.
    fn tidy(&mut self, target: &Target) -> io::Result<()>;

    /// The adoption stage of a pod that an earlier agent captured in the other placement; `None` if nothing of that
    /// is left.
    fn division(&mut self, _: &Target) -> Result<Option<Adoption>, Error> {
        Ok(None)
    }

    /// Whether the proxies of the other placement have no more connections of the pod.
    fn drained(&mut self, _: &Target) -> io::Result<bool> {
        Ok(true)
    }

    /// Called between jobs: releases namespaces, so that they can end.
    fn rest(&mut self) {}
}

/// The result of [`enroll`].
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The new state.
    pub observation: Observation,
    /// The facts that did not exist before, in any form.
    pub made: Vec<Fact>,
}

/// Captures the pod, or only checks that this is possible if it has to wait for a proxy. On an error, undoes everything that this
/// call did, but does not restore facts in the form of another build.
pub fn enroll(datapath: &mut impl Datapath, target: &Target) -> Result<Outcome, Error> {
    let began = Instant::now();
    let before = datapath.observe(target)?;
    let read = began.elapsed();
    if let (false, Some(address)) = (before.namespace.ipv6, target.addresses.ipv6.first()) {
        return Err(Error::Ipv6Off { pod: target.identity.to_string(), address: *address });
    }
    if before.namespace.placement == Placement::Node
        && let Some(interface) = before.namespace.devices.unreachable.first()
    {
        let (pod, interface) = (target.identity.to_string(), interface.clone());
        return Err(Error::Unreachable { pod, interface });
    }
    if target.adoption == Adoption::Awaited {
        return Ok(Outcome { observation: before, made: Vec::new() });
    }
    let wanted = target.desired(&before.namespace);
    if target.adoption == Adoption::Elsewhere {
        // Before any program of this placement is attached, because it must not capture yet.
        for pod in wanted.iter().filter(|fact| matches!(fact, Fact::Pod(_)) && !before.facts.contains(fact)) {
            datapath.apply(target, &Op::Ensure(pod.clone()))?;
        }
        return Ok(Outcome { observation: before, made: Vec::new() });
    }
    let is_foreign = |fact: &Fact| matches!(fact, Fact::Sysctl(sysctl) if target.foreign.contains(sysctl));
    let missing = wanted.difference(&before.facts).cloned().map(Op::Ensure);
    let mut present = before.present();
    if target.adoption.is_divided() {
        present.retain(|fact| !before.elsewhere.contains(fact));
    }
    let surplus =
        diff(&wanted, &present).into_iter().filter(|op| matches!(op, Op::Remove(fact) if !is_foreign(fact)));
    let ops: Vec<Op> = missing.chain(surplus).collect();
    for (done, op) in ops.iter().enumerate() {
        if let Err(error) = datapath.apply(target, op) {
            let replaced = |op: &Op| matches!(op, Op::Remove(fact) if before.stale.contains(fact));
            let undone = |op: &Op| match op {
                Op::Ensure(new) if let Some(old) = replaced_by(new, &before.facts) => Op::Ensure(old),
                op => op.inverse(),
            };
            let steps = ops.iter().take(done).rev().map(undone).filter(|undo| !replaced(undo));
            for undo in steps {
                if let Err(error) = datapath.apply(target, &undo) {
                    tracing::warn!(pod = %target.identity, %error, "cannot roll back a step of a failed \
                         enrollment");
                }
            }
            return Err(error);
        }
    }
    tracing::debug!(
        pod = %target.identity,
        uid = target.identity.uid,
        read_microseconds = read.as_micros() as u64,
        write_microseconds = (began.elapsed() - read).as_micros() as u64,
        steps = ops.len(),
        "reconciling datapath"
    );
    let lacked = |fact: &&Fact| !before.facts.contains(*fact) && !before.stale.contains(*fact);
    let made = wanted.iter().filter(lacked).cloned().collect();
    let elsewhere = if target.adoption.is_divided() { before.elsewhere } else { BTreeSet::new() };
    let observation =
        Observation { namespace: before.namespace, facts: wanted, elsewhere, ..Observation::default() };
    Ok(Outcome { observation, made })
}

/// The route that another one has replaced.
fn replaced_by(new: &Fact, before: &BTreeSet<Fact>) -> Option<Fact> {
    let place = new.place()?;
    before.iter().find(|old| old.place() == Some(place)).cloned()
}

/// Stops the capture of an enrolled pod's new connections, in both directions and families at once. All programs stay in place
/// for the proxy's connections, and guard its listeners.
pub fn release(datapath: &mut impl Datapath, target: &Target) -> Result<(), Error> {
    if target.adoption == Adoption::Awaited {
        return Ok(());
    }
    datapath.apply(target, &Op::Ensure(Fact::Pod(target.released().kernel_pod())))
}

/// Removes this project's state of the pod. Continues after errors, and returns them.
pub fn unenroll(datapath: &mut impl Datapath, target: &Target) -> Vec<Error> {
    let facts = match datapath.observe(target) {
        Ok(observation) => observation.present(),
        Err(error) => return vec![error],
    };
    // What was on before us stays on.
    let stays = |fact: &&Fact| matches!(fact, Fact::Sysctl(sysctl) if target.foreign.contains(sysctl));
    let left = facts.iter().filter(stays).cloned().collect();
    diff(&left, &facts).iter().filter_map(|op| datapath.apply(target, op).err()).collect()
}

/// A fact that is expected of a pod, or that is surplus.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The fact.
    pub fact: Fact,
    /// Its state in the kernel.
    pub state: FactState,
}

impl Finding {
    /// A description of the problem, if there is one.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        match self.state {
            FactState::Present | FactState::Unused => None,
            FactState::Missing => Some(format!("{} is missing", self.fact)),
            FactState::Damaged => Some(format!("{} is damaged", self.fact)),
            FactState::Surplus => Some(format!("{} is there but should not be", self.fact)),
        }
    }
}

/// Compares the kernel with the pod's desired state, in the order in which facts are established.
pub fn inspect(datapath: &mut impl Datapath, target: &Target) -> Result<Vec<Finding>, Error> {
    let actual = datapath.observe(target)?;
    let wanted = target.desired(&actual.namespace);
    let foreign = |fact: &Fact| matches!(fact, Fact::Sysctl(sysctl) if target.foreign.contains(sysctl));
    let actual_elsewhere = actual.elsewhere.difference(&wanted);
    let all = wanted
        .iter()
        .chain(actual.facts.difference(&wanted).chain(actual_elsewhere).filter(|fact| !foreign(fact)));
    let state = |fact: &Fact| match (wanted.contains(fact), actual.facts.contains(fact)) {
        (true, true) => FactState::Present,
        (true, false) if actual.damaged.contains(fact) || actual.stale.contains(fact) => FactState::Damaged,
        (true, false) => FactState::Missing,
        (false, _) => FactState::Surplus,
    };
    Ok(all.map(|fact| Finding { fact: fact.clone(), state: state(fact) }).collect())
}

/// The facts that are missing for the pod to be captured.
pub fn missing(datapath: &mut impl Datapath, target: &Target) -> Result<Vec<Fact>, Error> {
    let actual = datapath.observe(target)?;
    let wanted = target.desired(&actual.namespace);
    Ok(wanted.difference(&actual.facts).cloned().collect())
}

#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(test)]
mod tests;
