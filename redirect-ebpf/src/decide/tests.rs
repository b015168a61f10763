use super::*;
use crate::family::{Ipv4, Ipv6};

const V4: [u8; 4] = [192, 0, 2, 1];
const V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

fn tcp<A>(destination: A, source: A) -> Connect<A> {
    Connect {
        protocol: Protocol::Tcp,
        destination,
        source,
        port: 80,
        proxy: false,
        flags: PodFlags::DNS,
        link_local: false,
    }
}

fn yes() -> bool {
    true
}

fn no() -> bool {
    false
}

fn never() -> bool {
    unreachable!("this is not to be asked")
}

fn not_own<A>(_: A) -> bool {
    false
}

fn own<A>(_: A) -> bool {
    true
}

fn never_own<A>(_: A) -> bool {
    never()
}

fn outbound_decisions<I: Ip>(remote: I::Address, loopback: I::Address, none: I::Address) {
    let to_remote = tcp(remote, none);
    let to_loopback = tcp(loopback, none);
    assert_eq!(outbound::<I>(&to_remote, not_own, no), Outbound::Capture);
    assert_eq!(outbound::<I>(&to_remote, own, never), Outbound::Pass(Reason::OwnAddress));
    assert_eq!(outbound::<I>(&to_remote, not_own, yes), Outbound::Pass(Reason::Excluded));
    assert_eq!(outbound::<I>(&to_loopback, never_own, never), Outbound::Pass(Reason::Loopback));

    let proxys = Connect { proxy: true, ..to_remote };
    assert_eq!(outbound::<I>(&proxys, not_own, never), Outbound::Pass(Reason::Proxy));
    assert_eq!(outbound::<I>(&proxys, own, never), Outbound::Deliver);
    let borrowed = Connect { source: remote, ..proxys };
    assert_eq!(
        outbound::<I>(&borrowed, not_own, never),
        Outbound::Deliver,
        "to an address that nobody told us"
    );
    let bound_to_loopback = Connect { source: loopback, ..proxys };
    assert_eq!(outbound::<I>(&bound_to_loopback, not_own, never), Outbound::Pass(Reason::Proxy));
    let proxys_to_loopback = Connect { proxy: true, ..to_loopback };
    assert_eq!(outbound::<I>(&proxys_to_loopback, never_own, never), Outbound::Pass(Reason::Proxy));

    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let question = Connect { protocol, port: 53, ..to_remote };
        assert_eq!(outbound::<I>(&question, not_own, no), Outbound::Resolve);
        assert_eq!(outbound::<I>(&question, own, never), Outbound::Pass(Reason::OwnAddress));
        assert_eq!(outbound::<I>(&question, not_own, yes), Outbound::Pass(Reason::Excluded));
        assert_eq!(
            outbound::<I>(&Connect { proxy: true, ..question }, not_own, never),
            Outbound::Pass(Reason::Proxy)
        );
        let to_loopback = Connect { protocol, port: 53, ..to_loopback };
        assert_eq!(outbound::<I>(&to_loopback, never_own, never), Outbound::Pass(Reason::Loopback));
    }
    let without_dns = Connect { port: 53, flags: PodFlags::default(), ..to_remote };
    assert_eq!(outbound::<I>(&without_dns, not_own, no), Outbound::Capture);
    let udp_without_dns = Connect { protocol: Protocol::Udp, ..without_dns };
    assert_eq!(outbound::<I>(&udp_without_dns, never_own, never), Outbound::Pass(Reason::OtherTraffic));
    let other_udp = Connect { protocol: Protocol::Udp, ..to_remote };
    assert_eq!(outbound::<I>(&other_udp, never_own, never), Outbound::Pass(Reason::OtherTraffic));
}

#[test]
fn outbound_decisions_are_the_same_in_both_families() {
    outbound_decisions::<Ipv4>(V4, [127, 0, 0, 1], [0; 4]);
    outbound_decisions::<Ipv6>(V6, 1u128.to_be_bytes(), [0; 16]);
}

#[test]
fn link_local_destinations_are_refused_unless_they_are_to_pass() {
    let to_link_local = tcp(link_local_address(), [0; 16]);
    assert_eq!(outbound::<Ipv6>(&to_link_local, not_own, no), Outbound::Refuse(Reason::LinkScoped));
    assert_eq!(outbound::<Ipv6>(&to_link_local, not_own, yes), Outbound::Pass(Reason::Excluded));
    assert_eq!(outbound::<Ipv6>(&to_link_local, own, never), Outbound::Pass(Reason::OwnAddress));
    let passing = Connect { link_local: true, ..to_link_local };
    assert_eq!(outbound::<Ipv6>(&passing, not_own, no), Outbound::Pass(Reason::LinkScoped));
    for link_local in [true, false] {
        assert_eq!(is_exempt::<Ipv6>(link_local_address(), link_local, no), link_local);
        assert!(is_exempt::<Ipv6>(link_local_address(), link_local, yes));
        assert!(is_exempt::<Ipv4>([224, 0, 0, 1], link_local, never));
        assert!(!is_exempt::<Ipv4>([240, 0, 0, 1], link_local, no));
    }
    assert_eq!(outbound::<Ipv4>(&tcp([240, 0, 0, 1], [0; 4]), not_own, no), Outbound::Capture);
    assert_eq!(outbound::<Ipv6>(&Connect { port: 53, ..to_link_local }, not_own, no), Outbound::Resolve);
    assert_eq!(outbound::<Ipv4>(&tcp([169, 254, 169, 254], [0; 4]), not_own, no), Outbound::Capture);
}

