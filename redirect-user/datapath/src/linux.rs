//! The kernel as a [`Datapath`]: maps and programs through aya, rules and routes through netlink, sysctls through
//! `/proc`.
//!
//! All of it runs on one dedicated thread ([`crate::handle`]), because a network namespace is a property of a thread.

mod attached;
mod decision;
mod devices;
mod holders;
mod in_pod;
mod ingress_device;
mod listeners;
mod maps;
mod notrack;
mod object;
mod on_node;
mod pins;
mod placed;
mod ports;
mod shortcuts;
mod strip;
mod sysctl;
mod tc;
mod try_out;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use redirect_ebpf::Family;
use redirect_ebpf::flow::{FlowLimits, FlowState};
use redirect_ebpf::maps::ProxyPart;

use super::datapath::{Adoption, Datapath, Error, Introduction, Observation, Target};
use super::facts::{Devices, Fact, Hook, Interface, LOOPBACK_INDEX, Lookup, Op};
use super::faults::Words;
pub use attached::{Attached, at_cgroup, on_devices, shortcuts, unguarded};
pub use ingress_device::EarlyDemuxNote;
use listeners::LISTENING;
pub use listeners::NotedBy;
pub use maps::Capacities;
use maps::Maps;
use object::Programs;
pub use object::load;
pub use pins::{DEFAULT_DIRECTORY, InUse, Pins};
use pins::{LINKS, Links, cookie_of_lookup, lookup_name, lookup_names};
use placed::Placed;
use redirect_linux::link::{At, AttachType, Place, State};
use redirect_linux::netlink::Netlink;
use redirect_linux::netns::{NetNs, current_cookie};
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::Exclusion;
use redirect_protocol::wire::{CounterReport, MapReport, PodCounter, ProgramReport};
pub use strip::{HostReport, Stripped, devices_of, strip, strip_host};
use sysctl::Sysctls;
pub use tc::TcMethod;
pub use try_out::try_out;

/// A program, and its hook on a cgroup.
type OnCgroup = (&'static str, AttachType);

/// The programs that guard the proxy's ports.
const BIND: [OnCgroup; 2] =
    [("bind_ipv4", AttachType::BPF_CGROUP_INET4_BIND), ("bind_ipv6", AttachType::BPF_CGROUP_INET6_BIND)];

/// The implementation for a placement.
fn placed(placement: Placement) -> &'static dyn Placed {
    match placement {
        Placement::Pod => &in_pod::InPod,
        Placement::Node => &on_node::OnNode,
    }
}

/// The placements of agents that left something on the calling thread's node.
pub fn placements(pin_dir: &Path) -> io::Result<Vec<Placement>> {
    let mut netlink = Netlink::open()?;
    let mut found = Vec::new();
    for placement in Placement::ALL {
        if placed(placement).is_there(&pin_dir.join(LINKS), &mut netlink)? {
            found.push(placement);
        }
    }
    Ok(found)
}

/// The program on the kubelet's cgroup.
const PROBE: &str = "probe";

/// How the proxy's own sockets are recognized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProxyIdentity {
    /// By the cgroup of the process; a proxy without a cgroup of its own is refused.
    #[default]
    Cgroup,
    /// By mark only: any process with CAP_NET_RAW in a pod can impersonate the proxy.
    Mark,
}

