//! The gates on crafted packets, compared with the specification ([`redirect_tests::specification`]).

use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow, bail};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapError};
use libtest_mimic::Trial;
use proptest::test_runner::{Config as Cases, TestCaseError, TestRunner};
use redirect_ebpf::constants::{
    MARK_CAPTURE, MARK_DELIVERY, MARK_INBOUND, MARK_MASK, MARK_PROXY, MARK_RESOLVE, MARK_TUNNEL, PORT_DNS,
    PORT_TUNNEL,
};
use redirect_ebpf::count::Direction;
use redirect_ebpf::family::Family;
use redirect_ebpf::maps::{
    ConfigFlags, ExcludedAddress, ExcludedPort, Pod, PodAddress, PodFlags, ProxyCgroup, ProxyPart, Scope,
    Tuple,
};
use redirect_ebpf::packet::{ACK, RST, SYN};
use redirect_linux::cgroup;
use redirect_protocol::placement::Placement;
use redirect_tests::specification::cases::{Addresses, cases};
use redirect_tests::specification::{self, Case, Excluded, Facts, Sender, Verdict, Way, What};

use crate::bench::{Bench, Code, Proxy, configure};
use crate::lookup::{Outcome, Query};
use crate::packets::{DESTINATION, From, ICMP, ICMPV6, POD_IPV4, POD_IPV6, Packet, UDP, extension, fragment};
use crate::{Shared, trial};

const FIN: u8 = 1;
const PSH: u8 = 8;

/// The number of cases for each gate.
const CASES: u32 = 3000;

pub(crate) fn trials(shared: &Shared) -> Vec<Trial> {
    let gates = [
        ("arrivals", Gate::Arrival, Placement::Pod),
        ("arrivals_on_node", Gate::Arrival, Placement::Node),
        ("departures", Gate::Departure, Placement::Pod),
        ("departures_on_node", Gate::Departure, Placement::Node),
        ("host_end", Gate::HostEnd, Placement::Pod),
        ("unseen", Gate::Unseen, Placement::Pod),
    ];
    let mut trials = Vec::new();
    for (name, gate, placement) in gates {
        for (family, word) in [(Family::Ipv4, "ipv4"), (Family::Ipv6, "ipv6")] {
            trials.push(trial(shared, format!("programs::specification_{word}::{name}"), move |_| {
                holds(gate, placement, family)
            }));
        }
    }
    trials
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Arrival,
    Departure,
    HostEnd,
    Unseen,
}

const ANYTHING: &[What] = &[
    What::Opens,
    What::Opens,
    What::Opens,
    What::Accepts,
    What::Data,
    What::Empty,
    What::Resets,
    What::Fragment,
    What::Datagram,
    What::Other,
    What::Damaged,
];

/// No packet of a test run has the kubelet's socket; the tests of the pure decisions cover its exemption.
fn senders(gate: Gate, placement: Placement) -> &'static [Sender] {
    match (gate, placement) {
        (Gate::Arrival, Placement::Node) => &[Sender::Anybody, Sender::Anybody, Sender::Delivery],
        (Gate::Departure, Placement::Pod) | (Gate::HostEnd, _) => {
            &[Sender::Anybody, Sender::Anybody, Sender::Anybody, Sender::Proxy]
        }
        _ => &[Sender::Anybody],
    }
}

/// The pod's addresses, and another pod's.
fn addresses() -> Addresses {
    let mut other = (POD_IPV4, POD_IPV6);
    other.0[3] += 1;
    other.1[15] += 1;
    Addresses { own: vec![POD_IPV4.into(), POD_IPV6.into()], others: vec![other.0.into(), other.1.into()] }
}

