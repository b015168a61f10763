//! SECURITY.md contains every quote, and the kernel's pure decisions match the rows.

use std::net::IpAddr;

use proptest::prelude::*;
use redirect_ebpf::decide::{self, Connect, Inbound, Outbound, Protocol};
use redirect_ebpf::family::{Family, Ip, Ipv4, Ipv6};
use redirect_ebpf::maps::PodFlags;

use super::cases::{Addresses, cases};
use super::*;

#[test]
fn every_row_is_in_the_document() {
    let text = include_str!("../../../SECURITY.md").split_whitespace().collect::<Vec<_>>().join(" ");
    for row in [CONNECTIONS, LEAVES, LISTENERS].into_iter().flatten() {
        assert!(text.contains(row.quote), "SECURITY.md does not say: {}", row.quote);
    }
}

fn addresses() -> Addresses {
    let parse = |list: [&str; 4]| list.map(|text| text.parse().unwrap()).to_vec();
    Addresses {
        own: parse(["10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"]),
        others: parse(["10.0.0.4", "10.1.0.4", "fd00::4", "fd00:1::4"]),
    }
}

/// A family whose addresses the standard library knows.
trait Std: Ip {
    fn from(address: IpAddr) -> Self::Address;
    fn into(address: Self::Address) -> IpAddr;
}

macro_rules! std {
    ($family:ident, $variant:ident) => {
        impl Std for $family {
            fn from(address: IpAddr) -> Self::Address {
                match address {
                    IpAddr::$variant(address) => address.octets(),
                    _ => panic!("{address} is of the other family"),
                }
            }

            fn into(address: Self::Address) -> IpAddr {
                IpAddr::from(address)
            }
        }
    };
}

std!(Ipv4, V4);
std!(Ipv6, V6);

fn outbound<I: Std>(case: &Case) -> Outbound {
    let pod = &case.pod;
    let connect = Connect {
        protocol: if case.what == What::Datagram { Protocol::Udp } else { Protocol::Tcp },
        destination: I::from(case.destination.0),
        port: case.destination.1,
        proxy: case.sender == Sender::Proxy,
        source: I::from(case.source.0),
        flags: PodFlags::default().with(PodFlags::DNS, pod.dns),
        link_local: pod.link_local_passes,
    };
    decide::outbound::<I>(&connect, |address| pod.own.contains(&I::into(address)), || case.is_excluded_out())
}

fn inbound(case: &Case) -> Inbound {
    let flags = PodFlags::default().with(PodFlags::BYPASS_INBOUND, case.pod.bypass_inbound);
    decide::inbound(
        case.destination.1,
        case.is_to_the_pod().then_some(flags),
        || case.sender == Sender::Kubelet,
        || case.is_excluded_in(),
        || false,
    )
}

fn owner(case: &Case, address: IpAddr) -> Option<u64> {
    let others = case.pod.others.iter().position(|other| *other == address).map(|place| 2 + place as u64);
    case.pod.own.contains(&address).then_some(1).or(others)
}

/// By family.
macro_rules! by_family {
    ($family:expr, $function:ident($($argument:expr),*)) => {
        match $family {
            Family::Ipv4 => $function::<Ipv4>($($argument),*),
            Family::Ipv6 => $function::<Ipv6>($($argument),*),
        }
    };
}

/// Enough for each row, many times.
fn few() -> ProptestConfig {
    ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() }
}

fn calls_are_decided_as_specified(family: Family) {
    let senders = &[Sender::Anybody, Sender::Proxy];
    let calls =
        cases(Placement::Pod, family, Way::Out, &[What::Opens, What::Datagram], senders, &addresses());
    proptest!(few(), |(case in calls)| {
        let actual = match by_family!(family, outbound(&case)) {
            Outbound::Capture => Verdict::Captured,
            Outbound::Resolve => Verdict::Resolved,
            Outbound::Deliver => Verdict::Delivered,
            Outbound::Pass(_) => Verdict::Passes,
            Outbound::Refuse(_) => Verdict::Stopped,
        };
        prop_assert_eq!(actual, call(&case));
    });
}

fn arrivals_are_decided_as_specified(family: Family) {
    let senders = &[Sender::Anybody, Sender::Kubelet];
    let syns = cases(Placement::Pod, family, Way::In, &[What::Opens], senders, &addresses());
    proptest!(few(), |(case in syns)| {
        let actual = match inbound(&case) {
            Inbound::Capture => Verdict::Captured,
            Inbound::Tunnel => Verdict::Tunnelled,
            Inbound::Pass(_) => Verdict::Passes,
            Inbound::Drop(_) => Verdict::Stopped,
        };
        prop_assert_eq!(actual, first(CONNECTIONS, &case));
    });
}

fn leaves<I: Std>(case: &Case) -> bool {
    let destination = I::from(case.destination.0);
    decide::is_exempt::<I>(destination, case.pod.link_local_passes, || case.is_excluded_out())
}

fn is_within<I: Std>(case: &Case) -> bool {
    let (source, destination) = (I::from(case.source.0), I::from(case.destination.0));
    // A packet with the pod's own address never comes from outside.
    let from_lo = || case.pod.own.contains(&case.source.0);
    decide::is_within_pod::<I>(source, destination, from_lo, |address| owner(case, I::into(address)))
}

fn gates_are_decided_as_specified(family: Family) {
    let syns = cases(Placement::Pod, family, Way::Out, &[What::Opens], &[Sender::Anybody], &addresses());
    proptest!(few(), |(case in syns)| {
        let leaves = by_family!(family, leaves(&case));
        prop_assert_eq!(leaves, first(LEAVES, &case) == Verdict::Passes);
        let reaches = by_family!(family, is_within(&case)) && !decide::is_for_captured(case.destination.1);
        prop_assert_eq!(reaches, unseen(&case) == Verdict::Passes);
    });
}

#[test]
fn decisions_are_as_specified() {
    for family in Family::ALL {
        calls_are_decided_as_specified(family);
        arrivals_are_decided_as_specified(family);
        gates_are_decided_as_specified(family);
    }
}
