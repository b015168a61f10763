//! The desired facts in placement `pod`.

use std::collections::BTreeSet;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use redirect_ebpf::Family;
use redirect_ebpf::constants::{REPLY_TABLE, ROUTE_METRIC, ROUTE_TABLE};
use redirect_ebpf::maps::PodFlags;
use redirect_protocol::pod::PodAddresses;

use super::{Fact, Hook, Interface, Namespace, Route, RouteKind, Rule, Sysctl, Wanted};

pub(super) const HOOKS: [Hook; 9] = [
    Hook::Loopback(Family::Ipv4),
    Hook::Loopback(Family::Ipv6),
    Hook::Inbound(Family::Ipv4),
    Hook::Inbound(Family::Ipv6),
    Hook::Virtual(Family::Ipv4),
    Hook::Virtual(Family::Ipv6),
    Hook::Egress(Family::Ipv4),
    Hook::Egress(Family::Ipv6),
    Hook::HostGate,
];

pub(super) fn desired(wanted: &Wanted<'_>, namespace: &Namespace) -> BTreeSet<Fact> {
    let Wanted { virtual_interfaces, exclusions, elsewhere, .. } = wanted;
    let place = if *elsewhere { PodFlags::ON_HOST } else { PodFlags::IN_POD };
    let mut addresses = wanted.addresses.clone();
    addresses.extend(namespace.addresses.iter());
    let mut facts = BTreeSet::from([
        Fact::LoopbackUp,
        Fact::Sysctl(Sysctl::TcpFwmarkAccept),
        Fact::Sysctl(Sysctl::TcpMigrateReq),
        Fact::Sysctl(Sysctl::AcceptLocal),
        Fact::Sysctl(Sysctl::ReservedPorts),
        Fact::Lookup,
        Fact::Counters,
        Fact::Pod(wanted.kernel_pod_with(&addresses, place)),
        Fact::ListenerGuard,
    ]);
    facts.extend(addresses.iter().map(Fact::Address));
    facts.extend(exclusions.iter().copied().map(Fact::Excluded));
    for end in namespace.devices.on_host().filter(|_| namespace.gated) {
        facts.insert(Hook::HostGate.fact(end));
        facts.insert(Fact::Device(end.clone()));
    }
    for family in Family::ALL {
        // The programs do not depend on IPv6 on `lo`: if only another interface has it, connections can't be given
        // to the proxy, but must not bypass it either.
        facts.extend(namespace.interfaces.iter().map(|interface| {
            let hook = if interface.is_loopback() {
                Hook::Loopback(family)
            } else if virtual_interfaces.contains(&interface.name) {
                Hook::Virtual(family)
            } else {
                Hook::Inbound(family)
            };
            hook.fact(interface)
        }));
        let others = namespace.interfaces.iter().filter(|interface| !interface.is_loopback());
        facts.extend(others.map(|interface| Hook::Egress(family).fact(interface)));
        if family == Family::Ipv4 || namespace.ipv6 {
            facts.insert(Fact::Sysctl(Sysctl::FwmarkReflect(family)));
            facts.extend(Rule::of(family).map(|rule| Fact::Rule { family, rule }));
            match family {
                Family::Ipv4 => facts.extend(ipv4_routes(&addresses, namespace).map(Fact::Route)),
                Family::Ipv6 => facts.extend(ipv6_routes(namespace).map(Fact::Route)),
            }
        }
    }
    facts
}

/// A route that delivers everything locally. Without a preferred source, because its packets already have
/// one.
fn all_of(family: Family, table: u32, metric: u32, interface: &Interface) -> Route {
    let destination = match family {
        Family::Ipv4 => IpNet::V4(Ipv4Net::default()),
        Family::Ipv6 => IpNet::V6(Ipv6Net::default()),
    };
    Route { table, destination, metric, kind: RouteKind::Open, interface: interface.clone(), source: None }
}

/// Routes through `lo`, and through the other interfaces for sockets that are bound to them.
fn ipv4_routes(addresses: &PodAddresses, namespace: &Namespace) -> impl Iterator<Item = Route> {
    let bound = !addresses.ipv4.is_empty();
    namespace.interfaces.iter().filter_map(move |interface| {
        let metric = if interface.is_loopback() { 0 } else { ROUTE_METRIC + interface.index };
        let routable = bound && namespace.up.contains(&interface.index);
        (interface.is_loopback() || routable).then(|| all_of(Family::Ipv4, ROUTE_TABLE, metric, interface))
    })
}

