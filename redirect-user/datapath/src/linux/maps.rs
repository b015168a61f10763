//! The maps of the kernel side.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::{fmt, io};

use anyhow::Context as _;
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use redirect_ebpf::constants::MAX_PROXY_CGROUPS;
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::flow::{FlowLimits, FlowState};
use redirect_ebpf::maps::{
    Config, ConfigFlags, ExcludedAddress, ExcludedPort, Pod, PodAddress, PodCounters, PodFlags, ProxyCgroup,
    ProxyPart, Scope,
};

use super::holders::{Holders, Learned};
use super::{ProxyIdentity, Settings};
use crate::datapath::Target;
use crate::facts::Fact;
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::{Exclusion, PodAddresses};
use redirect_protocol::wire::{CounterReport, MapReport, PodCounter};

/// The capacities of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Enrolled pods.
    pub pods: u32,
    /// Addresses of each family.
    pub addresses: u32,
    /// Exclusions of ports, and of networks of each family.
    pub exclusions: u32,
}

/// The flags that select where a pod's new connections are captured.
const PLACES: u32 = PodFlags::ON_HOST.0 | PodFlags::IN_POD.0;

/// The state of the kernel side's log.
pub(super) const DIAGNOSTICS: &str = "DIAGNOSTICS";

pub(super) struct Maps {
    pods: Table<u64, Pod>,
    pod_counters: Table<u64, PodCounters>,
    ipv4: Table<[u8; 4], PodAddress>,
    ipv6: Table<[u8; 16], PodAddress>,
    interfaces: Table<u32, PodAddress>,
    proxy_cgroups: Table<u64, ProxyCgroup>,
    config: Array<MapData, Config>,
    counters: PerCpuArray<MapData, u64>,
    /// Until its reader takes it.
    flows: Option<RingBuf<MapData>>,
    flow_limits: Array<MapData, FlowLimits>,
    flow_state: PerCpuArray<MapData, FlowState>,
    diagnostics: PerCpuArray<MapData, FlowState>,
    excluded_ports: Table<ExcludedPort, u8>,
    excluded_ipv4: LpmTrie<MapData, ExcludedAddress<[u8; 4]>, u8>,
    excluded_ipv6: LpmTrie<MapData, ExcludedAddress<[u8; 16]>, u8>,
    capacities: Capacities,
    host_cookie: u64,
    /// Placement `node`: index of the device through which packets reach the proxy; else zero.
    ingress_device: u32,
    flags: ConfigFlags,
    /// The exclusions in the maps, by namespace cookie; zero: for every pod.
    exclusions: HashMap<u64, BTreeSet<Exclusion>>,
    /// The addresses in the maps, by namespace cookie.
    addresses: HashMap<u64, HashSet<IpAddr>>,
    /// The holders of each address.
    holders: Holders,
    /// The cgroups of this placement's proxies.
    proxies: BTreeMap<u64, ProxyPart>,
    /// How to recognize the other placement's proxies, while it has a part in any pod.
    inherited: Inherited,
}

#[derive(Default)]
struct Inherited {
    flags: ConfigFlags,
    proxies: BTreeMap<u64, ProxyPart>,
}

/// A hash map with its name, fill and capacity.
struct Table<K: aya::Pod, V: aya::Pod> {
    name: &'static str,
    map: BpfHashMap<MapData, K, V>,
    capacity: u32,
    /// How to make room.
    remedy: &'static str,
}

impl<K: aya::Pod + Eq + Hash, V: aya::Pod + PartialEq> Table<K, V> {
    fn take(
        programs: &mut Ebpf,
        name: &'static str,
        capacity: u32,
        remedy: &'static str,
    ) -> anyhow::Result<Self> {
        Ok(Self { name, map: BpfHashMap::try_from(take(programs, name)?)?, capacity, remedy })
    }

    /// `None`: there is no such entry. One that can't be read is an error, because it must not be taken for
    /// absent.
    fn get(&self, key: &K) -> io::Result<Option<V>> {
        there(self.map.get(key, 0)).map_err(|error| self.unreadable(&error))
    }

    fn keys(&self) -> io::Result<Vec<K>> {
        let keys: Result<Vec<K>, MapError> = self.map.keys().collect();
        keys.map_err(|error| self.unreadable(&error))
    }

