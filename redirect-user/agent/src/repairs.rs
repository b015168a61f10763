//! Counts and reports repairs of changes made by other software.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::broadcast;

use redirect_datapath::facts::Fact;
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::RepairReport;

/// Counts repairs by kind, and publishes them.
#[derive(Debug)]
pub struct Repairs {
    counts: [AtomicU64; Kind::ALL.len()],
    told: broadcast::Sender<Repair>,
}

/// A repair of a pod.
#[derive(Clone, Debug)]
pub struct Repair {
    /// The pod's identity.
    pub pod: PodIdentity,
    /// A description of the change that was undone.
    pub what: String,
}

/// The kinds of repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `lo` was down.
    Interface,
    /// A sysctl was off.
    Sysctl,
    /// A route was gone.
    Route,
    /// A routing rule was gone.
    Rule,
    /// A TC program was gone.
    Program,
    /// A link or its pin was gone.
    Link,
    /// A map entry was missing or different.
    Map,
    /// The pod's network namespace was replaced.
    Namespace,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Interface,
        Self::Sysctl,
        Self::Route,
        Self::Rule,
        Self::Program,
        Self::Link,
        Self::Map,
        Self::Namespace,
    ];

    /// The label in metrics and tables.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Interface => "interface",
            Self::Sysctl => "sysctl",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Program => "program",
            Self::Link => "link",
            Self::Map => "map",
            Self::Namespace => "namespace",
        }
    }

    const fn of(fact: &Fact) -> Self {
        match fact {
            Fact::LoopbackUp => Self::Interface,
            Fact::Sysctl(_) => Self::Sysctl,
            Fact::Route { .. } => Self::Route,
            Fact::Rule { .. } => Self::Rule,
            Fact::Program { .. } | Fact::Entry { .. } | Fact::Guard { .. } => Self::Program,
            Fact::Lookup | Fact::ListenerGuard => Self::Link,
            Fact::Excluded(_) | Fact::Address(_) | Fact::Counters | Fact::Pod(_) | Fact::Device(_) => {
                Self::Map
            }
        }
    }
}

impl Default for Repairs {
    fn default() -> Self {
        Self { counts: Default::default(), told: broadcast::Sender::new(64) }
    }
}

impl Repairs {
    /// Counts one repair.
    pub fn count(&self, kind: Kind) {
        if let Some(count) = self.counts.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The counts of all kinds.
    pub fn counts(&self) -> impl Iterator<Item = (Kind, u64)> {
        Kind::ALL.into_iter().zip(&self.counts).map(|(kind, count)| (kind, count.load(Ordering::Relaxed)))
    }

    /// The counts that are not zero, for `redirect status`.
    #[must_use]
    pub fn report(&self) -> Vec<RepairReport> {
        let counts = self.counts().filter(|(_, repairs)| *repairs > 0);
        counts.map(|(kind, repairs)| RepairReport { kind: kind.label().into(), repairs }).collect()
    }

    /// Subscribes to repairs from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Repair> {
        self.told.subscribe()
    }

    /// Counts and publishes a pod's lost facts.
    pub(super) fn of_facts(&self, pod: &PodIdentity, lost: &[Fact]) {
        lost.iter().for_each(|fact| self.count(Kind::of(fact)));
        if !lost.is_empty() {
            self.tell(pod, lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
        }
    }

    /// Counts and publishes a replaced namespace.
    pub(super) fn of_namespace(&self, pod: &PodIdentity) {
        self.count(Kind::Namespace);
        self.tell(pod, "the network namespace was another one".into());
    }

    fn tell(&self, pod: &PodIdentity, what: String) {
        tracing::warn!(%pod, uid = pod.uid, repaired = what, "repaired pod datapath drift");
        // An error means that there is no subscriber.
        let _ = self.told.send(Repair { pod: pod.clone(), what });
    }
}