fn holds(gate: Gate, placement: Placement, family: Family) -> Result<()> {
    let whats = if gate == Gate::Unseen { &[What::Opens] } else { ANYTHING };
    let way = if matches!(gate, Gate::Arrival | Gate::Unseen) { Way::In } else { Way::Out };
    let strategy = cases(placement, family, way, whats, senders(gate, placement), &addresses());
    let world = World::new(gate, placement, family)?;
    let mut runner = TestRunner::new(Cases { cases: CASES, failure_persistence: None, ..Cases::default() });
    // Whether a proxy listens, how a packet is damaged, and other irrelevant choices.
    let outcome = runner.run(&(strategy, proptest::num::u64::ANY), |(case, choice)| {
        if case.what == What::Datagram && case.source.1 == PORT_DNS {
            return Err(TestCaseError::reject("an answer of the resolver, which is rewritten"));
        }
        if case.destination.0.is_loopback() && case.pod.own.contains(&case.source.0) {
            return Err(TestCaseError::reject(
                "a test run at the socket lookup has no interface: `local::` shows it",
            ));
        }
        let wanted = world.wanted(&case, choice);
        let actual =
            world.verdict(&case, choice).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        if actual == wanted {
            Ok(())
        } else {
            Err(TestCaseError::fail(format!("{actual:?}, not {wanted:?}")))
        }
    });
    outcome.map_err(|error| anyhow!("{error}"))
}

/// The programs, and their maps, which are filled for one case after another.
struct World {
    gate: Gate,
    family: Family,
    bench: Bench,
    /// The test's own cgroup, which is the sender of test runs' packets.
    cgroup: u64,
}

/// The device of a test run: `lo`.
const DEVICE: u32 = 1;

impl World {
    fn new(gate: Gate, placement: Placement, family: Family) -> Result<Self> {
        let bench = Bench::placed(placement)?;
        let own = cgroup::of_process(std::process::id() as i32)?;
        Ok(Self { gate, family, bench, cgroup: cgroup::id(&own.directory)? })
    }

    /// Whether a proxy listens does not matter to packets that don't go to one, and in placement `node` another
    /// program checks it.
    fn proxy(case: &Case, choice: u64) -> Proxy {
        if case.placement == Placement::Pod && choice.is_multiple_of(4) {
            Proxy::Absent
        } else {
            Proxy::Listens
        }
    }

    fn wanted(&self, case: &Case, choice: u64) -> Verdict {
        let verdict = match self.gate {
            Gate::Arrival => specification::arrival(case),
            Gate::Departure => specification::departure(case),
            Gate::HostEnd => specification::host_end(case),
            Gate::Unseen => specification::unseen(case),
        };
        match verdict {
            Verdict::Captured | Verdict::Tunnelled if Self::proxy(case, choice) == Proxy::Absent => {
                Verdict::Stopped
            }
            other => other,
        }
    }

    fn verdict(&self, case: &Case, choice: u64) -> Result<Verdict> {
        self.bench.change(|programs, cookie| {
            // The exclusions are node-wide or the pod's own. The egress guard finds the pod by the packet's source.
            let unknown = self.gate == Gate::Departure && !case.pod.own.contains(&case.source.0);
            let of_node = unknown || (choice / 2).is_multiple_of(2);
            fill(programs, case, choice, if of_node { 0 } else { cookie }, cookie)?;
            let mut proxies = HashMap::<_, u64, ProxyCgroup>::try_from(map(programs, "PROXY_CGROUPS")?)?;
            if matches!(case.sender, Sender::Proxy | Sender::Delivery) {
                Ok(proxies.insert(self.cgroup, ProxyCgroup { part: ProxyPart::ALL }, 0)?)
            } else {
                absent(proxies.remove(&self.cgroup))
            }
        })?;
        if self.gate == Gate::Unseen {
            return self.at_the_listener(case);
        }
        let word = if self.family == Family::Ipv4 { "ipv4" } else { "ipv6" };
        let program = match (self.gate, case.placement) {
            (Gate::Arrival, Placement::Pod) => format!("inbound_{word}"),
            (Gate::Arrival, Placement::Node) => format!("to_pod_{word}"),
            (Gate::Departure, Placement::Pod) => format!("egress_{word}"),
            (Gate::Departure, Placement::Node) => format!("from_pod_{word}"),
            _ => "host_gate".to_owned(),
        };
        let (proxy, frame) = (Self::proxy(case, choice), frame(self.family, case, choice));
        match self.bench.judge(&program, proxy, &frame, mark(case.sender, choice))? {
            Code::Dropped | Code::Answered => Ok(Verdict::Stopped),
            Code::Redirected(mark) => match mark & MARK_MASK {
                MARK_CAPTURE | MARK_INBOUND => Ok(Verdict::Captured),
                MARK_TUNNEL => Ok(Verdict::Tunnelled),
                MARK_RESOLVE => Ok(Verdict::Resolved),
                _ => bail!("redirected with mark {mark:#x}"),
            },
            Code::Continues if (self.gate, case.placement) != (Gate::Arrival, Placement::Pod) => {
                Ok(Verdict::Passes)
            }
            Code::Continues => match case.what {
                What::Opens => self.at_the_listener(case),
                What::Other | What::Datagram => Ok(Verdict::Passes),
                // There is no connection, and no listener accepts a segment that opens none.
                _ => Ok(Verdict::Stopped),
            },
        }
    }