    fn entries(&self) -> io::Result<Vec<(K, V)>> {
        // Entries that are removed meanwhile are skipped.
        let entries = self.map.iter().filter_map(|entry| there(entry).transpose());
        entries.collect::<Result<Vec<_>, MapError>>().map_err(|error| self.unreadable(&error))
    }

    fn unreadable(&self, error: &MapError) -> io::Error {
        io::Error::other(format!("cannot read map {}: {}", self.name, Causes(error)))
    }

    fn insert(&mut self, key: K, value: V) -> anyhow::Result<()> {
        match self.map.insert(key, value, 0) {
            Ok(()) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                anyhow::bail!("map {} is full with {} entries: {}", self.name, self.capacity, self.remedy)
            }
            Err(error) => Err(error).with_context(|| format!("map {}", self.name)),
        }
    }

    /// Removing a missing entry is no error.
    fn remove(&mut self, key: &K) -> anyhow::Result<()> {
        match self.map.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            Err(error) => Err(error).with_context(|| format!("map {}", self.name)),
        }
    }

    fn report(&self) -> MapReport {
        MapReport { name: self.name.into(), entries: self.map.keys().count(), capacity: self.capacity }
    }
}

fn there<T>(read: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An error with its causes.
struct Causes<'a>(&'a dyn std::error::Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        self.0.source().map_or(Ok(()), |cause| write!(f, ": {}", Causes(cause)))
    }
}

fn take(programs: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    programs.take_map(name).with_context(|| format!("map {name} is not in the object"))
}

impl Maps {
    /// Applies the node-wide settings. Programs of a previous agent may be using these very maps.
    pub(super) fn configure(&mut self, settings: &Settings) -> anyhow::Result<()> {
        self.host_cookie = settings.host_cookie;
        self.flow_limits.set(0, settings.flows, 0).context("map FLOW_LIMITS")?;
        for exclusion in &settings.exclusions {
            self.insert_exclusion(0, *exclusion)?;
        }
        let old: Vec<Exclusion> = self.exclusions.get(&0).into_iter().flatten().copied().collect();
        for exclusion in old.iter().filter(|old| !settings.exclusions.contains(old)) {
            self.remove_exclusion(0, *exclusion)?;
        }
        self.flags = self
            .flags
            .with(ConfigFlags::REFUSE, settings.refuse)
            .with(ConfigFlags::LINK_LOCAL, settings.link_local)
            .with(
                ConfigFlags::UNMARKED_PROXY,
                settings.placement == Placement::Node && !settings.proxy_cgroups.is_empty(),
            )
            .with(ConfigFlags::EXCLUSIONS, !settings.exclusions.is_empty())
            .with(ConfigFlags::PROXY_BY_CGROUP, true)
            .with(ConfigFlags::PROXY_BY_MARK, settings.proxy_identity == ProxyIdentity::Mark);
        self.inherited.flags.0 &= !self.flags.0;
        self.set_flags(ConfigFlags(self.flags.0 | self.inherited.flags.0))?;
        self.set_proxy_cgroups(&settings.proxy_cgroups)
    }

    /// Takes over the settings that an agent of the other placement made for its proxies and the ingress device. Takes
    /// effect with [`Self::configure`].
    pub(super) fn inherit(&mut self, part: impl Fn(ProxyPart) -> ProxyPart) -> anyhow::Result<()> {
        let Config { flags, ingress_device, .. } = self.config.get(&0, 0).context("map CONFIG")?;
        self.ingress_device = ingress_device as u32;
        let recognized = ConfigFlags::PROXY_BY_MARK.0 | ConfigFlags::UNMARKED_PROXY.0;
        let proxies = self.proxy_cgroups.entries()?.into_iter();
        self.inherited = Inherited {
            flags: ConfigFlags(flags as u32 & recognized),
            proxies: proxies.map(|(cgroup, known)| (cgroup, part(known.part))).collect(),
        };
        Ok(())
    }

    /// Drops them, once nothing of the other placement is left.
    pub(super) fn disinherit(&mut self) -> anyhow::Result<()> {
        let Inherited { flags, .. } = std::mem::take(&mut self.inherited);
        self.set_flags(ConfigFlags(self.flags.0 & !flags.0))?;
        let proxies = self.proxies.clone();
        self.set_proxy_cgroups(&proxies)
    }

