//! TC programs on the interfaces of pods, as clsact filters or as tcx links.
//!
//! A tcx link (Linux 6.6) is the more robust attachment: only its holder can remove it. But whenever one is created or removed,
//! the kernel waits for an RCU grace period under the rtnl lock: 8 to 16 ms each, during which nothing on the node can create or
//! change a device. A pod needs six. A clsact filter takes about 50 µs, so the agent uses filters for new pods by default
//! (`--tc tcx` overrides that). But an interface that gains or loses its clsact qdisc drops what is sent meanwhile (`qdisc_graft`
//! deactivates the device): a running pod's connection that loses its SYN stalls for a second. So adopted pods get tcx links, if
//! the kernel supports them.
//!
//! Each program has its own place on an interface: a side, a priority and a handle. So later agents find it again
//! and can replace a program of another build atomically.
//!
//! The kernel takes 4 KiB for each side of an interface that has filters. So `lo`, which has no egress program, gets a
//! qdisc with one side.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};
use redirect_ebpf::Family;

use super::object::Programs;
use super::pins::Links;
use crate::facts::{Fact, Hook, Interface, LOOPBACK_INDEX};
use redirect_linux::link::{self, At, AttachType, Link, Place, State};
use redirect_linux::netlink::{Filter, HANDLES, Netlink, Side};

pub(super) struct Tc {
    method: TcMethod,
    hooks: &'static [Hook],
    /// Whether the kernel has tcx links.
    has_tcx: bool,
    /// What was attached at the last observation, and how, by namespace cookie.
    attached: HashMap<u64, BTreeMap<(u32, Hook), TcMethod>>,
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TcMethod {
    /// Filters of a clsact qdisc.
    #[default]
    Clsact,
    /// tcx links; needs Linux 6.6.
    Tcx,
}

/// The priority of our filters. Filters of one priority must have one protocol; ours check the family themselves.
const PRIORITY: u16 = 1;

impl Hook {
    pub(super) const fn side(self) -> Side {
        match self {
            Self::Loopback(_)
            | Self::Inbound(_)
            | Self::Virtual(_)
            | Self::HostGate
            | Self::FromPod(_)
            | Self::IngressDevice(_) => Side::Ingress,
            Self::Egress(_) | Self::ToPod(_) => Side::Egress,
        }
    }

    /// The place of its filter, without the program.
    fn filter(self) -> Filter {
        let (kind, family) = match self {
            Self::Loopback(family) => (0, family),
            Self::Inbound(family) => (1, family),
            Self::Virtual(family) => (2, family),
            Self::Egress(family) => (3, family),
            Self::FromPod(family) => (4, family),
            Self::ToPod(family) => (5, family),
            Self::IngressDevice(family) => (6, family),
            Self::HostGate => (7, Family::Ipv4),
        };
        let handle = HANDLES.start() + 2 * kind + u32::from(family == Family::Ipv6);
        Filter { side: self.side(), priority: PRIORITY, handle, program: 0 }
    }
}

/// The place of a tcx link for a side of an interface.
fn place(side: Side, interface: u32) -> Place<'static> {
    let attach_type = match side {
        Side::Ingress => AttachType::BPF_TCX_INGRESS,
        Side::Egress => AttachType::BPF_TCX_EGRESS,
    };
    Place { attach_type, at: At::Interface(interface), id: interface.into() }
}

fn link_name(hook: Hook, netns_cookie: u64, interface: u32) -> String {
    format!("{}-{netns_cookie}-{interface}", hook.program())
}

/// Where to attach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spot<'a> {
    pub(super) netns_cookie: u64,
    pub(super) interface: &'a Interface,
    /// Whether the pod's applications may be sending.
    pub(super) carries_traffic: bool,
}

/// Where to observe attachments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Where<'a> {
    pub(super) interfaces: &'a [Interface],
    /// Whether it is in the host's namespace.
    pub(super) on_host: bool,
}

