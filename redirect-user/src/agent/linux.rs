//! The kernel as a [`Datapath`]: maps and programs through aya, rules and routes through netlink, sysctls through
//! `/proc`.
//!
//! Everything here runs on one thread of its own ([`super::thread`]): entering a network namespace is a property of a
//! thread.

mod maps;
mod netlink;
mod object;
mod sysctl;
mod tc;

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use aya::programs::links::Link as _;
use aya::programs::sk_lookup::SkLookupLink;
use aya::programs::sock_ops::SockOpsLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, Program, SkLookup, SockOps};
use redirect_ebpf::Family;

use super::datapath::{Datapath, Error, Observation, Target};
use super::facts::{Fact, Hook, Interface, LOOKUP, LOOPBACK_INDEX, Mark, Namespace, Op, Sysctl};
use crate::netns::NetNs;
use crate::pod::Exclusion;
use crate::wire::{CounterReport, MapReport, ProgramReport};
pub use maps::Capacities;
use maps::Maps;
pub(super) use netlink::Netlink;
pub use object::load;
pub use tc::TcMethod;

/// The programs that are attached to the root of the cgroup2 hierarchy.
const CGROUP: [&str; 10] = [
    "outbound_ipv4",
    "outbound_ipv6",
    "bind_ipv4",
    "bind_ipv6",
    "sendmsg_ipv4",
    "sendmsg_ipv6",
    "recvmsg_ipv4",
    "recvmsg_ipv6",
    "getpeername_ipv4",
    "getpeername_ipv6",
];

/// The program that is attached to the kubelet's cgroup.
const PROBE: &str = "probe";

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
    /// What is not steered, in any pod.
    pub exclusions: BTreeSet<Exclusion>,
}

/// Loaded programs and maps, and what they are attached to.
pub struct Linux {
    maps: Maps,
    tc: tc::Tc,
    programs: aya::Ebpf,
    /// The attachments of the socket lookup, by namespace cookie.
    lookups: HashMap<u64, SkLookupLink>,
    /// The attachments of the probe program, by the inode of the cgroup's directory.
    probes: HashMap<u64, SockOpsLink>,
    host: NetNs,
    /// Where the thread is, if it is not in the host's namespace, and a netlink socket there.
    session: Option<Session>,
    /// What a sysctl was before, by namespace cookie.
    sysctls: HashMap<(u64, Sysctl), String>,
}

struct Session {
    netns_cookie: u64,
    netlink: Netlink,
}

/// What can be told about the loaded kernel side.
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
}