    /// Where the pod's new connections are captured, if an agent has recorded it.
    pub(super) fn captured(&self, cookie: u64) -> io::Result<PodFlags> {
        Ok(self.pods.get(&cookie)?.map_or(PodFlags::default(), |pod| PodFlags(pod.flags & PLACES)))
    }

    /// The enrolled namespaces.
    pub(super) fn enrolled(&self) -> io::Result<BTreeSet<u64>> {
        Ok(self.pods.keys()?.into_iter().collect())
    }

    /// Indexes the contents of the maps.
    fn index(&mut self) -> anyhow::Result<()> {
        for (address, owner) in self.ipv4.entries()? {
            let address = Ipv4Addr::from(address).into();
            self.addresses.entry(owner.netns_cookie).or_default().insert(address);
        }
        for (address, owner) in self.ipv6.entries()? {
            let address = Ipv6Addr::from(address).into();
            self.addresses.entry(owner.netns_cookie).or_default().insert(address);
        }
        let ports = self.excluded_ports.keys()?.into_iter().filter_map(|key| {
            let (cookie, direction) = parts(key.scope)?;
            Some((cookie, Exclusion::Port(direction, u16::from_be_bytes(key.port))))
        });
        let network = |scope: Scope, prefix: u32, address: IpAddr| {
            let (cookie, direction) = parts(scope)?;
            let length = prefix.checked_sub(Scope::BITS)?.try_into().ok()?;
            Some((cookie, Exclusion::Network(direction, IpNet::new(address, length).ok()?)))
        };
        let keys: Vec<_> =
            self.excluded_ipv4.keys().collect::<Result<_, _>>().context("map EXCLUDED_IPV4")?;
        let ipv4 = keys.into_iter().filter_map(|key| {
            let ExcludedAddress { scope, address } = key.data();
            network(scope, key.prefix_len(), Ipv4Addr::from(address).into())
        });
        let keys: Vec<_> =
            self.excluded_ipv6.keys().collect::<Result<_, _>>().context("map EXCLUDED_IPV6")?;
        let ipv6 = keys.into_iter().filter_map(|key| {
            let ExcludedAddress { scope, address } = key.data();
            network(scope, key.prefix_len(), Ipv6Addr::from(address).into())
        });
        let mut exclusions: HashMap<u64, BTreeSet<Exclusion>> = HashMap::new();
        for (cookie, exclusion) in ports.chain(ipv4).chain(ipv6) {
            exclusions.entry(cookie).or_default().insert(exclusion);
        }
        self.exclusions = exclusions;
        Ok(())
    }

    /// The cookies of all namespaces with entries in the maps.
    pub(super) fn cookies(&self) -> io::Result<BTreeSet<u64>> {
        let pods = self.pods.keys()?.into_iter().chain(self.pod_counters.keys()?);
        let others = self.addresses.keys().chain(self.exclusions.keys()).copied();
        Ok(pods.chain(others).filter(|cookie| *cookie != 0).collect())
    }

    /// Removes all entries of a namespace.
    pub(super) fn forget(&mut self, cookie: u64) -> anyhow::Result<()> {
        self.pods.remove(&cookie)?;
        self.remove_counters(cookie)?;
        self.devices(cookie)?.into_iter().try_for_each(|index| self.interfaces.remove(&index))?;
        let addresses = self.addresses.get(&cookie).into_iter().flatten().copied().collect::<Vec<_>>();
        addresses.into_iter().try_for_each(|address| self.remove_address(cookie, address))?;
        let exclusions = self.exclusions.get(&cookie).into_iter().flatten().copied().collect::<Vec<_>>();
        exclusions.into_iter().try_for_each(|exclusion| self.remove_exclusion(cookie, exclusion))
    }

    /// Enters a pod, because maps of a new layout start empty.
    pub(super) fn fill(&mut self, target: &Target) -> anyhow::Result<()> {
        let cookie = target.netns_cookie;
        target.exclusions.iter().try_for_each(|exclusion| self.insert_exclusion(cookie, *exclusion))?;
        target.addresses.iter().try_for_each(|address| self.insert_address(cookie, address))?;
        self.holders.note(cookie, &target.addresses, &[]);
        self.ensure_counters(cookie)?;
        let mut pod = target.kernel_pod();
        pod.flags |= self.captured(cookie)?.0;
        self.insert_pod(cookie, pod)
    }