/// How the kernel side is loaded.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Root of the cgroup2 hierarchy.
    pub cgroup: PathBuf,
    /// Cookie of the host's network namespace.
    pub host_cookie: u64,
    /// How much the maps can hold.
    pub capacities: Capacities,
    /// How TC programs are attached.
    pub tc: TcMethod,
    /// Whether connections for which no proxy listens are refused at once instead of held.
    pub refuse: bool,
    /// Whether connections to IPv6 link-local addresses go past the proxy instead of being refused.
    pub link_local: bool,
    /// Node-wide exclusions.
    pub exclusions: BTreeSet<Exclusion>,
    /// How the proxy's own sockets are recognized.
    pub proxy_identity: ProxyIdentity,
    /// The known cgroups of node proxies.
    pub proxy_cgroups: BTreeMap<u64, ProxyPart>,
    /// Where the proxy's listeners are.
    pub placement: Placement,
    /// Placement `node`: the priority of the host's rule.
    pub rule_priority: u32,
    /// The limits on events while a monitor is attached.
    pub flows: FlowLimits,
    /// Whether to load the programs with the drop log.
    pub diagnostics: bool,
    /// A file that replaces the embedded object.
    pub object: Option<PathBuf>,
    /// Which programs store the proxies' listeners for the socket lookup.
    pub noted_by: NotedBy,
}

/// Loaded programs and maps, and their attachments. Pins let them outlive this value.
pub struct Linux {
    maps: Maps,
    tc: tc::Tc,
    programs: Programs,
    links: Links,
    /// Root of the cgroup2 hierarchy.
    cgroup: Directory,
    placed: &'static dyn Placed,
    noted_by: NotedBy,
    rule_priority: u32,
    /// Whether pods' devices have the host gate.
    gated: bool,
    host: NetNs,
    host_cookie: u64,
    /// A socket in the host's namespace.
    host_netlink: Netlink,
    note: EarlyDemuxNote,
    /// The thread's current pod namespace and its sockets there, if it is not in the host's.
    session: Option<Session>,
    /// Whether the thread has left the host's namespace.
    away: bool,
    /// The remains of an agent of the other placement, while there are any.
    other: Option<Other>,
    /// The kernel side's log, if enabled, until its reader takes it.
    log: Option<Log>,
    /// Locked while the agent runs.
    _pins: Pins,
}

/// The other placement: its agent captured pods, which are taken over one by one.
struct Other {
    placed: &'static dyn Placed,
    tc: tc::Tc,
    programs: Programs,
    /// The namespaces in which it may have a part.
    pods: BTreeSet<u64>,
}

/// The kernel side's log, and the number of records read from it.
type Log = (EbpfLogger<Words>, Arc<AtomicU32>);

/// A directory of the cgroup2 hierarchy.
struct Directory {
    path: PathBuf,
    file: File,
    inode: u64,
}

impl Directory {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        Ok(Self { path: path.into(), file, inode })
    }

    fn place(&self, attach_type: AttachType) -> Place<'_> {
        let at = At::Descriptor(self.file.as_fd());
        Place { attach_type, at, id: self.inode }
    }
}

struct Session {
    netns_cookie: u64,
    netlink: Netlink,
    sysctls: Sysctls,
}

/// A report on the loaded kernel side.
#[derive(Clone, Debug)]
pub struct Report {
    /// The programs.
    pub programs: Vec<ProgramReport>,
    /// The maps.
    pub maps: Vec<MapReport>,
    /// The counters that are not zero.
    pub counters: Vec<CounterReport>,
    /// Whether TC programs are attached by tcx links.
    pub tcx: bool,
    /// Events of connections that were lost to the limit.
    pub flows_limited: u64,
    /// Events of connections that were lost because the ring buffer was full.
    pub flows_full: u64,
}