    /// The outcome of a connection at the socket lookup.
    fn at_the_listener(&self, case: &Case) -> Result<Verdict> {
        Ok(match self.bench.ask(&query(case))? {
            Outcome::Passed => Verdict::Passes,
            Outcome::Refused => Verdict::Stopped,
            Outcome::Chosen if case.destination.1 == PORT_TUNNEL => Verdict::Tunnelled,
            Outcome::Chosen => Verdict::Captured,
        })
    }
}

fn query(case: &Case) -> Query {
    let wide = |address: IpAddr| match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    };
    let tuple = Tuple {
        source: wide(case.source.0),
        destination: wide(case.destination.0),
        source_port: case.source.1.to_be_bytes(),
        destination_port: case.destination.1.to_be_bytes(),
    };
    Query { tuple, protocol: libc::IPPROTO_TCP as u32 }
}

/// Marks set by other processes make no difference; the proxy's deliveries have their own.
fn mark(sender: Sender, choice: u64) -> u32 {
    match sender {
        Sender::Delivery => MARK_DELIVERY,
        Sender::Proxy => MARK_PROXY,
        Sender::Anybody | Sender::Kubelet => {
            [0, MARK_PROXY, MARK_DELIVERY, MARK_CAPTURE, MARK_INBOUND, choice as u32][choice as usize / 4 % 6]
        }
    }
}

/// The packet's bytes.
fn frame(family: Family, case: &Case, choice: u64) -> Vec<u8> {
    let choose = |number: u64| choice / 64 % number;
    let mut packet = Packet {
        ends: Some((case.source.0, case.destination.0)),
        source_port: case.source.1,
        port: case.destination.1,
        tags: if case.tagged { vec![0x8100; 1 + choose(2) as usize] } else { Vec::new() },
        ..Packet::syn(family, From::Peer)
    };
    match case.what {
        What::Opens => packet.flags = [SYN, SYN | 0xc0, SYN | FIN][choose(3) as usize],
        What::Accepts => packet.flags = SYN | ACK,
        What::Data => {
            packet.flags = [ACK, ACK | PSH, 0, ACK | FIN][choose(4) as usize];
            packet.data = vec![1; 1 + choose(9) as usize];
        }
        What::Empty => packet.flags = [ACK, ACK | FIN, FIN, 0][choose(4) as usize],
        What::Resets => packet.flags = [RST, RST | ACK, RST | SYN][choose(3) as usize],
        What::Fragment if family == Family::Ipv4 => packet.fragment = 0x2000,
        What::Fragment => packet.extensions = vec![fragment(0, true)],
        What::Datagram => packet.protocol = UDP,
        What::Other => match choose(4) {
            0 if family == Family::Ipv4 => packet.fragment = 1,
            0 => packet.extensions = vec![fragment(8, true)],
            1 => (packet.protocol, packet.payload) = (ICMP, Some(vec![8, 0, 0, 0, 0, 0, 0, 0])),
            2 => (packet.protocol, packet.payload) = (ICMPV6, Some(vec![135, 0, 0, 0, 0, 0, 0, 0])),
            _ => packet.protocol = 132,
        },
        What::Damaged => match choose(3) {
            0 => packet.tags = vec![0x88a8; 3 + choose(5) as usize],
            1 if family == Family::Ipv6 => packet.extensions = vec![extension(DESTINATION, 0); 9],
            _ => packet.payload = Some(vec![0; 3]),
        },
    }
    packet.bytes()
}