    fn set_flags(&mut self, flags: ConfigFlags) -> anyhow::Result<()> {
        self.flags = flags;
        let config = Config {
            host_cookie: self.host_cookie,
            flags: flags.0.into(),
            ingress_device: self.ingress_device.into(),
        };
        self.config.set(0, config, 0).context("map CONFIG")
    }

    pub(super) fn take(programs: &mut Ebpf, capacities: Capacities) -> anyhow::Result<Self> {
        const MORE_PODS: &str = "raise the agent's --max-pods";
        const MORE_EXCLUSIONS: &str = "raise the agent's --max-exclusions, or exclude less";
        const MORE_ADDRESSES: &str = "raise the agent's --max-addresses";
        let mut maps = Self {
            pods: Table::take(programs, "PODS", capacities.pods, MORE_PODS)?,
            pod_counters: Table::take(programs, "POD_COUNTERS", capacities.pods, MORE_PODS)?,
            ipv4: Table::take(programs, "POD_IPV4", capacities.addresses, MORE_ADDRESSES)?,
            ipv6: Table::take(programs, "POD_IPV6", capacities.addresses, MORE_ADDRESSES)?,
            interfaces: Table::take(programs, "INTERFACES", capacities.addresses, MORE_ADDRESSES)?,
            proxy_cgroups: Table::take(
                programs,
                "PROXY_CGROUPS",
                MAX_PROXY_CGROUPS,
                "stop node proxies that are no longer needed",
            )?,
            config: Array::try_from(take(programs, "CONFIG")?)?,
            counters: PerCpuArray::try_from(take(programs, "COUNTERS")?)?,
            flows: Some(RingBuf::try_from(take(programs, "FLOWS")?)?),
            flow_limits: Array::try_from(take(programs, "FLOW_LIMITS")?)?,
            flow_state: PerCpuArray::try_from(take(programs, "FLOW_STATE")?)?,
            diagnostics: PerCpuArray::try_from(take(programs, DIAGNOSTICS)?)?,
            excluded_ports: Table::take(programs, "EXCLUDED_PORTS", capacities.exclusions, MORE_EXCLUSIONS)?,
            excluded_ipv4: LpmTrie::try_from(take(programs, "EXCLUDED_IPV4")?)?,
            excluded_ipv6: LpmTrie::try_from(take(programs, "EXCLUDED_IPV6")?)?,
            capacities,
            host_cookie: 0,
            ingress_device: 0,
            flags: ConfigFlags::default(),
            exclusions: HashMap::new(),
            addresses: HashMap::new(),
            holders: Holders::default(),
            proxies: BTreeMap::new(),
            inherited: Inherited::default(),
        };
        maps.index()?;
        Ok(maps)
    }

    /// The devices of the host that lead to a pod.
    pub(super) fn devices(&self, cookie: u64) -> io::Result<Vec<u32>> {
        let all = self.interfaces.entries()?.into_iter();
        Ok(all.filter(|(_, owner)| owner.netns_cookie == cookie).map(|(index, _)| index).collect())
    }

    /// The pod that a device of the host leads to.
    pub(super) fn pod_behind(&self, index: u32) -> Option<u64> {
        self.interfaces.get(&index).ok().flatten().map(|owner| owner.netns_cookie)
    }

    pub(super) fn insert_device(&mut self, cookie: u64, index: u32) -> anyhow::Result<()> {
        self.interfaces.insert(index, PodAddress { netns_cookie: cookie })
    }

    /// Does nothing if the device belongs to another pod by now.
    pub(super) fn remove_device(&mut self, cookie: u64, index: u32) -> anyhow::Result<()> {
        let owner = self.interfaces.get(&index)?.map(|owner| owner.netns_cookie);
        if owner == Some(cookie) { self.interfaces.remove(&index) } else { Ok(()) }
    }

    /// Takes effect with [`Self::configure`].
    pub(super) fn set_ingress_device(&mut self, index: u32) {
        self.ingress_device = index;
    }

    /// Takes effect at once.
    pub(super) fn change_ingress_device(&mut self, index: u32) -> anyhow::Result<()> {
        if self.ingress_device == index {
            return Ok(());
        }
        self.ingress_device = index;
        self.set_flags(self.flags)
    }