impl Linux {
    /// Loads the programs and replaces those of the previous agent, if any, in an order that lets nothing past in between.
    /// `pods` are the ones that are already captured.
    pub fn load(
        settings: &Settings,
        pins: Pins,
        note: EarlyDemuxNote,
        pods: &[Target],
    ) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let (mut object, paths) = object::load_pinned(settings, &pins)?;
        let mut maps = Maps::take(&mut object, settings.capacities)?;
        // Before any program sees the maps, which may be new and empty.
        for pod in pods {
            maps.fill(pod).with_context(|| format!("pod {}", pod.identity))?;
        }
        let host = NetNs::current().context("cannot open the agent's own network namespace")?;
        let mut host_netlink = Netlink::open()?;
        let Settings { noted_by, rule_priority, host_cookie, .. } = *settings;
        let placed = placed(settings.placement);
        let links = Links::find(&pins)?;
        let mut other = None;
        for placement in Placement::ALL.into_iter().filter(|other| *other != settings.placement) {
            let before = self::placed(placement);
            if before.is_there(&pins.links(), &mut host_netlink)? {
                tracing::info!(
                    ?placement,
                    "an agent of another placement has captured the pods of this node: they are taken over when a proxy serves them"
                );
                maps.inherit(|part| before.inherits(part))?;
                // Only this placement has the log.
                let settings = Settings { placement, diagnostics: false, ..settings.clone() };
                let (mut object, _) = object::load_pinned(&settings, &pins)?;
                let programs = Programs::load(&mut object, &[before], noted_by)?;
                let tc = tc::Tc::new(&programs, settings.tc, before.hooks())?;
                other = Some(Other { placed: before, tc, programs, pods: maps.enrolled()? });
            }
        }
        let on_host = placed::OnHost { maps: &mut maps, netlink: &mut host_netlink, host: &host };
        placed.prepare(on_host, rule_priority, &note, pods)?;
        maps.configure(settings)?;
        let log = settings.diagnostics.then(|| object::log(&mut object)).transpose()?;
        let programs = Programs::load(&mut object, &[placed], noted_by)?;
        let tc = tc::Tc::new(&programs, settings.tc, placed.hooks())?;
        let cgroup = Directory::open(&settings.cgroup)
            .with_context(|| format!("cannot open the cgroup2 directory {}", settings.cgroup.display()))?;
        pins.remove_other_maps(&paths)?;
        let mut linux = Self {
            maps,
            tc,
            programs,
            links,
            cgroup,
            placed,
            noted_by,
            rule_priority,
            gated: settings.proxy_identity == ProxyIdentity::Cgroup,
            host,
            host_cookie,
            host_netlink,
            note,
            session: None,
            away: false,
            other,
            log,
            _pins: pins,
        };
        linux.renew_other(pods);
        linux.repair()?;
        if noted_by == NotedBy::Tc {
            linux.links.remove(LISTENING)?;
        }
        Ok(linux)
    }

    /// Runs `work` as an agent of the other placement, if anything of that is left.
    fn as_other<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let mut other = self.other.take()?;
        self.swap(&mut other);
        let result = work(self);
        self.swap(&mut other);
        self.other = Some(other);
        Some(result)
    }

    fn swap(&mut self, other: &mut Other) {
        std::mem::swap(&mut self.placed, &mut other.placed);
        std::mem::swap(&mut self.tc, &mut other.tc);
        std::mem::swap(&mut self.programs, &mut other.programs);
    }

    /// Replaces the programs that the other placement's agent attached by this build's, because those of earlier builds may not
    /// know about the change.
    fn renew_other(&mut self, pods: &[Target]) {
        let renewed = self.as_other(|linux| {
            linux.repair()?;
            for pod in pods {
                for fact in linux.placed.observe(linux, pod)?.stale {
                    linux.step(pod, &Op::Ensure(fact))?;
                }
            }
            anyhow::Ok(())
        });
        if let Some(Err(error)) = renewed {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot replace the programs of the other placement"
            );
        }
    }

    /// The facts of the other placement for a pod, apart from those that both have.
    fn elsewhere(&mut self, target: &Target) -> io::Result<BTreeSet<Fact>> {
        let cookie = target.netns_cookie;
        if !self.other.as_ref().is_some_and(|other| other.pods.contains(&cookie)) {
            return Ok(BTreeSet::new());
        }
        let seen =
            self.as_other(|linux| linux.placed.observe(linux, target)).transpose()?.unwrap_or_default();
        let Observation { facts, stale, damaged, .. } = seen;
        let all = facts.into_iter().chain(stale).chain(damaged);
        let own: BTreeSet<Fact> = all
            .filter(|fact| !fact.is_of_both())
            .filter(|fact| !matches!(fact, Fact::Sysctl(sysctl) if target.foreign.contains(sysctl)))
            .collect();
        if own.is_empty()
            && let Some(other) = &mut self.other
        {
            other.pods.remove(&cookie);
        }
        Ok(own)
    }

    /// Whether anything of the other placement is left.
    pub fn is_divided(&self) -> bool {
        self.other.is_some()
    }

    /// Removes the other placement's node-wide parts, once no pod needs them. Returns whether it did.
    pub fn retire_other(&mut self) -> anyhow::Result<bool> {
        let enrolled = self.maps.enrolled()?;
        let Some(other) = &mut self.other else { return Ok(false) };
        other.pods.retain(|cookie| enrolled.contains(cookie));
        if !other.pods.is_empty() {
            return Ok(false);
        }
        self.leave()?;
        let own: Vec<&str> = self.placed.cgroup_programs().iter().map(|(program, _)| *program).collect();
        self.as_other(|linux| {
            let programs = linux.placed.cgroup_programs().iter().map(|(program, _)| *program);
            for program in programs.filter(|program| !own.contains(program)) {
                linux.links.remove(program)?;
            }
            linux.placed.retire(linux)
        })
        .transpose()?;
        self.maps.disinherit()?;
        self.other = None;
        tracing::info!("nothing of the other placement is left");
        Ok(true)
    }

    /// Attaches the node-wide programs that are missing, and returns their names.
    pub fn repair(&mut self) -> anyhow::Result<Vec<&'static str>> {
        use anyhow::Context as _;
        self.leave().context("cannot return to the host's network namespace")?;
        let mut repaired = Vec::new();
        for (name, hook) in placed::on_root(self.placed, self.noted_by) {
            let (program, place) = (self.programs.get(name)?, self.cgroup.place(hook));
            if self.links.state(name, program, place)? != Some(State::Current) {
                // cgroup links always use "multi": programs of others stay attached.
                self.links.ensure(name, program, place).with_context(|| {
                    format!("program {name} can't be attached to {}", self.cgroup.path.display())
                })?;
                repaired.push(name);
            }
        }
        self.placed.repair(self, &mut repaired)?;
        Ok(repaired)
    }

    /// Removes the entries of namespaces that have ended. Returns the cookies of the remaining namespaces without
    /// a known pod.
    pub fn collect(&mut self, known: &BTreeSet<u64>) -> anyhow::Result<Vec<u64>> {
        let mut living = Vec::new();
        let linked = self.links.names().filter_map(cookie_of_lookup);
        let cookies: BTreeSet<u64> = self.maps.cookies()?.into_iter().chain(linked).collect();
        for cookie in cookies.difference(known) {
            let devices = self.maps.devices(*cookie)?;
            let leads = |index: u32| self.host_netlink.interface(index).is_ok_and(|found| found.is_some());
            let lookups = lookup_names(*cookie);
            let attached = lookups.iter().any(|name| self.links.is_attached(name));
            if attached || devices.into_iter().any(leads) {
                living.push(*cookie);
                continue;
            }
            tracing::info!(netns_cookie = cookie, "removed leftovers of a pod that is gone");
            self.maps.forget(*cookie)?;
            let of_other = self.other.as_ref().map(|other| other.tc.links_of(&self.links, *cookie));
            let names =
                self.tc.links_of(&self.links, *cookie).into_iter().chain(of_other.into_iter().flatten());
            for name in names.chain(lookups) {
                self.links.remove(&name)?;
            }
        }
        Ok(living)
    }

    /// Moves the thread into the pod's namespace, unless it is already there.
    fn enter(&mut self, target: &Target) -> io::Result<&mut Session> {
        if self.session.as_ref().is_none_or(|session| session.netns_cookie != target.netns_cookie) {
            self.move_to(&target.netns, || Ok(target.netns_cookie))?;
        }
        entered(&mut self.session)
    }

    /// Moves the thread into the namespace with this cookie, which it returns.
    fn move_to(&mut self, netns: &NetNs, cookie: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
        self.session = None;
        let session = netns.enter().and_then(|()| {
            self.away = true;
            let netns_cookie = cookie()?;
            Ok(Session { netns_cookie, netlink: Netlink::open()?, sysctls: Sysctls::open()? })
        });
        match session {
            Ok(session) => Ok(self.session.insert(session).netns_cookie),
            Err(error) => {
                self.leave()?;
                Err(error)
            }
        }
    }

    /// Moves the thread back into the host's namespace, so that the pod's can end. After an error, no work on the host may
    /// follow.
    fn leave(&mut self) -> io::Result<()> {
        self.session = None;
        if self.away {
            self.host.enter()?;
            self.away = false;
        }
        Ok(())
    }

    /// Whether a network namespace is an enrolled pod's.
    pub fn is_enrolled(&mut self, netns: &NetNs) -> io::Result<bool> {
        let cookie = self.move_to(netns, current_cookie)?;
        self.maps.has_pod(cookie)
    }

    /// The connection events, for one reader.
    pub fn take_flows(&mut self) -> Option<RingBuf<MapData>> {
        self.maps.take_flows()
    }

    /// Turns the kernel side's connection events on or off.
    pub fn tell_flows(&mut self, on: bool) -> anyhow::Result<()> {
        self.maps.tell_flows(on)
    }

    /// The kernel side's log, if enabled, for one reader.
    pub(super) fn take_log(&mut self) -> Option<Log> {
        self.log.take()
    }

    /// The drop log's counts, over all CPUs.
    pub(super) fn diagnostics(&self) -> anyhow::Result<FlowState> {
        self.maps.diagnostics()
    }

    /// Replaces the set of the node proxies' cgroups. With an empty set, no socket counts as the proxy's.
    pub fn set_proxy_cgroups(&mut self, cgroups: &BTreeMap<u64, ProxyPart>) -> anyhow::Result<()> {
        self.maps.set_proxy_cgroups(cgroups)
    }

    /// Replaces the set of cgroups whose connections to pods are probes.
    pub fn set_probe_cgroups(&mut self, directories: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let mut wanted = BTreeMap::new();
        for path in directories {
            match Directory::open(path) {
                Ok(directory) => wanted.insert(format!("{PROBE}-{}", directory.inode), directory),
                // Removed since it was found.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(|| format!("cgroup {}", path.display())),
            };
        }
        let program = self.programs.get(PROBE)?;
        for (name, directory) in &wanted {
            self.links
                .ensure(name, program, directory.place(AttachType::BPF_CGROUP_SOCK_OPS))
                .with_context(|| format!("program {PROBE} on cgroup {}", directory.path.display()))?;
        }
        let others: Vec<String> =
            self.probes().filter(|name| !wanted.contains_key(*name)).map(str::to_owned).collect();
        others.iter().try_for_each(|name| Ok(self.links.remove(name)?))
    }

    fn probes(&self) -> impl Iterator<Item = &str> {
        self.links.names().filter(|name| name.starts_with("probe-"))
    }

    /// The cookie of the pod behind a device of the host.
    pub fn pod_behind(&self, index: u32) -> Option<u64> {
        self.maps.pod_behind(index)
    }

    /// The pod's counters that are not zero.
    pub fn counters_of(&self, netns_cookie: u64) -> anyhow::Result<Vec<PodCounter>> {
        self.maps.counters_of(netns_cookie)
    }

    /// How many times a program is attached.
    pub fn attachments(&self, program: &str) -> usize {
        match self.placed.hooks().iter().find(|hook| hook.program() == program) {
            Some(hook) => self.tc.attached(*hook),
            None if program == PROBE => self.probes().count(),
            None if Lookup::ALL.map(Lookup::program).contains(&program) => {
                self.links.names().filter(|link| link.starts_with(program)).count()
            }
            None if self.programs.iter().any(|(loaded, _)| loaded == program) => 1,
            None => 0,
        }
    }

    /// A program that is required for capture but attached nowhere, if there is one.
    pub fn detached(&self) -> Option<&'static str> {
        self.placed.vital().into_iter().find(|program| self.attachments(program) == 0)
    }

    /// The loaded programs and maps, and the counters.
    pub fn report(&self) -> anyhow::Result<Report> {
        let mut programs = Vec::new();
        for (name, id) in self.programs.iter() {
            programs.push(ProgramReport { name: name.into(), id, links: self.attachments(name) });
        }
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        let flows = self.maps.flows()?;
        Ok(Report {
            programs,
            maps: self.maps.report(),
            counters: self.maps.counters()?,
            tcx: self.tc.uses_links(),
            flows_limited: flows.limited,
            flows_full: flows.full,
        })
    }

    /// The programs attached to the host ends of a pod's devices, and the ends that are in the maps.
    fn look_at_host(
        &mut self,
        target: &Target,
        devices: &Devices,
        observation: &mut Observation,
    ) -> io::Result<()> {
        let cookie = target.netns_cookie;
        let ends: Vec<Interface> = devices.on_host().cloned().collect();
        let attached = self.at_host(target, |linux| {
            let place = tc::Where { interfaces: &ends, on_host: true };
            linux.tc.look(&mut linux.host_netlink, &linux.links, &linux.programs, cookie, place)
        })?;
        observation.facts.extend(attached.current);
        observation.stale.extend(attached.stale);
        observation.damaged.extend(attached.damaged);
        for index in self.maps.devices(cookie)? {
            let known = ends.iter().find(|end| end.index == index).cloned();
            // A device that is gone has no name any more.
            let end = known.unwrap_or(Interface { index, name: index.to_string() });
            observation.facts.insert(Fact::Device(end));
        }
        Ok(())
    }

    /// Runs `work` in the host's namespace, and returns to the thread's previous namespace.
    fn at_host<T, E: From<io::Error>>(
        &mut self,
        target: &Target,
        work: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        if self.session.as_ref().is_none_or(|session| session.netns_cookie != target.netns_cookie) {
            self.leave()?;
            return work(self);
        }
        self.host.enter()?;
        self.away = false;
        let result = work(self);
        match target.netns.enter() {
            Ok(()) => self.away = true,
            Err(_) => self.session = None,
        }
        result
    }

    fn lookup_state(&self, lookup: Lookup, target: &Target) -> io::Result<Option<State>> {
        let (name, place) = (lookup_name(lookup, target.netns_cookie), lookup_place(&target.netns)?);
        self.links.state(&name, self.programs.get(lookup.program())?, place)
    }

    fn attach_lookup(&mut self, lookup: Lookup, target: &Target) -> anyhow::Result<()> {
        let (name, place) = (lookup_name(lookup, target.netns_cookie), lookup_place(&target.netns)?);
        self.links.ensure(&name, self.programs.get(lookup.program())?, place)?;
        if lookup == Lookup::Guard {
            // The last step of an upgrade: no program relies on the former lookup any more.
            self.links.remove(&format!("{}-{}", Lookup::FORMER, target.netns_cookie))?;
        }
        Ok(())
    }

    fn detach_lookup(&mut self, lookup: Lookup, target: &Target) -> anyhow::Result<()> {
        Ok(self.links.remove(&lookup_name(lookup, target.netns_cookie))?)
    }

    fn attach(&mut self, target: &Target, interface: &Interface, hook: Hook) -> anyhow::Result<()> {
        let is_live = target.adoption.is_live();
        let netns_cookie = target.netns_cookie;
        if hook.is_on_host() {
            // In placement `pod`, an upgrade or a repair attaches the gate to a pod that is already enrolled. A filter is
            // replaced by a filter.
            let carries_traffic = is_live
                || (hook == Hook::HostGate
                    && self.maps.has_pod(netns_cookie)?
                    && !self.tc.has_filter(netns_cookie, interface.index, hook));
            let spot = tc::Spot { netns_cookie, interface, carries_traffic };
            return self.at_host(target, |linux| {
                let Self { tc, links, programs, host_netlink, .. } = linux;
                tc.attach(host_netlink, links, programs, &spot, hook)
            });
        }
        self.enter(target)?;
        let Session { netlink, netns_cookie, .. } = entered(&mut self.session)?;
        let spot = tc::Spot { netns_cookie: *netns_cookie, interface, carries_traffic: is_live };
        self.tc.attach(netlink, &mut self.links, &self.programs, &spot, hook)
    }

    fn detach(&mut self, target: &Target, interface: &Interface, hook: Hook) -> anyhow::Result<()> {
        if !self.placed.hooks().contains(&hook)
            && let Some(detached) = self.as_other(|linux| linux.detach(target, interface, hook))
        {
            return detached;
        }
        if hook.is_on_host() {
            return self.at_host(target, |linux| {
                let Self { tc, links, host_netlink, .. } = linux;
                Ok(tc.detach(host_netlink, links, target.netns_cookie, interface.index, hook)?)
            });
        }
        self.enter(target)?;
        let Session { netlink, netns_cookie, .. } = entered(&mut self.session)?;
        Ok(self.tc.detach(netlink, &mut self.links, *netns_cookie, interface.index, hook)?)
    }

    fn step(&mut self, target: &Target, op: &Op) -> anyhow::Result<()> {
        let cookie = target.netns_cookie;
        match op {
            Op::Ensure(Fact::LoopbackUp) => self.enter(target)?.netlink.set_up(LOOPBACK_INDEX)?,
            // Applications may rely on it by now.
            Op::Remove(Fact::LoopbackUp) => {}
            Op::Ensure(Fact::Sysctl(sysctl)) => self.enter(target)?.sysctls.turn_on(*sysctl)?,
            Op::Remove(Fact::Sysctl(sysctl)) => self.enter(target)?.sysctls.turn_off(*sysctl)?,
            Op::Ensure(Fact::Rule { family, rule }) => {
                self.enter(target)?.netlink.add_rule(*family, *rule)?;
            }
            Op::Remove(Fact::Rule { family, rule }) => {
                self.enter(target)?.netlink.delete_rule(*family, *rule)?;
            }
            Op::Ensure(Fact::Route(route)) => self.enter(target)?.netlink.add_route(route)?,
            Op::Remove(Fact::Route(route)) => self.enter(target)?.netlink.delete_route(route)?,
            Op::Ensure(Fact::Excluded(exclusion)) => self.maps.insert_exclusion(cookie, *exclusion)?,
            Op::Remove(Fact::Excluded(exclusion)) => self.maps.remove_exclusion(cookie, *exclusion)?,
            Op::Ensure(Fact::Lookup) => self.attach_lookup(Lookup::Listener, target)?,
            Op::Remove(Fact::Lookup) => self.detach_lookup(Lookup::Listener, target)?,
            Op::Ensure(Fact::ListenerGuard) => self.attach_lookup(Lookup::Guard, target)?,
            Op::Remove(Fact::ListenerGuard) => self.detach_lookup(Lookup::Guard, target)?,
            Op::Ensure(Fact::Program { interface, hook } | Fact::Entry { interface, hook }) => {
                self.attach(target, interface, *hook)?;
            }
            Op::Remove(Fact::Program { interface, hook } | Fact::Entry { interface, hook }) => {
                self.detach(target, interface, *hook)?;
            }
            Op::Ensure(Fact::Guard { interface, family }) => {
                self.attach(target, interface, Hook::Egress(*family))?;
            }
            Op::Remove(Fact::Guard { interface, family }) => {
                self.detach(target, interface, Hook::Egress(*family))?;
            }
            Op::Ensure(Fact::Address(address)) => self.maps.insert_address(cookie, *address)?,
            Op::Remove(Fact::Address(address)) => self.maps.remove_address(cookie, *address)?,
            Op::Ensure(Fact::Counters) => self.maps.ensure_counters(cookie)?,
            Op::Remove(Fact::Counters) => self.maps.remove_counters(cookie)?,
            Op::Ensure(Fact::Pod(pod)) => self.maps.insert_pod(cookie, *pod)?,
            Op::Remove(Fact::Pod(pod)) => self.maps.remove_pod(cookie, *pod)?,
            Op::Ensure(Fact::Device(interface)) => self.maps.insert_device(cookie, interface.index)?,
            Op::Remove(Fact::Device(interface)) => self.maps.remove_device(cookie, interface.index)?,
        }
        Ok(())
    }
}

