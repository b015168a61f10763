//! Removes everything that this project created in a network namespace, without checkpoints.

use std::collections::BTreeSet;
use std::io;

use redirect_ebpf::Family;

use super::devices;
use super::ingress_device::{self, EarlyDemuxNote};
use super::sysctl::Sysctls;
use crate::facts::Sysctl;
use redirect_linux::netlink::{Netlink, Side};
use redirect_linux::netns::NetNs;

/// What was removed from a namespace, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stripped {
    /// TC filters.
    pub filters: usize,
    /// Routing rules.
    pub rules: usize,
    /// Routes.
    pub routes: usize,
    /// Sysctls that were turned off.
    pub sysctls: usize,
}

/// What was removed from the host's namespace (placement `node`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct HostReport {
    /// TC filters on pods' devices.
    pub filters: usize,
    /// Routing rules.
    pub rules: usize,
    /// Whether the ingress device was there.
    pub ingress_device: bool,
    /// Whether the rule was there that keeps connection tracking off the ingress device.
    pub notrack: bool,
}

/// Removes all of our state from the calling thread's namespace, which is the host's. If `known` is given, only filters on
/// these devices.
pub fn strip_host(note: &EarlyDemuxNote, known: Option<&BTreeSet<u32>>) -> io::Result<HostReport> {
    let mut netlink = Netlink::open()?;
    let mut report = HostReport::default();
    let (interfaces, _) = netlink.interfaces()?;
    for interface in interfaces {
        if known.is_some_and(|known| !known.contains(&interface.index)) {
            continue;
        }
        for filter in netlink.filters(interface.index)? {
            if netlink.delete_filter(interface.index, filter)? {
                netlink.delete_qdisc(interface.index)?;
            }
            report.filters += 1;
        }
    }
    (report.rules, report.ingress_device, report.notrack) = ingress_device::remove(&mut netlink, note)?;
    Ok(report)
}

/// The indices of the devices in the calling thread's namespace that lead to a pod.
pub fn devices_of(pod: &NetNs) -> io::Result<BTreeSet<u32>> {
    let ends = devices::of(pod, &NetNs::current()?, &mut Netlink::open()?)?.ends;
    Ok(ends.into_iter().map(|end| end.index).collect())
}

/// Strips a namespace. `foreign` are the sysctls that were on before the enrollment, if known: the namespace is then a
/// pod's. In other namespaces, sysctls and empty qdiscs count as ours only if other state of ours was found.
pub fn strip(netns: &NetNs, foreign: Option<&BTreeSet<Sysctl>>) -> io::Result<Stripped> {
    netns.run(|| strip_here(foreign))?
}

fn strip_here(foreign: Option<&BTreeSet<Sysctl>>) -> io::Result<Stripped> {
    let (mut netlink, sysctls) = (Netlink::open()?, Sysctls::open()?);
    let mut stripped = Stripped::default();
    let (interfaces, _) = netlink.interfaces()?;
    // Guards go first, or they would drop packets that are no longer marked.
    for side in [Side::Egress, Side::Ingress] {
        for interface in &interfaces {
            let filters = netlink.filters(interface.index)?;
            let mut removed = false;
            for filter in filters.into_iter().filter(|filter| filter.side == side) {
                removed |= netlink.delete_filter(interface.index, filter)?;
                stripped.filters += 1;
            }
            if removed || foreign.is_some() {
                netlink.delete_qdisc(interface.index)?;
            }
        }
    }
    let ipv6 = sysctls.ipv6_enabled("lo")?;
    for family in Family::ALL.into_iter().filter(|family| *family == Family::Ipv4 || ipv6) {
        for rule in netlink.rules(family)? {
            netlink.delete_rule(family, rule)?;
            stripped.rules += 1;
        }
        for route in netlink.routes(family, &interfaces)?.ours {
            netlink.delete_route(&route)?;
            stripped.routes += 1;
        }
    }
    if stripped != Stripped::default() || foreign.is_some() {
        for sysctl in sysctls.that_are_on()?.difference(foreign.unwrap_or(&BTreeSet::new())) {
            sysctls.turn_off(*sysctl)?;
            stripped.sysctls += 1;
        }
    }
    Ok(stripped)
}
