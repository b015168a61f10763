//! Placement `node`: the proxy listens in the host's namespace, and the pods stay unchanged.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use redirect_ebpf::Family;
use redirect_ebpf::constants::INGRESS_DEVICE;
use redirect_ebpf::maps::{PodFlags, ProxyPart};

use super::placed::{OnHost, Placed};
use super::{BIND, EarlyDemuxNote, Linux, OnCgroup, devices, ingress_device, lookup_place, sysctl, tc};
use crate::datapath::{Observation, Target};
use crate::facts::{Fact, Hook, Lookup, Namespace};
use redirect_linux::link::State;
use redirect_linux::netlink::Netlink;
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

pub(super) struct OnNode;

impl Placed for OnNode {
    /// The guarded ports are the host's.
    fn cgroup_programs(&self) -> &'static [OnCgroup] {
        &BIND
    }

    fn hooks(&self) -> &'static [Hook] {
        Hook::of(Placement::Node)
    }

    fn vital(&self) -> [&'static str; 2] {
        Family::ALL.map(|family| Hook::IngressDevice(family).program())
    }

    fn looks_up_in_pods(&self) -> bool {
        false
    }

    fn prepare(
        &self,
        OnHost { maps, netlink, host }: OnHost<'_>,
        rule_priority: u32,
        note: &EarlyDemuxNote,
        pods: &[Target],
    ) -> anyhow::Result<()> {
        maps.set_ingress_device(ingress_device::ensure(netlink, rule_priority, note)?.interface.index);
        for pod in pods {
            for end in devices::of(&pod.netns, host, netlink)?.ends {
                maps.insert_device(pod.netns_cookie, end.index)?;
            }
        }
        Ok(())
    }

    /// The ingress device, its programs, and the socket lookups in the host's namespace.
    fn repair(&self, linux: &mut Linux, repaired: &mut Vec<&'static str>) -> anyhow::Result<()> {
        let Linux { tc, links, programs, host_netlink, host_cookie, .. } = linux;
        let ingress_device = ingress_device::ensure(host_netlink, linux.rule_priority, &linux.note)?;
        if ingress_device.repaired {
            repaired.push(INGRESS_DEVICE);
        }
        let interface = ingress_device.interface;
        linux.maps.change_ingress_device(interface.index)?;
        let place = tc::Where { interfaces: std::slice::from_ref(&interface), on_host: true };
        let attached = tc.look(host_netlink, links, programs, *host_cookie, place)?.current;
        for hook in Family::ALL.map(Hook::IngressDevice) {
            if !attached.contains(&hook.fact(&interface)) {
                let spot =
                    tc::Spot { netns_cookie: *host_cookie, interface: &interface, carries_traffic: false };
                tc.attach(host_netlink, links, programs, &spot, hook)?;
                repaired.push(hook.program());
            }
        }
        for lookup in Lookup::ALL {
            let name = format!("{}-host", lookup.program());
            let (program, place) = (programs.get(lookup.program())?, lookup_place(&linux.host)?);
            if links.state(&name, program, place)? != Some(State::Current) {
                links.ensure(&name, program, place)?;
                repaired.push(lookup.program());
            }
        }
        links.remove(&format!("{}-host", Lookup::FORMER))?;
        Ok(())
    }

    fn observe(&self, linux: &mut Linux, target: &Target) -> io::Result<Observation> {
        let (found, host_id) = {
            let host = linux.host.clone();
            let netlink = &mut linux.enter(target)?.netlink;
            (netlink.devices()?, netlink.namespace_id(&host)?)
        };
        let known = linux.maps.devices(target.netns_cookie)?;
        let devices = devices::lead_to(&found, host_id, &known, &mut linux.host_netlink)?;
        let mut observation = Observation::default();
        linux.look_at_host(target, &devices, &mut observation)?;
        observation.facts.extend(linux.maps.facts(target)?);
        observation.namespace = Namespace {
            ipv6: sysctl::has_ipv6()?,
            devices,
            placement: Placement::Node,
            ..Namespace::default()
        };
        Ok(observation)
    }

    fn observe_facts(&self, linux: &mut Linux, target: &Target) -> io::Result<BTreeSet<Fact>> {
        Ok(self.observe(linux, target)?.facts)
    }

    fn tidy(&self, _: &mut Linux, _: &Target) -> io::Result<()> {
        Ok(())
    }

    fn place(&self) -> PodFlags {
        PodFlags::ON_HOST
    }

    fn is_there(&self, _: &Path, netlink: &mut Netlink) -> io::Result<bool> {
        Ok(netlink.find(INGRESS_DEVICE)?.is_some())
    }

    fn inherits(&self, part: ProxyPart) -> ProxyPart {
        part
    }

    fn retire(&self, linux: &mut Linux) -> anyhow::Result<()> {
        for name in linux.tc.links_of(&linux.links, linux.host_cookie) {
            linux.links.remove(&name)?;
        }
        for lookup in Lookup::ALL {
            linux.links.remove(&format!("{}-host", lookup.program()))?;
        }
        ingress_device::remove(&mut linux.host_netlink, &linux.note)?;
        linux.note.remove()?;
        linux.maps.change_ingress_device(0)
    }

    fn listens_in<'a>(&self, host: &'a NetNs, _: &'a NetNs) -> &'a NetNs {
        host
    }
}