fn entered(session: &mut Option<Session>) -> io::Result<&mut Session> {
    session.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
}

fn lookup_place(netns: &NetNs) -> io::Result<Place<'_>> {
    Ok(Place {
        attach_type: AttachType::BPF_SK_LOOKUP,
        at: At::Descriptor(netns.as_fd()),
        id: netns.inode()?,
    })
}

impl Datapath for Linux {
    fn introduce(&mut self, netns: &NetNs) -> io::Result<Introduction> {
        let cookie = self.move_to(netns, current_cookie)?;
        // In a captured pod they are ours; placement `node` touches none of them.
        let enrolled = self.maps.has_pod(cookie)?;
        let sysctls =
            if enrolled { BTreeSet::new() } else { entered(&mut self.session)?.sysctls.that_are_on()? };
        let earlier_connections = enrolled || super::listeners::has_sockets()?;
        Ok(Introduction { cookie, sysctls, earlier_connections, enrolled, adoption: Adoption::None })
    }

    fn observe_facts(&mut self, target: &Target) -> io::Result<BTreeSet<Fact>> {
        self.placed.observe_facts(self, target)
    }

    fn addresses(&mut self, netns: &NetNs) -> io::Result<Vec<IpAddr>> {
        netns.addresses()
    }

    fn tidy(&mut self, target: &Target) -> io::Result<()> {
        self.placed.tidy(self, target)
    }