/// The attached TC programs: those of this build, and those of another build or attached by the other method.
#[derive(Debug, Default)]
pub(super) struct Attached {
    pub(super) current: BTreeSet<Fact>,
    pub(super) stale: BTreeSet<Fact>,
    pub(super) damaged: BTreeSet<Fact>,
}

impl Tc {
    pub(super) fn new(programs: &Programs, method: TcMethod, hooks: &'static [Hook]) -> anyhow::Result<Self> {
        let mut has_tcx = method == TcMethod::Tcx;
        if let Some(hook) = hooks.first() {
            probe(programs, method, *hook)?;
            has_tcx = has_tcx || probe(programs, TcMethod::Tcx, *hook).is_ok();
        }
        Ok(Self { method, hooks, has_tcx, attached: HashMap::new() })
    }

    pub(super) fn uses_links(&self) -> bool {
        self.method == TcMethod::Tcx
    }

    /// How many times a program is attached.
    pub(super) fn attached(&self, hook: Hook) -> usize {
        self.attached.values().flat_map(BTreeMap::keys).filter(|(_, attached)| *attached == hook).count()
    }

    /// Whether the last observation found the program attached as a filter.
    pub(super) fn has_filter(&self, netns_cookie: u64, interface: u32, hook: Hook) -> bool {
        let attached = self.attached.get(&netns_cookie).and_then(|attached| attached.get(&(interface, hook)));
        attached == Some(&TcMethod::Clsact)
    }

    /// In the namespace of the pod.
    pub(super) fn attach(
        &mut self,
        netlink: &mut Netlink,
        links: &mut Links,
        programs: &Programs,
        &Spot { netns_cookie, interface, carries_traffic }: &Spot<'_>,
        hook: Hook,
    ) -> anyhow::Result<()> {
        let program = programs.get(hook.program())?;
        let context = || format!("{} on {}", hook.program(), interface.name);
        let name = link_name(hook, netns_cookie, interface.index);
        let filter = Filter { program: program.id, ..hook.filter() };
        let method = match self.method_for(interface.index, hook.side())? {
            TcMethod::Clsact if carries_traffic && self.has_tcx => TcMethod::Tcx,
            method => method,
        };
        match method {
            TcMethod::Clsact => {
                netlink
                    .add_qdisc(interface)
                    .with_context(|| format!("queueing discipline of {}", interface.name))?;
                if let Err(error) = netlink.set_filter(interface.index, filter, program, hook.program()) {
                    // Without filters, the qdisc is useless.
                    netlink.delete_qdisc(interface.index)?;
                    return Err(error).with_context(context);
                }
                links.remove(&name)?;
            }
            TcMethod::Tcx => {
                links.ensure(&name, program, place(hook.side(), interface.index)).with_context(context)?;
                netlink.delete_filter(interface.index, filter)?;
            }
        }
        self.attached.entry(netns_cookie).or_default().insert((interface.index, hook), method);
        Ok(())
    }

    /// In the namespace of the pod. The kernel runs tcx programs before filters, and skips filters if one of those
    /// decides. So next to tcx programs of others, ours has to be a tcx link as well, ahead of them. An existing
    /// attachment stays.
    fn method_for(&self, interface: u32, side: Side) -> io::Result<TcMethod> {
        let Place { attach_type, at, .. } = place(side, interface);
        let links = self.method == TcMethod::Tcx || !link::programs(at, attach_type)?.is_empty();
        Ok(if links { TcMethod::Tcx } else { TcMethod::Clsact })
    }

    /// In the namespace of the pod. The qdisc is removed with our last filter, unless others have filters on it.
    pub(super) fn detach(
        &mut self,
        netlink: &mut Netlink,
        links: &mut Links,
        netns_cookie: u64,
        interface: u32,
        hook: Hook,
    ) -> io::Result<()> {
        links.remove(&link_name(hook, netns_cookie, interface))?;
        let was_there = netlink.delete_filter(interface, hook.filter())?;
        let attached = self.attached.entry(netns_cookie).or_default();
        attached.remove(&(interface, hook));
        let is_filter = |(&(index, other), &method): (&(u32, Hook), &TcMethod)| {
            index == interface && other.is_on_host() == hook.is_on_host() && method == TcMethod::Clsact
        };
        let was_last = !attached.iter().any(is_filter);
        if attached.is_empty() {
            self.attached.remove(&netns_cookie);
        }
        if was_there && was_last { netlink.delete_qdisc(interface) } else { Ok(()) }
    }