/// Routes for captured connections, and routes through `lo` for replies to the proxy.
fn ipv6_routes(namespace: &Namespace) -> impl Iterator<Item = Route> {
    /// The kernel's default.
    const METRIC: u32 = 1024;
    let lo = namespace.interfaces.iter().find(|interface| interface.is_loopback());
    let replies = lo.map(|lo| all_of(Family::Ipv6, REPLY_TABLE, METRIC, lo));
    namespace.mirror.routes.iter().cloned().chain(replies)
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::Direction;
    use redirect_ebpf::constants::{ROUTE_METRIC, ROUTE_TABLE};

    use super::super::*;
    use super::{all_of, desired};

    fn interface(index: u32, name: &str) -> Interface {
        Interface { index, name: name.into() }
    }

    fn namespace(ipv6: bool) -> Namespace {
        let route = all_of(Family::Ipv6, ROUTE_TABLE, 1, &interface(2, "eth0"));
        Namespace {
            interfaces: vec![interface(1, "lo"), interface(2, "eth0")],
            up: [1, 2].into(),
            addresses: PodAddresses::default(),
            mirror: Mirror { routes: vec![route], left_out: 0 },
            ipv6,
            devices: Devices::default(),
            placement: Placement::Pod,
            gated: true,
        }
    }

    fn addresses(list: &[&str]) -> PodAddresses {
        list.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect()
    }

    fn desired_plain(addresses: &PodAddresses, namespace: &Namespace) -> BTreeSet<Fact> {
        desired(&wanted(addresses, &[], &BTreeSet::new()), namespace)
    }

    fn wanted<'a>(
        addresses: &'a PodAddresses,
        virtual_interfaces: &'a [String],
        exclusions: &'a BTreeSet<Exclusion>,
    ) -> Wanted<'a> {
        Wanted { flags: PodFlags::default(), elsewhere: false, addresses, virtual_interfaces, exclusions }
    }

    #[test]
    fn connections_from_virtual_interfaces_count_as_outbound() {
        let names = ["eth0".to_owned()];
        let facts = desired(&wanted(&addresses(&["fd00::2"]), &names, &BTreeSet::new()), &namespace(true));
        for family in Family::ALL {
            assert!(facts.contains(&Hook::Virtual(family).fact(&interface(2, "eth0"))));
            assert!(!facts.contains(&Hook::Inbound(family).fact(&interface(2, "eth0"))));
        }
    }

    #[test]
    fn exclusions_are_in_place_before_the_pod_and_switch_themselves_on() {
        let exclusions = BTreeSet::from([
            Exclusion::Port(Direction::Inbound, 9090),
            Exclusion::Network(Direction::Outbound, "fd00:1::/64".parse().unwrap()),
        ]);
        let facts = desired(&wanted(&addresses(&["fd00::2"]), &[], &exclusions), &namespace(true));
        let ipv6 = "fd00::2".parse::<Ipv6Addr>().unwrap().octets();
        let pod = Fact::Pod(Pod { flags: (PodFlags::EXCLUSIONS.0 | PodFlags::IN_POD.0), ipv4: [0; 4], ipv6 });
        let is_guard =
            |fact: &&Fact| matches!(fact, Fact::Entry { .. } | Fact::Guard { .. } | Fact::ListenerGuard);
        let guards = facts.iter().rev().take_while(is_guard).count();
        assert_eq!(facts.iter().rev().nth(guards), Some(&pod));
        assert!(exclusions.into_iter().all(|exclusion| facts.contains(&Fact::Excluded(exclusion))));
    }

    #[test]
    fn a_dual_stack_pod_is_caught_in_both_families_alike() {
        let facts = desired_plain(&addresses(&["10.0.0.2", "fd00::2"]), &namespace(true));
        for family in Family::ALL {
            let routes =
                facts.iter().filter(|fact| matches!(fact, Fact::Route(route) if route.family() == family));
            assert_eq!(routes.count(), 2);
            assert!(facts.contains(&Fact::Guard { interface: interface(2, "eth0"), family }));
            for rule in Rule::of(family) {
                assert!(facts.contains(&Fact::Rule { family, rule }));
            }
            assert!(facts.contains(&Hook::Loopback(family).fact(&interface(1, "lo"))));
            assert!(facts.contains(&Hook::Inbound(family).fact(&interface(2, "eth0"))));
        }
        assert_eq!(facts.len(), 29);
    }

    #[test]
    fn a_family_without_an_address_is_caught_all_the_same() {
        for (list, absent) in [(["10.0.0.2"], Family::Ipv6), (["fd00::2"], Family::Ipv4)] {
            let namespace = Namespace { mirror: Mirror::default(), ..namespace(true) };
            let facts = desired_plain(&addresses(&list), &namespace);
            for rule in Rule::of(absent) {
                assert!(facts.contains(&Fact::Rule { family: absent, rule }));
            }
            let routes =
                facts.iter().filter(|fact| matches!(fact, Fact::Route(route) if route.family() == absent));
            assert_eq!(routes.count(), 1);
        }
    }

    #[test]
    fn addresses_that_the_namespace_has_are_the_pods_after_those_that_are_named() {
        let found = addresses(&["169.254.172.2", "fd00::2"]);
        let namespace = Namespace { addresses: found, ..namespace(true) };
        let facts = desired_plain(&addresses(&["fd00::1"]), &namespace);
        for address in ["169.254.172.2", "fd00::1", "fd00::2"] {
            assert!(facts.contains(&Fact::Address(address.parse().unwrap())), "{address}");
        }
        let ipv6 = "fd00::1".parse::<Ipv6Addr>().unwrap().octets();
        assert!(facts.contains(&Fact::Pod(Pod {
            flags: PodFlags::IN_POD.0,
            ipv4: [169, 254, 172, 2],
            ipv6
        })));
        let bound = |fact: &&Fact| matches!(fact, Fact::Route(route) if route.metric == ROUTE_METRIC + 2);
        assert_eq!(facts.iter().filter(bound).count(), 1);
    }

    #[test]
    fn a_route_that_was_replaced_is_not_removed() {
        let with = |route: Route| Namespace {
            mirror: Mirror { routes: vec![route], left_out: 0 },
            ..namespace(true)
        };
        let old = all_of(Family::Ipv6, ROUTE_TABLE, 1, &interface(2, "eth0"));
        let new = Route { source: Some("fd00::2".parse().unwrap()), ..old.clone() };
        let [old, new] = [old, new].map(|route| desired_plain(&addresses(&["fd00::2"]), &with(route)));
        assert!(matches!(&diff(&new, &old)[..], [Op::Ensure(Fact::Route(Route { source: Some(_), .. }))]));
    }

    #[test]
    fn a_namespace_without_ipv6_gets_programs_of_it_alone() {
        let facts = desired_plain(&addresses(&["10.0.0.2"]), &namespace(false));
        for fact in facts {
            let text = fact.to_string().to_lowercase();
            let program = matches!(fact, Fact::Program { .. } | Fact::Entry { .. } | Fact::Guard { .. });
            assert!(program || !text.contains("ipv6"), "{text}");
        }
    }

    #[test]
    fn the_pod_becomes_visible_when_it_is_caught_and_is_guarded_from_then_on() {
        let facts = desired_plain(&addresses(&["10.0.0.2", "fd00::2"]), &namespace(true));
        let add = diff(&facts, &BTreeSet::new());
        assert_eq!(add.len(), facts.len());
        let [.., pod, in4, in6, ipv4, ipv6, Op::Ensure(Fact::ListenerGuard)] = &add[..] else {
            panic!("{add:?}")
        };
        assert!(matches!(pod, Op::Ensure(Fact::Pod(_))));
        assert!([in4, in6].into_iter().all(|op| matches!(op, Op::Ensure(Fact::Entry { .. }))));
        assert!([ipv4, ipv6].into_iter().all(|op| matches!(op, Op::Ensure(Fact::Guard { .. }))));
        let remove = diff(&BTreeSet::new(), &facts);
        let mut undone: Vec<Op> = add.iter().map(Op::inverse).collect();
        undone.reverse();
        assert_eq!(remove, undone);
    }

    #[test]
    fn nothing_to_do_is_nothing_done() {
        let facts = desired_plain(&addresses(&["10.0.0.2"]), &namespace(true));
        assert!(diff(&facts, &facts).is_empty());
    }

    #[test]
    fn a_changed_address_is_in_place_before_the_old_one_goes() {
        let old = desired_plain(&addresses(&["10.0.0.2"]), &namespace(false));
        let new = desired_plain(&addresses(&["10.0.0.3"]), &namespace(false));
        let ops = diff(&new, &old);
        let (ensured, removed) = ops.split_at(ops.len() / 2);
        assert!(matches!(ensured, [Op::Ensure(Fact::Address(_)), Op::Ensure(Fact::Pod(_))]));
        assert!(matches!(removed, [Op::Remove(Fact::Pod(_)), Op::Remove(Fact::Address(_))]));
    }
}