/// `scope` is the cookie of the pod with the exclusions, or zero.
fn fill(programs: &mut Ebpf, case: &Case, choice: u64, scope: u64, cookie: u64) -> Result<()> {
    let Facts { own, others, excluded_outbound, excluded_inbound, .. } = &case.pod;
    let of_node = scope == 0;
    let flags = PodFlags::default()
        .with(PodFlags::BYPASS_INBOUND, case.pod.bypass_inbound)
        .with(PodFlags::DNS, case.pod.dns)
        .with(PodFlags::ANY_SOURCE, case.pod.any_source)
        .with(PodFlags::EARLIER_CONNECTIONS, case.pod.earlier_connections)
        .with(PodFlags::EXCLUSIONS, !of_node);
    let mut pods = HashMap::<_, u64, Pod>::try_from(map(programs, "PODS")?)?;
    pods.insert(cookie, Pod { flags: flags.0, ..Pod::default() }, 0)?;
    let mut devices = HashMap::<_, u32, PodAddress>::try_from(map(programs, "INTERFACES")?)?;
    devices.insert(DEVICE, PodAddress { netns_cookie: cookie }, 0)?;
    for (owner, addresses) in [(cookie, own), (cookie + 1, others)] {
        for address in addresses {
            let owner = PodAddress { netns_cookie: owner };
            match address {
                IpAddr::V4(address) => {
                    let mut map = HashMap::<_, [u8; 4], PodAddress>::try_from(map(programs, "POD_IPV4")?)?;
                    map.insert(address.octets(), owner, 0)?;
                }
                IpAddr::V6(address) => {
                    let mut map = HashMap::<_, [u8; 16], PodAddress>::try_from(map(programs, "POD_IPV6")?)?;
                    map.insert(address.octets(), owner, 0)?;
                }
            }
        }
    }
    let config = ConfigFlags::default()
        .with(ConfigFlags::PROXY_BY_CGROUP, true)
        .with(ConfigFlags::EXCLUSIONS, of_node)
        .with(ConfigFlags::REFUSE, case.placement == Placement::Pod && (choice / 8).is_multiple_of(2))
        .with(ConfigFlags::LINK_LOCAL, case.pod.link_local_passes);
    configure(programs, config)?;
    clear(programs)?;
    for (direction, excluded) in
        [(Direction::Outbound, excluded_outbound), (Direction::Inbound, excluded_inbound)]
    {
        exclude(programs, Scope::new(scope, direction), excluded)?;
    }
    Ok(())
}

fn exclude(programs: &mut Ebpf, scope: Scope, excluded: &Excluded) -> Result<()> {
    for port in &excluded.ports {
        let mut ports = HashMap::<_, ExcludedPort, u8>::try_from(map(programs, "EXCLUDED_PORTS")?)?;
        ports.insert(ExcludedPort { scope, port: port.to_be_bytes() }, 1, 0)?;
    }
    for (network, length) in &excluded.networks {
        let bits = Scope::BITS + u32::from(*length);
        match network {
            IpAddr::V4(address) => {
                let mut trie = LpmTrie::<_, Network<4>, u8>::try_from(map(programs, "EXCLUDED_IPV4")?)?;
                trie.insert(&Key::new(bits, ExcludedAddress { scope, address: address.octets() }), 1, 0)?;
            }
            IpAddr::V6(address) => {
                let mut trie = LpmTrie::<_, Network<16>, u8>::try_from(map(programs, "EXCLUDED_IPV6")?)?;
                trie.insert(&Key::new(bits, ExcludedAddress { scope, address: address.octets() }), 1, 0)?;
            }
        }
    }
    Ok(())
}

type Network<const N: usize> = ExcludedAddress<[u8; N]>;

/// Removes the exclusions of the previous case.
fn clear(programs: &mut Ebpf) -> Result<()> {
    let mut ports = HashMap::<_, ExcludedPort, u8>::try_from(map(programs, "EXCLUDED_PORTS")?)?;
    let keys = ports.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().try_for_each(|key| ports.remove(key))?;
    let mut trie = LpmTrie::<_, Network<4>, u8>::try_from(map(programs, "EXCLUDED_IPV4")?)?;
    let keys = trie.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().try_for_each(|key| trie.remove(key))?;
    let mut trie = LpmTrie::<_, Network<16>, u8>::try_from(map(programs, "EXCLUDED_IPV6")?)?;
    let keys = trie.keys().collect::<Result<Vec<_>, _>>()?;
    keys.iter().try_for_each(|key| trie.remove(key))?;
    Ok(())
}

fn map<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Map> {
    programs.map_mut(name).with_context(|| format!("map {name}"))
}

fn absent(removed: Result<(), MapError>) -> Result<()> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