impl Linux {
    /// Loads the programs and attaches those that are for the whole node.
    pub fn load(settings: &Settings) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let mut programs = object::load(settings)?;
        let mut maps = Maps::take(&mut programs, settings.capacities)?;
        maps.configure(settings)?;
        let host = NetNs::current().context("the agent's own network namespace can't be opened")?;
        for name in CGROUP {
            let program: &mut CgroupSockAddr = object::program(&mut programs, name)?;
            program.load().with_context(|| format!("the kernel refuses program {name}"))?;
        }
        let lookup: &mut SkLookup = object::program(&mut programs, LOOKUP)?;
        lookup.load().with_context(|| format!("the kernel refuses program {LOOKUP}"))?;
        let probe: &mut SockOps = object::program(&mut programs, PROBE)?;
        probe.load().with_context(|| format!("the kernel refuses program {PROBE}"))?;
        let tc = tc::Tc::load(&mut programs, settings.tc)?;
        let cgroup = settings.cgroup.display();
        let directory = File::open(&settings.cgroup)
            .with_context(|| format!("cgroup2 directory {cgroup} can't be opened"))?;
        for name in CGROUP {
            let program: &mut CgroupSockAddr = object::program(&mut programs, name)?;
            // Links of cgroup programs are always "multi": others' programs stay attached beside ours.
            program
                .attach(&directory, CgroupAttachMode::Single)
                .with_context(|| format!("program {name} can't be attached to {cgroup}"))?;
        }
        Ok(Self {
            maps,
            tc,
            programs,
            lookups: HashMap::new(),
            probes: HashMap::new(),
            host,
            session: None,
            sysctls: HashMap::new(),
        })
    }

    /// Moves the thread into the pod's namespace, unless it is there already.
    fn enter(&mut self, target: &Target) -> io::Result<&mut Netlink> {
        if self.session.as_ref().is_none_or(|session| session.netns_cookie != target.netns_cookie) {
            self.session = None;
            target.netns.enter()?;
            self.session = Some(Session { netns_cookie: target.netns_cookie, netlink: Netlink::open()? });
        }
        match &mut self.session {
            Some(session) => Ok(&mut session.netlink),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Moves the thread back into the host's namespace, so that the pod's can go away.
    fn leave(&mut self) {
        if self.session.take().is_some()
            && let Err(error) = self.host.enter()
        {
            // The next pod's namespace is entered from here just as well; only this pod's stays for longer.
            tracing::warn!(%error, "could not return to the host's network namespace");
        }
    }

    /// Whether the network namespace with this cookie is an enrolled pod's.
    #[must_use]
    pub fn is_enrolled(&self, netns_cookie: u64) -> bool {
        self.maps.has_pod(netns_cookie)
    }

    /// Replaces the set of cgroups whose processes are node proxies. An empty set: the mark alone tells.
    pub fn set_proxy_cgroups(&mut self, cgroups: &[u64]) -> anyhow::Result<()> {
        self.maps.set_proxy_cgroups(cgroups)
    }

    /// Replaces the set of cgroups whose processes' connections to pods are probes.
    pub fn set_probe_cgroups(&mut self, directories: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let mut wanted = HashMap::new();
        for directory in directories {
            let name = || format!("cgroup {}", directory.display());
            let file = match File::open(directory) {
                Ok(file) => file,
                // Gone since it was found.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).with_context(name),
            };
            let inode = file.metadata().with_context(name)?.ino();
            wanted.insert(inode, file);
        }
        self.probes.retain(|inode, _| wanted.contains_key(inode));
        for (inode, directory) in wanted {
            if let Entry::Vacant(vacant) = self.probes.entry(inode) {
                let program: &mut SockOps = object::program(&mut self.programs, PROBE)?;
                let id = program.attach(directory, CgroupAttachMode::Single)?;
                vacant.insert(program.take_link(id)?);
            }
        }
        Ok(())
    }

    /// What is loaded, and what it counted.
    pub fn report(&self) -> anyhow::Result<Report> {
        let mut programs = Vec::new();
        for (name, program) in self.programs.programs() {
            let links = match Hook::ALL.into_iter().find(|hook| hook.program() == name) {
                Some(hook) => self.tc.attached(hook),
                None if name == LOOKUP => self.lookups.len(),
                None if name == PROBE => self.probes.len(),
                None => 1,
            };
            let id = match program {
                Program::SchedClassifier(program) => program.info()?.id(),
                Program::CgroupSockAddr(program) => program.info()?.id(),
                Program::SkLookup(program) => program.info()?.id(),
                Program::SockOps(program) => program.info()?.id(),
                other => anyhow::bail!("program {name} is of an unexpected type {:?}", other.prog_type()),
            };
            programs.push(ProgramReport { name: name.into(), id, links });
        }
        programs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Report {
            programs,
            maps: self.maps.report(),
            counters: self.maps.counters()?,
            tcx: self.tc.uses_links(),
        })
    }

    fn look(&mut self, target: &Target) -> io::Result<Observation> {
        let netlink = self.enter(target)?;
        let (interfaces, up) = netlink.interfaces()?;
        let ipv6 = sysctl::ipv6_enabled("lo");
        let routable = |interface: &Interface, family| {
            up.contains(&interface.index)
                && (family == Family::Ipv4 || ipv6 && sysctl::ipv6_enabled(&interface.name))
        };
        let routable = interfaces
            .iter()
            .flat_map(|interface| Family::ALL.map(|family| (interface, family)))
            .filter(|(interface, family)| routable(interface, *family))
            .map(|(interface, family)| (family, interface.index))
            .collect();
        let mut observation =
            Observation { namespace: Namespace { interfaces, routable, ipv6 }, ..Observation::default() };
        let interfaces = &observation.namespace.interfaces;
        let facts = &mut observation.facts;
        if up.contains(&LOOPBACK_INDEX) {
            facts.insert(Fact::LoopbackUp);
        }
        let families = if ipv6 { &Family::ALL[..] } else { &[Family::Ipv4][..] };
        for &family in families {
            facts.extend(netlink.rules(family)?.into_iter().map(|mark| Fact::Rule { family, mark }));
            facts.extend(
                netlink.routes(family, interfaces)?.into_iter().map(|(interface, source)| Fact::Route {
                    family,
                    interface,
                    source,
                }),
            );
        }
        for known in sysctl::ALL {
            if sysctl::is_on(known)? {
                facts.insert(Fact::Sysctl(known));
            }
        }
        facts.extend(self.tc.facts(target.netns_cookie, interfaces));
        facts.extend(self.lookups.contains_key(&target.netns_cookie).then_some(Fact::Lookup));
        facts.extend(self.maps.facts(target));
        Ok(observation)
    }

    fn attach(&mut self, target: &Target, interface: &Interface, hook: Hook) -> anyhow::Result<()> {
        self.enter(target)?;
        self.tc.attach(&mut self.programs, target.netns_cookie, interface, hook)
    }

    fn detach(&mut self, target: &Target, interface: &Interface, hook: Hook) -> anyhow::Result<()> {
        self.enter(target)?;
        if self.tc.detach(target.netns_cookie, interface.index, hook)? {
            self.enter(target)?.delete_clsact(interface.index)?;
        }
        Ok(())
    }

    fn step(&mut self, target: &Target, op: &Op) -> anyhow::Result<()> {
        let cookie = target.netns_cookie;
        match op {
            Op::Ensure(Fact::LoopbackUp) => self.enter(target)?.set_up(LOOPBACK_INDEX)?,
            // Others may rely on it by now.
            Op::Remove(Fact::LoopbackUp) => {}
            Op::Ensure(Fact::Sysctl(sysctl)) => {
                self.enter(target)?;
                let before = sysctl::turn_on(*sysctl)?;
                self.sysctls.insert((cookie, *sysctl), before);
            }
            Op::Remove(Fact::Sysctl(sysctl)) => {
                self.enter(target)?;
                // What was on before us stays on.
                if let Some(before) = self.sysctls.remove(&(cookie, *sysctl)) {
                    sysctl::restore(*sysctl, &before)?;
                }
            }
            Op::Ensure(Fact::Route { family, interface, source }) => {
                self.enter(target)?.add_route(*family, interface, *source)?;
            }
            Op::Remove(Fact::Route { family, interface, source }) => {
                self.enter(target)?.delete_route(*family, interface, *source)?;
            }
            Op::Ensure(Fact::Rule { family, mark }) => self.enter(target)?.add_rule(*family, *mark)?,
            Op::Remove(Fact::Rule { family, mark }) => self.enter(target)?.delete_rule(*family, *mark)?,
            Op::Ensure(Fact::Excluded(exclusion)) => self.maps.insert_exclusion(cookie, *exclusion)?,
            Op::Remove(Fact::Excluded(exclusion)) => self.maps.remove_exclusion(cookie, *exclusion)?,
            Op::Ensure(Fact::Lookup) => {
                let program: &mut SkLookup = object::program(&mut self.programs, LOOKUP)?;
                let id = program.attach(&target.netns)?;
                self.lookups.insert(cookie, program.take_link(id)?);
            }
            Op::Remove(Fact::Lookup) => {
                if let Some(link) = self.lookups.remove(&cookie) {
                    link.detach()?;
                }
            }
            Op::Ensure(Fact::Program { interface, hook }) => self.attach(target, interface, *hook)?,
            Op::Remove(Fact::Program { interface, hook }) => self.detach(target, interface, *hook)?,
            Op::Ensure(Fact::Guard { interface, family }) => {
                self.attach(target, interface, Hook::Egress(*family))?;
            }
            Op::Remove(Fact::Guard { interface, family }) => {
                self.detach(target, interface, Hook::Egress(*family))?;
            }
            Op::Ensure(Fact::Address(address)) => self.maps.insert_address(cookie, *address)?,
            Op::Remove(Fact::Address(address)) => self.maps.remove_address(cookie, *address)?,
            Op::Ensure(Fact::Pod(pod)) => self.maps.insert_pod(cookie, *pod)?,
            Op::Remove(Fact::Pod(pod)) => self.maps.remove_pod(cookie, *pod)?,
        }
        Ok(())
    }
}

impl Datapath for Linux {
    fn cookie(&mut self, netns: &NetNs) -> io::Result<u64> {
        netns.cookie()
    }

    fn addresses(&mut self, netns: &NetNs) -> io::Result<Vec<IpAddr>> {
        netns.addresses()
    }

    fn observe(&mut self, target: &Target) -> Result<Observation, Error> {
        self.look(target).map_err(|source| Error::Namespace { pod: target.identity.to_string(), source })
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

    fn rest(&mut self) {
        self.leave();
    }
}

impl Mark {
    /// The mark's value and the priority of its rule.
    const fn rule(self) -> (u32, u32) {
        use redirect_ebpf::constants::{
            MARK_CAPTURE, MARK_DELIVERY, RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY,
        };
        match self {
            Self::Capture => (MARK_CAPTURE, RULE_PRIORITY_CAPTURE),
            Self::Delivery => (MARK_DELIVERY, RULE_PRIORITY_DELIVERY),
        }
    }
}

impl Interface {
    /// Whether it is `lo`.
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        self.index == LOOPBACK_INDEX
    }
}
