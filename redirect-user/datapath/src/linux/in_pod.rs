//! Placement `pod`: the proxy listens in every pod's namespace.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use redirect_ebpf::Family;
use redirect_ebpf::maps::{PodFlags, ProxyPart};

use super::placed::{OnHost, Placed};
use super::{BIND, EarlyDemuxNote, Linux, OnCgroup, Session, devices, entered, tc};
use crate::datapath::{Observation, Target};
use crate::facts::{Fact, Hook, Interface, LOOPBACK_INDEX, Lookup, Namespace};
use crate::mirror;
use redirect_linux::link::{AttachType, State};
use redirect_linux::netlink::Netlink;
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

pub(super) struct InPod;

/// The programs on the root of the cgroup2 hierarchy.
pub(super) const CGROUP: [OnCgroup; 10] = [
    OUTBOUND[0],
    OUTBOUND[1],
    BIND[0],
    BIND[1],
    ("sendmsg_ipv4", AttachType::BPF_CGROUP_UDP4_SENDMSG),
    ("sendmsg_ipv6", AttachType::BPF_CGROUP_UDP6_SENDMSG),
    ("recvmsg_ipv4", AttachType::BPF_CGROUP_UDP4_RECVMSG),
    ("recvmsg_ipv6", AttachType::BPF_CGROUP_UDP6_RECVMSG),
    ("getpeername_ipv4", AttachType::BPF_CGROUP_INET4_GETPEERNAME),
    ("getpeername_ipv6", AttachType::BPF_CGROUP_INET6_GETPEERNAME),
];

/// The subset that captures connections.
const OUTBOUND: [OnCgroup; 2] = [
    ("outbound_ipv4", AttachType::BPF_CGROUP_INET4_CONNECT),
    ("outbound_ipv6", AttachType::BPF_CGROUP_INET6_CONNECT),
];

impl Placed for InPod {
    fn cgroup_programs(&self) -> &'static [OnCgroup] {
        &CGROUP
    }

    fn hooks(&self) -> &'static [Hook] {
        Hook::of(Placement::Pod)
    }

    fn vital(&self) -> [&'static str; 2] {
        OUTBOUND.map(|(program, _)| program)
    }

    fn looks_up_in_pods(&self) -> bool {
        true
    }

    /// No preparation on the host is needed.
    fn prepare(&self, _: OnHost<'_>, _: u32, _: &EarlyDemuxNote, _: &[Target]) -> anyhow::Result<()> {
        Ok(())
    }

    fn repair(&self, _: &mut Linux, _: &mut Vec<&'static str>) -> anyhow::Result<()> {
        Ok(())
    }

    fn observe(&self, linux: &mut Linux, target: &Target) -> io::Result<Observation> {
        let (host, gated) = (linux.host.clone(), linux.gated);
        let Session { netlink, sysctls, .. } = linux.enter(target)?;
        let (found, host_id) = (netlink.devices()?, netlink.namespace_id(&host)?);
        let interfaces: Vec<Interface> = found.iter().map(|device| device.interface.clone()).collect();
        let up: BTreeSet<u32> =
            found.iter().filter(|device| device.up).map(|device| device.interface.index).collect();
        let ipv6 = sysctls.ipv6_enabled("lo")?;
        let mut observation = Observation {
            namespace: Namespace { interfaces, up, ipv6, gated, ..Namespace::default() },
            ..Observation::default()
        };
        let interfaces = &observation.namespace.interfaces;
        let facts = &mut observation.facts;
        if observation.namespace.up.contains(&LOOPBACK_INDEX) {
            facts.insert(Fact::LoopbackUp);
        }
        let mut addresses = Vec::new();
        let families = if ipv6 { &Family::ALL[..] } else { &[Family::Ipv4][..] };
        for &family in families {
            facts.extend(netlink.rules(family)?.into_iter().map(|rule| Fact::Rule { family, rule }));
            let routes = netlink.routes(family, interfaces)?;
            if let (Family::Ipv6, Some(lo)) =
                (family, interfaces.iter().find(|interface| interface.is_loopback()))
            {
                observation.namespace.mirror = mirror::of(&routes, lo);
            }
            facts.extend(routes.ours.into_iter().map(Fact::Route));
            addresses.extend(routes.addresses);
        }
        observation.namespace.addresses = linux.maps.learn(target, &addresses).map_err(io::Error::other)?;
        let Session { netlink, netns_cookie, .. } = entered(&mut linux.session)?;
        let place = tc::Where { interfaces, on_host: false };
        let attached = linux.tc.look(netlink, &linux.links, &linux.programs, *netns_cookie, place)?;
        facts.extend(attached.current);
        observation.stale = attached.stale;
        observation.damaged = attached.damaged;
        for lookup in Lookup::ALL {
            match linux.lookup_state(lookup, target)? {
                Some(State::Current) => observation.facts.insert(lookup.fact()),
                Some(State::Stale) => observation.stale.insert(lookup.fact()),
                Some(State::Elsewhere) => observation.damaged.insert(lookup.fact()),
                None => false,
            };
        }
        observation.facts.extend(sysctls_and_entries(linux, target)?);
        let known = linux.maps.devices(target.netns_cookie)?;
        let devices = devices::lead_to(&found, host_id, &known, &mut linux.host_netlink)?;
        linux.look_at_host(target, &devices, &mut observation)?;
        observation.namespace.devices = devices;
        Ok(observation)
    }

    fn observe_facts(&self, linux: &mut Linux, target: &Target) -> io::Result<BTreeSet<Fact>> {
        let mut facts = sysctls_and_entries(linux, target)?;
        for lookup in Lookup::ALL {
            if linux.lookup_state(lookup, target)? == Some(State::Current) {
                facts.insert(lookup.fact());
            }
        }
        for index in linux.maps.devices(target.netns_cookie)? {
            facts.extend(linux.host_netlink.interface(index)?.map(Fact::Device));
        }
        Ok(facts)
    }

    fn tidy(&self, linux: &mut Linux, target: &Target) -> io::Result<()> {
        let netlink = &mut linux.enter(target)?.netlink;
        let (interfaces, _) = netlink.interfaces()?;
        interfaces.iter().try_for_each(|interface| netlink.delete_qdisc(interface.index))
    }

    fn place(&self) -> PodFlags {
        PodFlags::IN_POD
    }

    fn is_there(&self, links: &Path, _: &mut Netlink) -> io::Result<bool> {
        Ok(self.vital().into_iter().any(|program| links.join(program).exists()))
    }

    /// On the host, its connections are those of its pods.
    fn inherits(&self, _: ProxyPart) -> ProxyPart {
        ProxyPart::IN_PODS
    }

    fn retire(&self, _: &mut Linux) -> anyhow::Result<()> {
        Ok(())
    }

    fn listens_in<'a>(&self, _: &'a NetNs, pod: &'a NetNs) -> &'a NetNs {
        pod
    }
}

/// The pod's sysctls that are on, and its map entries.
fn sysctls_and_entries(linux: &mut Linux, target: &Target) -> io::Result<BTreeSet<Fact>> {
    let on = linux.enter(target)?.sysctls.that_are_on()?;
    let mut facts: BTreeSet<Fact> = on.into_iter().map(Fact::Sysctl).collect();
    facts.extend(linux.maps.facts(target)?);
    Ok(facts)
}
