//! The differences between the placements: one implementation each, chosen when the agent starts.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use redirect_ebpf::maps::{PodFlags, ProxyPart};

use super::listeners::{LISTENING, NotedBy};
use super::maps::Maps;
use super::{EarlyDemuxNote, Linux, OnCgroup};
use crate::datapath::{Observation, Target};
use crate::facts::{Fact, Hook};
use redirect_linux::link::AttachType;
use redirect_linux::netlink::Netlink;
use redirect_linux::netns::NetNs;

/// The host's resources that exist before any program is attached.
pub(super) struct OnHost<'a> {
    pub(super) maps: &'a mut Maps,
    pub(super) netlink: &'a mut Netlink,
    pub(super) host: &'a NetNs,
}

pub(super) trait Placed: Send + Sync {
    /// The programs on the root of the cgroup2 hierarchy.
    fn cgroup_programs(&self) -> &'static [OnCgroup];

    /// The TC programs.
    fn hooks(&self) -> &'static [Hook];

    /// The programs without which no connection is captured.
    fn vital(&self) -> [&'static str; 2];

    /// Whether the programs on the socket lookup are in the pods' namespaces.
    fn looks_up_in_pods(&self) -> bool;

    /// Prepares what the programs rely on from the first packet on. `pods` are already captured.
    fn prepare(
        &self,
        on_host: OnHost<'_>,
        rule_priority: u32,
        note: &EarlyDemuxNote,
        pods: &[Target],
    ) -> anyhow::Result<()>;

    /// Repairs the node-wide parts, apart from the programs on cgroups.
    fn repair(&self, linux: &mut Linux, repaired: &mut Vec<&'static str>) -> anyhow::Result<()>;

    /// See [`Datapath::observe`](crate::datapath::Datapath::observe).
    fn observe(&self, linux: &mut Linux, target: &Target) -> io::Result<Observation>;

    /// See [`Datapath::observe_facts`](crate::datapath::Datapath::observe_facts).
    fn observe_facts(&self, linux: &mut Linux, target: &Target) -> io::Result<BTreeSet<Fact>>;

    /// See [`Datapath::tidy`](crate::datapath::Datapath::tidy).
    fn tidy(&self, linux: &mut Linux, target: &Target) -> io::Result<()>;

    /// The flag by which the kernel side knows that new connections are captured here.
    fn place(&self) -> PodFlags;

    /// Whether an agent of this placement left any node-wide part. `links` is the directory of pinned links.
    fn is_there(&self, links: &Path, netlink: &mut Netlink) -> io::Result<bool>;

    /// How the other placement treats a proxy of this one.
    fn inherits(&self, part: ProxyPart) -> ProxyPart;

    /// Removes the node-wide parts, apart from the programs on cgroups.
    fn retire(&self, linux: &mut Linux) -> anyhow::Result<()>;

    /// The namespace in which the proxy listens for a pod.
    fn listens_in<'a>(&self, host: &'a NetNs, pod: &'a NetNs) -> &'a NetNs;
}

/// The programs on the root of the cgroup2 hierarchy.
pub(super) fn on_root(placed: &'static dyn Placed, noted_by: NotedBy) -> impl Iterator<Item = OnCgroup> {
    let listening = (noted_by == NotedBy::SockOps).then_some((LISTENING, AttachType::BPF_CGROUP_SOCK_OPS));
    placed.cgroup_programs().iter().copied().chain(listening)
}
