//! The routes that give captured IPv6 connections the same source as the pod's own routes. Pure.
//!
//! The kernel routes an IPv6 connection once, and chooses its source by the route's device and preferred source (RFC 6724). So
//! the capture table has a local route for each route of the pod, with the same device. The kernel does the rest: it knows which
//! addresses are deprecated, temporary, or gone. A route is left out if a wider one has the same outcome: most pods need one
//! route.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};
use redirect_ebpf::constants::ROUTE_TABLE;
use redirect_linux::netlink::{Interface, OtherRoute, Route, RouteKind, Routes};

/// How many routes of a pod are mirrored at most.
pub const MOST: usize = 4096;

/// The metric of a route that comes after all others.
const LAST: u32 = u32::MAX - 1;

/// The mirror of a pod's routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mirror {
    /// The routes.
    pub routes: Vec<Route>,
    /// How many routes are left out, because there are more than [`MOST`]: the narrowest. Connections to their destinations are
    /// captured all the same, with the source of a wider route.
    pub left_out: usize,
}

/// The outcome of a route for a connection.
type Outcome = (RouteKind, Interface, Option<IpAddr>);

/// Mirrors the routes of the pod's main table.
#[must_use]
pub fn of(routes: &Routes, lo: &Interface) -> Mirror {
    let choices = Choices::of(&routes.main);
    let mut destinations: Vec<&IpNet> = choices.by_destination.keys().collect();
    destinations.sort_by_key(|destination| (destination.prefix_len(), destination.network()));
    let mut mirror = Mirror::default();
    for destination in destinations.into_iter().filter(|destination| choices.matters(destination)) {
        let outcomes = choices.by_destination.get(destination).into_iter().flatten().cloned();
        // Metrics only determine the order.
        mirror.routes.extend(outcomes.zip(1..).map(|((kind, interface, source), metric)| Route {
            table: ROUTE_TABLE,
            destination: *destination,
            metric,
            kind,
            interface,
            source,
        }));
    }
    mirror.left_out = mirror.routes.len().saturating_sub(MOST);
    mirror.routes.truncate(MOST);
    if routes.elsewhere || mirror.left_out > 0 {
        // The pod's own rules may lead to other tables, whose routes are not mirrored. Such connections are captured, with a
        // source of any device.
        mirror.routes.push(Route {
            table: ROUTE_TABLE,
            destination: Ipv6Net::default().into(),
            metric: LAST,
            kind: RouteKind::Open,
            interface: lo.clone(),
            source: None,
        });
    }
    mirror
}

/// The outcomes of connections to each destination, one per device, the preferred one first.
struct Choices {
    by_destination: HashMap<IpNet, Vec<Outcome>>,
    /// The prefix lengths of the destinations.
    lengths: BTreeSet<u8>,
}

impl Choices {
    fn of(routes: &[OtherRoute]) -> Self {
        let mut ordered: Vec<&OtherRoute> = routes.iter().collect();
        ordered.sort_by_key(|route| (route.metric, route.rank));
        let mut by_destination: HashMap<IpNet, Vec<Outcome>> = HashMap::new();
        for OtherRoute { destination, kind, interface, source, .. } in ordered {
            let outcomes = by_destination.entry(*destination).or_default();
            if !outcomes.iter().any(|(_, known, _)| known == interface) {
                outcomes.push((*kind, interface.clone(), *source));
            }
        }
        let lengths = by_destination.keys().map(IpNet::prefix_len).collect();
        Self { by_destination, lengths }
    }

    /// Whether a destination has another outcome than the next wider one, for sockets without a device or for those bound to one
    /// of its devices.
    fn matters(&self, destination: &IpNet) -> bool {
        let Some(outcomes) = self.by_destination.get(destination) else { return false };
        let differs = |outcome: &Outcome, device: Option<&Interface>| {
            self.wider(destination, device).is_none_or(|wider| wider != outcome)
        };
        outcomes.first().is_some_and(|best| differs(best, None))
            || outcomes.iter().any(|outcome| differs(outcome, Some(&outcome.1)))
    }