    /// Reads the attachments of a pod, in its namespace or the host's. The thread must be there.
    pub(super) fn look(
        &mut self,
        netlink: &mut Netlink,
        links: &Links,
        programs: &Programs,
        netns_cookie: u64,
        Where { interfaces, on_host }: Where<'_>,
    ) -> io::Result<Attached> {
        let mut found = Attached::default();
        let mut places = BTreeMap::new();
        for interface in interfaces {
            let filters = netlink.filters(interface.index)?;
            let [ingress, egress] = Side::ALL.map(|side| self.method_for(interface.index, side));
            let (ingress, egress) = (ingress?, egress?);
            for &hook in self.hooks.iter().filter(|hook| hook.is_on_host() == on_host) {
                let program = programs.get(hook.program())?;
                let wanted = hook.filter();
                let filter = filters.iter().find(|filter| Filter { program: 0, ..**filter } == wanted);
                let filter = filter
                    .map(|filter| if filter.program == program.id { State::Current } else { State::Stale });
                let name = link_name(hook, netns_cookie, interface.index);
                let link = links.state(&name, program, place(hook.side(), interface.index))?;
                let method = match hook.side() {
                    Side::Ingress => ingress,
                    Side::Egress => egress,
                };
                let (right, wrong) = match method {
                    TcMethod::Clsact => (filter, link),
                    TcMethod::Tcx => (link, filter),
                };
                match (right, wrong) {
                    (None, None) => continue,
                    (Some(State::Current), None) => found.current.insert(hook.fact(interface)),
                    (Some(State::Elsewhere), None) => found.damaged.insert(hook.fact(interface)),
                    _ => found.stale.insert(hook.fact(interface)),
                };
                let method = if filter.is_some() { TcMethod::Clsact } else { TcMethod::Tcx };
                places.insert((interface.index, hook), method);
            }
        }
        let attached = self.attached.entry(netns_cookie).or_default();
        attached.retain(|(_, hook), _| hook.is_on_host() != on_host);
        attached.extend(places);
        if attached.is_empty() {
            self.attached.remove(&netns_cookie);
        }
        Ok(found)
    }

    /// The names of a namespace's links.
    pub(super) fn links_of(&self, links: &Links, netns_cookie: u64) -> Vec<String> {
        let is_of = |name: &&str| {
            self.hooks.iter().any(|hook| name.starts_with(&format!("{}-{netns_cookie}-", hook.program())))
        };
        links.names().filter(is_of).map(str::to_owned).collect()
    }
}

/// Tries the method in a new namespace, to find out whether the kernel supports it.
fn probe(programs: &Programs, method: TcMethod, hook: Hook) -> anyhow::Result<()> {
    let program = programs.get(hook.program())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot create a network namespace for probing")?;
            match method {
                TcMethod::Tcx => Link::create(program, place(hook.side(), LOOPBACK_INDEX))
                    .map(drop)
                    .context("this kernel has no tcx links (Linux 6.6): use --tc clsact"),
                TcMethod::Clsact => Netlink::open()
                    .and_then(|mut netlink| {
                        netlink.add_qdisc(&Interface { index: LOOPBACK_INDEX, name: "lo".into() })?;
                        netlink.set_filter(LOOPBACK_INDEX, hook.filter(), program, hook.program())
                    })
                    .context(
                        "this kernel can't attach TC programs: it needs cls_bpf and sch_ingress (clsact)",
                    ),
            }
        });
        thread.join().expect("a panic ends the process")
    })
}