fn link_local_address() -> [u8; 16] {
    "fe80::1".parse::<std::net::Ipv6Addr>().unwrap().octets()
}

#[test]
fn connections_within_a_pod_have_its_addresses_at_both_ends() {
    fn check<I: Ip>(this: [I::Address; 2], other: I::Address, unknown: I::Address, loopback: I::Address) {
        let owner = |address| {
            if this.contains(&address) { Some(1) } else { (address == other).then_some(2) }
        };
        let within = |source, destination| is_within_pod::<I>(source, destination, yes, owner);
        for destination in this {
            assert!(this.iter().all(|source| within(*source, destination)));
            assert!(within(loopback, destination));
            assert!(within(destination, loopback));
            assert!(!within(other, destination) && !within(unknown, destination));
            assert!(!within(destination, other) && !within(destination, unknown));
        }
        assert!(within(unknown, unknown) && within(loopback, loopback));
        assert!(!within(unknown, loopback));
        assert!(!is_within_pod::<I>(this[0], loopback, no, owner), "by an interface that leads outside");
    }
    check::<Ipv4>([[10, 0, 0, 1], [10, 0, 0, 2]], [10, 0, 0, 3], V4, [127, 0, 0, 1]);
    let v6 = |last| {
        let mut address = V6;
        address[15] = last;
        address
    };
    check::<Ipv6>([v6(2), v6(3)], v6(4), v6(5), 1u128.to_be_bytes());
}

#[test]
fn stub_resolvers_on_loopback_are_left_alone() {
    let stub = Connect { port: 53, ..tcp([127, 0, 0, 53], [0; 4]) };
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let decision = outbound::<Ipv4>(&Connect { protocol, ..stub }, never_own, never);
        assert_eq!(decision, Outbound::Pass(Reason::Loopback));
    }
    // As with Istio's rules, 127.0.0.1 is the only address of 127.0.0.0/8 that is left alone otherwise.
    assert_eq!(outbound::<Ipv4>(&Connect { port: 80, ..stub }, not_own, no), Outbound::Capture);
}

#[test]
fn marks_of_others_stay_and_stale_marks_go() {
    assert_eq!(mark(Outbound::Capture, 0xabcd_0000), 0xabcd_0000 | MARK_CAPTURE);
    assert_eq!(mark(Outbound::Capture, MARK_PROXY), MARK_CAPTURE, "a forged mark does not survive");
    assert_eq!(mark(Outbound::Deliver, MARK_PROXY), MARK_DELIVERY);
    assert_eq!(mark(Outbound::Pass(Reason::Proxy), MARK_DELIVERY), MARK_PROXY);
    assert_eq!(mark(Outbound::Pass(Reason::Loopback), 0x7000 | MARK_CAPTURE), 0x7000);
    assert_eq!(mark(Outbound::Pass(Reason::OwnAddress), MARK_DELIVERY), 0);
    assert_eq!(mark(Outbound::Resolve, MARK_CAPTURE), 0);
    assert_eq!(mark(Outbound::Pass(Reason::Loopback), 0x42), 0x42);
}

#[test]
fn inbound_decisions() {
    let plain = Some(PodFlags::default());
    assert_eq!(inbound(80, plain, no, no, never), Inbound::Capture);
    assert_eq!(inbound(80, None, never, never, no), Inbound::Capture);
    assert_eq!(inbound(80, None, never, never, yes), Inbound::Drop(Reason::Forwarded));
    assert_eq!(inbound(80, plain, yes, never, never), Inbound::Pass(Reason::Probe));
    assert_eq!(inbound(80, plain, no, yes, never), Inbound::Pass(Reason::Excluded));
    assert_eq!(inbound(15008, plain, never, never, never), Inbound::Tunnel);
    let bypass = Some(PodFlags::BYPASS_INBOUND);
    assert_eq!(inbound(80, bypass, never, never, never), Inbound::Pass(Reason::BypassInbound));
}

#[test]
fn the_proxys_ports_are_guarded() {
    for port in crate::constants::PROXY_PORTS {
        assert!(is_guarded(Protocol::Tcp, port));
    }
    assert!(is_guarded(Protocol::Udp, 15053));
    assert!(!is_guarded(Protocol::Udp, 15001));
    assert!(!is_guarded(Protocol::Tcp, 80));
}