    /// Existing counts stay.
    pub(super) fn ensure_counters(&mut self, cookie: u64) -> anyhow::Result<()> {
        match self.pod_counters.get(&cookie)? {
            Some(_) => Ok(()),
            None => self.pod_counters.insert(cookie, PodCounters::default()),
        }
    }

    pub(super) fn remove_counters(&mut self, cookie: u64) -> anyhow::Result<()> {
        self.holders.forget(cookie);
        self.pod_counters.remove(&cookie)
    }

    pub(super) fn insert_pod(&mut self, cookie: u64, pod: Pod) -> anyhow::Result<()> {
        self.pods.insert(cookie, pod)
    }

    /// The pod's entry.
    pub(super) fn pod(&self, cookie: u64) -> io::Result<Option<Pod>> {
        self.pods.get(&cookie)
    }

    /// Whether an exclusion covers the connection; looked up in the same way as by the kernel side.
    pub(super) fn is_excluded(
        &self,
        cookie: u64,
        flags: PodFlags,
        direction: Direction,
        peer: IpAddr,
        port: u16,
    ) -> anyhow::Result<bool> {
        let mut of = Vec::new();
        if self.config.get(&0, 0)?.flags & u64::from(ConfigFlags::EXCLUSIONS.0) != 0 {
            of.push(0);
        }
        if flags.contains(PodFlags::EXCLUSIONS) {
            of.push(cookie);
        }
        for cookie in of {
            let port = ExcludedPort { scope: Scope::new(cookie, direction), port: port.to_be_bytes() };
            let is_excluded = self.excluded_ports.get(&port)?.is_some()
                || match peer {
                    IpAddr::V4(v4) => {
                        there(self.excluded_ipv4.get(&ipv4_key(cookie, direction, v4.into()), 0))?.is_some()
                    }
                    IpAddr::V6(v6) => {
                        there(self.excluded_ipv6.get(&ipv6_key(cookie, direction, v6.into()), 0))?.is_some()
                    }
                };
            if is_excluded {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn has_pod(&self, cookie: u64) -> io::Result<bool> {
        Ok(self.pods.get(&cookie)?.is_some())
    }

    pub(super) fn remove_pod(&mut self, cookie: u64, pod: Pod) -> anyhow::Result<()> {
        if self.pods.get(&cookie)? == Some(pod) { self.pods.remove(&cookie) } else { Ok(()) }
    }

    pub(super) fn insert_exclusion(&mut self, cookie: u64, exclusion: Exclusion) -> anyhow::Result<()> {
        let full = |error: MapError| match error {
            MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::ENOSPC) => {
                anyhow::anyhow!(
                    "the map of excluded networks is full with {} entries: raise the agent's --max-exclusions, or exclude less",
                    self.capacities.exclusions
                )
            }
            error => anyhow::Error::new(error).context("map of excluded networks"),
        };
        match exclusion {
            Exclusion::Port(direction, port) => {
                let scope = Scope::new(cookie, direction);
                self.excluded_ports.insert(ExcludedPort { scope, port: port.to_be_bytes() }, 1)?;
            }
            Exclusion::Network(direction, IpNet::V4(network)) => {
                self.excluded_ipv4.insert(&ipv4_key(cookie, direction, network), 1, 0).map_err(full)?;
            }
            Exclusion::Network(direction, IpNet::V6(network)) => {
                self.excluded_ipv6.insert(&ipv6_key(cookie, direction, network), 1, 0).map_err(full)?;
            }
        }
        self.exclusions.entry(cookie).or_default().insert(exclusion);
        Ok(())
    }

    pub(super) fn remove_exclusion(&mut self, cookie: u64, exclusion: Exclusion) -> anyhow::Result<()> {
        match exclusion {
            Exclusion::Port(direction, port) => {
                let scope = Scope::new(cookie, direction);
                self.excluded_ports.remove(&ExcludedPort { scope, port: port.to_be_bytes() })?;
            }
            Exclusion::Network(direction, IpNet::V4(network)) => {
                self.excluded_ipv4.remove(&ipv4_key(cookie, direction, network))?;
            }
            Exclusion::Network(direction, IpNet::V6(network)) => {
                self.excluded_ipv6.remove(&ipv6_key(cookie, direction, network))?;
            }
        }
        // Last, so that entries that could not be removed are found again.
        if let Some(known) = self.exclusions.get_mut(&cookie) {
            known.remove(&exclusion);
            if known.is_empty() {
                self.exclusions.remove(&cookie);
            }
        }
        Ok(())
    }

    /// Whether connections to link-local addresses go past the proxy.
    pub(super) fn lets_link_local_pass(&self) -> bool {
        self.flags.contains(ConfigFlags::LINK_LOCAL)
    }

    /// The pod that has the address.
    pub(super) fn owner(&self, address: IpAddr) -> io::Result<Option<u64>> {
        let entry = match address {
            IpAddr::V4(v4) => self.ipv4.get(&v4.octets())?,
            IpAddr::V6(v6) => self.ipv6.get(&v6.octets())?,
        };
        Ok(entry.map(|entry| entry.netns_cookie))
    }

    /// Takes the address over if another pod had it: the runtime has assigned it anew.
    pub(super) fn insert_address(&mut self, cookie: u64, address: IpAddr) -> anyhow::Result<()> {
        let entry = PodAddress { netns_cookie: cookie };
        match address {
            IpAddr::V4(v4) => self.ipv4.insert(v4.octets(), entry)?,
            IpAddr::V6(v6) => self.ipv6.insert(v6.octets(), entry)?,
        }
        self.addresses.entry(cookie).or_default().insert(address);
        Ok(())
    }

    /// Does nothing if the address belongs to another pod by now.
    pub(super) fn remove_address(&mut self, cookie: u64, address: IpAddr) -> anyhow::Result<()> {
        if self.owner(address)? == Some(cookie) {
            match address {
                IpAddr::V4(v4) => self.ipv4.remove(&v4.octets())?,
                IpAddr::V6(v6) => self.ipv6.remove(&v6.octets())?,
            }
        }
        // Last, so that entries that could not be removed are found again.
        if let Some(known) = self.addresses.get_mut(&cookie) {
            known.remove(&address);
            if known.is_empty() {
                self.addresses.remove(&cookie);
            }
        }
        Ok(())
    }

    /// The addresses on a pod's interfaces that count as its own, besides the named ones. Addresses on several pods' interfaces
    /// count for none.
    pub(super) fn learn(&mut self, target: &Target, found: &[IpAddr]) -> anyhow::Result<PodAddresses> {
        let Learned { own, contested } = self.holders.note(target.netns_cookie, &target.addresses, found);
        for address in contested {
            if let Some(owner) = self.owner(address)? {
                self.remove_address(owner, address)?;
            }
        }
        Ok(own)
    }

    fn known_addresses(&self, target: &Target) -> HashSet<IpAddr> {
        let remembered = self.addresses.get(&target.netns_cookie).into_iter().flatten().copied();
        remembered.chain(target.addresses.iter()).collect()
    }

    /// The entries of a pod.
    pub(super) fn facts(&self, target: &Target) -> io::Result<Vec<Fact>> {
        let cookie = target.netns_cookie;
        let counters = self.pod_counters.get(&cookie)?.map(|_| Fact::Counters);
        let pod = self.pods.get(&cookie)?.map(Fact::Pod);
        let mut facts: Vec<Fact> = counters.into_iter().chain(pod).collect();
        for address in self.known_addresses(target) {
            if self.owner(address)? == Some(cookie) {
                facts.push(Fact::Address(address));
            }
        }
        facts.extend(self.exclusions.get(&cookie).into_iter().flatten().copied().map(Fact::Excluded));
        Ok(facts)
    }

    pub(super) fn set_proxy_cgroups(&mut self, cgroups: &BTreeMap<u64, ProxyPart>) -> anyhow::Result<()> {
        self.proxies = cgroups.clone();
        let mut all = self.inherited.proxies.clone();
        all.extend(cgroups);
        for (cgroup, part) in &all {
            self.proxy_cgroups.insert(*cgroup, ProxyCgroup { part: *part })?;
        }
        let stale: Vec<u64> =
            self.proxy_cgroups.keys()?.into_iter().filter(|cgroup| !all.contains_key(cgroup)).collect();
        stale.iter().try_for_each(|cgroup| self.proxy_cgroups.remove(cgroup))
    }

    pub(super) fn take_flows(&mut self) -> Option<RingBuf<MapData>> {
        self.flows.take()
    }

    pub(super) fn tell_flows(&mut self, on: bool) -> anyhow::Result<()> {
        self.set_flags(self.flags.with(ConfigFlags::FLOWS, on))
    }

    /// The flow state, over all CPUs.
    pub(super) fn flows(&self) -> anyhow::Result<FlowState> {
        sum(&self.flow_state)
    }

    /// The drop log's state, over all CPUs.
    pub(super) fn diagnostics(&self) -> anyhow::Result<FlowState> {
        sum(&self.diagnostics)
    }

    pub(super) fn report(&self) -> Vec<MapReport> {
        vec![
            self.pods.report(),
            self.pod_counters.report(),
            self.ipv4.report(),
            self.ipv6.report(),
            self.interfaces.report(),
            self.proxy_cgroups.report(),
            self.excluded_ports.report(),
            self.networks("EXCLUDED_IPV4", self.excluded_ipv4.keys().count()),
            self.networks("EXCLUDED_IPV6", self.excluded_ipv6.keys().count()),
        ]
    }

    fn networks(&self, name: &str, entries: usize) -> MapReport {
        MapReport { name: name.into(), entries, capacity: self.capacities.exclusions }
    }

    /// The pod's counters that are not zero.
    pub(super) fn counters_of(&self, cookie: u64) -> anyhow::Result<Vec<PodCounter>> {
        let PodCounters { connections } = match self.pod_counters.map.get(&cookie, 0) {
            Ok(counters) => counters,
            Err(MapError::KeyNotFound) => return Ok(Vec::new()),
            Err(error) => return Err(error).context("map POD_COUNTERS"),
        };
        let ways = Family::ALL.into_iter().flat_map(|family| {
            let verdicts =
                move |&direction| Verdict::ALL.iter().map(move |&verdict| (family, direction, verdict));
            Direction::ALL.iter().flat_map(verdicts)
        });
        let counted = ways.filter_map(|(family, direction, verdict)| {
            let place = count::of_pod(family, direction, verdict, Reason::Enrolled)?;
            let connections = connections.get(place).copied().filter(|connections| *connections > 0)?;
            Some(PodCounter {
                family: family.to_string(),
                direction: direction.label().into(),
                verdict: verdict.label().into(),
                connections,
            })
        });
        Ok(counted.collect())
    }

    pub(super) fn counters(&self) -> anyhow::Result<Vec<CounterReport>> {
        let mut reports = Vec::new();
        for family in Family::ALL {
            for &direction in Direction::ALL {
                for &verdict in Verdict::ALL {
                    for &reason in Reason::ALL {
                        let place = count::index(family, direction, verdict, reason);
                        let connections = self.counters.get(&place, 0)?.iter().sum();
                        if connections > 0 {
                            reports.push(CounterReport {
                                family: family.to_string(),
                                direction: direction.label().into(),
                                verdict: verdict.label().into(),
                                reason: reason.label().into(),
                                connections,
                            });
                        }
                    }
                }
            }
        }
        Ok(reports)
    }
}

fn sum(states: &PerCpuArray<MapData, FlowState>) -> anyhow::Result<FlowState> {
    let mut sum = FlowState::default();
    for state in states.get(&0, 0)?.iter() {
        sum.limited += state.limited;
        sum.full += state.full;
        sum.seen = sum.seen.wrapping_add(state.seen);
    }
    Ok(sum)
}

/// The cookie and the direction of a scope.
fn parts(scope: Scope) -> Option<(u64, Direction)> {
    let direction = Direction::ALL.iter().copied().find(|direction| *direction as u8 == scope.direction)?;
    Some((u64::from_be_bytes(scope.netns_cookie), direction))
}

fn ipv4_key(cookie: u64, direction: Direction, network: Ipv4Net) -> Key<ExcludedAddress<[u8; 4]>> {
    let data = ExcludedAddress { scope: Scope::new(cookie, direction), address: network.network().octets() };
    Key::new(Scope::BITS + u32::from(network.prefix_len()), data)
}

fn ipv6_key(cookie: u64, direction: Direction, network: Ipv6Net) -> Key<ExcludedAddress<[u8; 16]>> {
    let data = ExcludedAddress { scope: Scope::new(cookie, direction), address: network.network().octets() };
    Key::new(Scope::BITS + u32::from(network.prefix_len()), data)
}
