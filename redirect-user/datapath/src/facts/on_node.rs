//! The desired facts in placement `node`: none of them is in the pod.

use std::collections::BTreeSet;

use redirect_ebpf::Family;
use redirect_ebpf::maps::PodFlags;

use super::{Devices, Fact, Hook, Wanted};

pub(super) const HOOKS: [Hook; 6] = [
    Hook::FromPod(Family::Ipv4),
    Hook::FromPod(Family::Ipv6),
    Hook::ToPod(Family::Ipv4),
    Hook::ToPod(Family::Ipv6),
    Hook::IngressDevice(Family::Ipv4),
    Hook::IngressDevice(Family::Ipv6),
];

pub(super) fn desired(wanted: &Wanted<'_>, devices: &Devices) -> BTreeSet<Fact> {
    let place = if wanted.elsewhere { PodFlags::IN_POD } else { PodFlags::ON_HOST };
    let mut facts =
        BTreeSet::from([Fact::Counters, Fact::Pod(wanted.kernel_pod_with(wanted.addresses, place))]);
    facts.extend(wanted.addresses.iter().map(Fact::Address));
    facts.extend(wanted.exclusions.iter().copied().map(Fact::Excluded));
    for end in devices.on_host() {
        let hooks = Family::ALL.into_iter().flat_map(|family| [Hook::FromPod(family), Hook::ToPod(family)]);
        facts.extend(hooks.map(|hook| hook.fact(end)));
        facts.insert(Fact::Device(end.clone()));
    }
    facts
}