    fn served(&mut self, netns: &NetNs) -> io::Result<BTreeSet<Family>> {
        self.placed.listens_in(&self.host, netns).run(super::listeners::served)?
    }

    fn observe(&mut self, target: &Target) -> Result<Observation, Error> {
        let observed = self.placed.observe(self, target).and_then(|observed| {
            let elsewhere = self.elsewhere(target)?;
            Ok(Observation { elsewhere, ..observed })
        });
        observed.map_err(|source| Error::Namespace { pod: target.identity.to_string(), source })
    }

    fn apply(&mut self, target: &Target, op: &Op) -> Result<(), Error> {
        self.step(target, op).map_err(|cause| {
            let (Op::Ensure(fact) | Op::Remove(fact)) = op;
            Error::Step {
                pod: target.identity.to_string(),
                fact: Box::new(fact.clone()),
                cause: format!("{cause:#}"),
            }
        })
    }

    fn division(&mut self, target: &Target) -> Result<Option<Adoption>, Error> {
        let captured_here = self.placed.place();
        let read = self.elsewhere(target).and_then(|elsewhere| {
            let captured = self.maps.captured(target.netns_cookie)?;
            let adoption = if captured == captured_here { Adoption::Moved } else { Adoption::Elsewhere };
            Ok((!elsewhere.is_empty()).then_some(adoption))
        });
        read.map_err(|source| Error::Namespace { pod: target.identity.to_string(), source })
    }

    fn drained(&mut self, target: &Target) -> io::Result<bool> {
        let Some(other) = &self.other else { return Ok(true) };
        let netns = other.placed.listens_in(&self.host, &target.netns);
        let own: BTreeSet<IpAddr> = netns.addresses()?.into_iter().collect();
        netns.run(|| super::listeners::have_let_go(&target.addresses, &own))?
    }

    fn rest(&mut self) {
        if let Err(error) = self.leave() {
            // The next operation on the host tries again first.
            tracing::warn!(%error, "cannot return to the host's network namespace");
        }
    }
}
