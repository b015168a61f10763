//! Cases for property tests: the addresses and ports at which decisions change, those of the pod, and any others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use redirect_ebpf::Family;
use redirect_protocol::placement::Placement;

use super::{Case, Excluded, Facts, Sender, Way, What};

/// The addresses in the cases.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// The pod's.
    pub own: Vec<IpAddr>,
    /// Other enrolled pods'.
    pub others: Vec<IpAddr>,
}

impl Addresses {
    fn of(&self, family: Family) -> Vec<IpAddr> {
        let all = self.own.iter().chain(&self.others);
        all.copied().filter(|address| address.is_ipv4() == (family == Family::Ipv4)).collect()
    }
}

/// Addresses at the edges of ranges that are treated differently.
const EDGES_IPV4: [[u8; 4]; 18] = [
    [0, 0, 0, 0],
    [0, 0, 0, 1],
    [10, 0, 0, 9],
    [126, 255, 255, 255],
    [127, 0, 0, 1],
    [127, 0, 0, 53],
    [128, 0, 0, 0],
    [169, 254, 169, 254],
    [192, 0, 2, 7],
    [223, 255, 255, 255],
    [224, 0, 0, 0],
    [239, 255, 255, 255],
    [240, 0, 0, 0],
    [247, 1, 2, 3],
    [255, 255, 255, 254],
    [255, 255, 255, 255],
    [100, 64, 0, 1],
    [198, 51, 100, 1],
];

const EDGES_IPV6: [&str; 14] = [
    "::",
    "::1",
    "::2",
    "2001:db8::7",
    "64:ff9b::1",
    "fd00::9",
    "fe7f:ffff::1",
    "fe80::",
    "fe80::1",
    "febf:ffff::1",
    "fec0::",
    "fefe::1",
    "ff00::",
    "ff02::1",
];

const PORTS: [u16; 10] = [1, 53, 80, 8443, 15000, 15001, 15006, 15008, 15053, u16::MAX];

fn address(family: Family, addresses: &Addresses) -> BoxedStrategy<IpAddr> {
    let named = select(addresses.of(family));
    match family {
        Family::Ipv4 => prop_oneof![
            4 => named,
            4 => select(&EDGES_IPV4[..]).prop_map(|octets| Ipv4Addr::from(octets).into()),
            1 => any::<[u8; 4]>().prop_map(|octets| Ipv4Addr::from(octets).into()),
        ]
        .boxed(),
        Family::Ipv6 => prop_oneof![
            4 => named,
            4 => select(&EDGES_IPV6[..]).prop_map(|text| text.parse::<Ipv6Addr>().expect("an address").into()),
            1 => any::<[u8; 16]>().prop_map(|octets| Ipv6Addr::from(octets).into()),
        ]
        .prop_filter("IPv4 in disguise", |address: &IpAddr| address.to_canonical() == *address)
        .boxed(),
    }
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![3 => select(&PORTS[..]), 1 => 1..=u16::MAX]
}

fn excluded(family: Family, addresses: &Addresses) -> impl Strategy<Value = Excluded> + use<> {
    let longest = if family == Family::Ipv4 { 32 } else { 128 };
    let network = (address(family, addresses), prop_oneof![Just(longest), 1..=longest]);
    let networks = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(network, 1..3)];
    let ports = prop_oneof![3 => Just(Vec::new()), 1 => subsequence(&PORTS[..], 1..3)];
    (networks, ports).prop_map(|(networks, ports)| Excluded { networks, ports })
}

fn facts(family: Family, addresses: &Addresses) -> impl Strategy<Value = Facts> + use<> {
    let Addresses { own, others } = addresses.clone();
    (excluded(family, addresses), excluded(family, addresses), any::<[bool; 4]>(), prop::bool::weighted(0.2))
        .prop_map(move |(excluded_outbound, excluded_inbound, switches, bypass_inbound)| {
            let [dns, any_source, earlier_connections, link_local_passes] = switches;
            Facts {
                own: own.clone(),
                others: others.clone(),
                excluded_outbound,
                excluded_inbound,
                bypass_inbound,
                dns,
                any_source,
                earlier_connections,
                link_local_passes,
            }
        })
}

/// Cases of a family.
pub fn cases(
    placement: Placement,
    family: Family,
    way: Way,
    whats: &'static [What],
    senders: &'static [Sender],
    addresses: &Addresses,
) -> impl Strategy<Value = Case> + use<> {
    let end = || (address(family, addresses), port());
    let kind = (select(senders), select(whats), prop::bool::weighted(0.2));
    (kind, end(), end(), facts(family, addresses)).prop_map(
        move |((sender, what, tagged), source, destination, pod)| Case {
            placement,
            way,
            sender,
            what,
            tagged,
            source,
            destination,
            pod,
        },
    )
}