    /// The outcome of the next wider destination, for sockets without a device or for those bound to one.
    fn wider(&self, destination: &IpNet, device: Option<&Interface>) -> Option<&Outcome> {
        self.lengths.range(..destination.prefix_len()).rev().find_map(|length| {
            let wider = IpNet::new(destination.network(), *length).ok()?.trunc();
            let outcomes = self.by_destination.get(&wider)?;
            outcomes.iter().find(|(_, of, _)| device.is_none_or(|device| device == of))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LO: (u32, &str) = (1, "lo");
    const ETH0: (u32, &str) = (2, "eth0");
    const NET1: (u32, &str) = (3, "net1");

    fn interface((index, name): (u32, &str)) -> Interface {
        Interface { index, name: name.into() }
    }

    fn route(destination: &str, metric: u32, device: (u32, &str), source: Option<&str>) -> OtherRoute {
        OtherRoute {
            destination: destination.parse().unwrap(),
            metric,
            rank: 1,
            kind: RouteKind::Open,
            interface: interface(device),
            source: source.map(|source| source.parse().unwrap()),
        }
    }

    fn mirror(main: Vec<OtherRoute>) -> Mirror {
        of(&Routes { main, ..Routes::default() }, &interface(LO))
    }

    fn shown(mirror: &Mirror) -> Vec<String> {
        let show = |route: &Route| {
            let source = route.source.map(|source| format!(" src {source}")).unwrap_or_default();
            format!("{} {} {}{source}", route.destination, route.metric, route.interface.name)
        };
        mirror.routes.iter().map(show).collect()
    }

    #[test]
    fn a_pod_with_one_interface_has_one() {
        let main = vec![
            route("fd00::/64", 256, ETH0, None),
            route("fd00::1/128", 1024, ETH0, None),
            route("::/0", 1024, ETH0, None),
        ];
        assert_eq!(shown(&mirror(main)), ["::/0 1 eth0"]);
        // Without a default route the other routes remain.
        let main = vec![route("fd00::/64", 256, ETH0, None), route("fd00::1/128", 1024, ETH0, None)];
        assert_eq!(shown(&mirror(main)), ["fd00::/64 1 eth0"]);
        assert_eq!(mirror(Vec::new()), Mirror::default());
    }

    #[test]
    fn devices_and_sources_make_the_difference() {
        let main = vec![
            route("::/0", 1024, ETH0, None),
            route("fd01::/64", 256, NET1, None),
            route("fd01::8/125", 256, NET1, None),
            route("fd02::/64", 256, ETH0, Some("fd00::2")),
            route("fd02::/80", 256, ETH0, None),
        ];
        let wanted = ["::/0 1 eth0", "fd01::/64 1 net1", "fd02::/64 1 eth0 src fd00::2", "fd02::/80 1 eth0"];
        assert_eq!(shown(&mirror(main)), wanted);
    }

    #[test]
    fn of_several_devices_each_counts_for_its_sockets() {
        let both = || vec![route("::/0", 2048, NET1, None), route("::/0", 1024, ETH0, None)];
        assert_eq!(shown(&mirror(both())), ["::/0 1 eth0", "::/0 2 net1"]);
        // Equal for both kinds of sockets, then different.
        let with = |other| mirror([both(), vec![other]].concat());
        assert_eq!(shown(&with(route("fd00::/64", 1, ETH0, None))).len(), 2);
        assert_eq!(shown(&with(route("fd00::/64", 1, NET1, None))).len(), 3);
        // With equal metrics, the router preference decides.
        let preferred = OtherRoute { rank: 0, ..route("::/0", 1024, NET1, None) };
        let main = vec![route("::/0", 1024, ETH0, None), preferred];
        assert_eq!(shown(&mirror(main)), ["::/0 1 net1", "::/0 2 eth0"]);
    }

    #[test]
    fn what_refuses_goes_on_refusing() {
        let refusing = OtherRoute { kind: RouteKind::Prohibit, ..route("fd07::/32", 1024, LO, None) };
        let found = mirror(vec![route("::/0", 1024, ETH0, None), refusing]);
        assert_eq!(
            found.routes.iter().map(|route| route.kind).collect::<Vec<_>>(),
            [RouteKind::Open, RouteKind::Prohibit]
        );
    }

    #[test]
    fn what_the_main_table_does_not_know_may_be_elsewhere() {
        let main = vec![route("fd00::/64", 256, ETH0, None)];
        let found = of(&Routes { main, elsewhere: true, ..Routes::default() }, &interface(LO));
        assert_eq!(shown(&found), ["fd00::/64 1 eth0".into(), format!("::/0 {LAST} lo")]);
    }

    #[test]
    fn the_narrowest_are_left_out_when_there_are_too_many() {
        let many = (0..=MOST).map(|number| route(&format!("fd01:{number:x}::/32"), 1, NET1, None));
        let found = mirror(many.chain([route("::/0", 1024, ETH0, None)]).collect());
        assert_eq!((found.routes.len(), found.left_out), (MOST + 1, 2));
        let [first, .., last] = &found.routes[..] else { panic!("{found:?}") };
        assert_eq!((first.destination.prefix_len(), first.metric, last.metric), (0, 1, LAST));
    }
}
