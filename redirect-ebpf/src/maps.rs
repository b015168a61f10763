//! Layouts of the map entries.
//!
//! | map | type | key | value |
//! |---|---|---|---|
//! | `PODS` | hash | network namespace cookie, `u64` in host order as the kernel hands it out | [`Pod`] |
//! | `POD_IPV4`, `POD_IPV6` | hash | address, network order | [`PodAddress`] |
//! | `INTERFACES` | hash | index of the host end of an enrolled pod's device, `u32` in host order | [`PodAddress`] |
//! | `PROXY_CGROUPS` | hash | cgroup v2 id of a node proxy, `u64` in host order | [`ProxyCgroup`] |
//! | `CONFIG` | array of one | – | [`Config`] |
//! | `EXCLUDED_IPV4`, `EXCLUDED_IPV6` | LPM trie | [`ExcludedAddress`] | `u8`, no meaning |
//! | `EXCLUDED_PORTS` | hash | [`ExcludedPort`] | `u8`, no meaning |
//! | `PROBE_SOCKETS` | socket storage | – | `u64`, 1: the kubelet's socket, connected to an enrolled pod |
//! | `ASKED` | socket storage | – | [`Asked`] |
//! | `NOTES` | LRU hash | [`Tuple`] | [`Note`], of a connection that TC programs decided on |
//! | `ASKING` | per-CPU array of one | – | `u64`, not zero while a TC program looks a socket up itself; for counting only |
//! | `LISTENERS` | socket hash | [`ListenerKey`] | a listener of a node proxy, stored by the kernel side itself |
//! | `OWNERS` | socket storage of listeners | – | `u64`, [`ListenerKey::owner`] |
//! | `COOKIES` | socket storage | – | `u64`, the socket's cookie; while a monitor is attached |
//! | `CONNECTED` | socket storage | – | `u64`, 1: the socket called `connect()` after its pod was captured; while the pod has [`PodFlags::HALF_OPEN`] |
//! | `SYN_COOKIES` | array of one | – | `u64`, when a proxy last answered with a SYN cookie, in nanoseconds of `bpf_ktime_get_coarse_ns`; zero for never |
//! | `COUNTERS` | per-CPU array | [`crate::count::index`] | `u64`, connections |
//! | `POD_COUNTERS` | hash | as in `PODS` | [`PodCounters`] |

use core::mem::{align_of, size_of};

use crate::count::{Direction, OF_POD};

/// Version of the meaning of keys and values. Increment it when the meaning changes and the sizes don't, so that a build
/// never reuses maps with another meaning.
pub const LAYOUT: u32 = 1;

/// An enrolled pod, found by the cookie of its network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Pod {
    /// [`PodFlags`] as bits.
    pub flags: u32,
    /// Its first IPv4 address, network order; unspecified without one.
    pub ipv4: [u8; 4],
    /// Its first IPv6 address, network order; unspecified without one.
    pub ipv6: [u8; 16],
}

/// The owner of an address, or of a device, of an enrolled pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PodAddress {
    /// Cookie of the pod's network namespace, host order.
    pub netns_cookie: u64,
}

/// Counters of a pod's connections since its enrollment. All CPUs share them and add with atomic instructions: per-CPU
/// counters would multiply the memory per pod by the number of CPUs to save a few nanoseconds per connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PodCounters {
    /// By [`crate::count::of_pod`].
    pub connections: [u64; OF_POD],
}

/// A cgroup whose processes are a node proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct ProxyCgroup {
    /// Which part of the proxy runs there.
    pub part: ProxyPart,
}

/// A part of a node proxy that sets no marks, if its parts run in cgroups of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ProxyPart(pub u32);

impl ProxyPart {
    /// The whole proxy.
    pub const ALL: Self = Self(1);
    /// The part for captured outbound connections. Placement `node`.
    pub const OUTBOUND: Self = Self(2);
    /// The part that delivers to applications. Placement `node`.
    pub const INBOUND: Self = Self(3);
    /// A proxy that listens in the pods. Its connections to other pods are captured there like any other.
    pub const IN_PODS: Self = Self(4);
}

/// Settings of the kernel side for the whole node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// Cookie of the host's network namespace, host order.
    pub host_cookie: u64,
    /// [`ConfigFlags`] as bits; 64 bits wide, so that there is no padding.
    pub flags: u64,
    /// Placement `node`: index of the device through which packets reach the proxy, host order; else zero.
    pub ingress_device: u64,
}

/// The addresses and ports of a connection, as in its SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Tuple {
    /// Source address; IPv4 in its v4-mapped form.
    pub source: [u8; 16],
    /// Destination address; IPv4 in its v4-mapped form.
    pub destination: [u8; 16],
    /// Source port, network order.
    pub source_port: [u8; 2],
    /// Destination port, network order.
    pub destination_port: [u8; 2],
}

/// A TC program's decision on a connection, for the socket lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Note {
    /// When it expires, in nanoseconds of `bpf_ktime_get_coarse_ns`.
    pub expires: u64,
    /// The listener, if the connection was captured.
    pub listener: ListenerKey,
    /// Cookie of the pod's socket, for events; zero if it is not known.
    pub socket_cookie: u64,
    /// The decision.
    pub verdict: NoteVerdict,
    /// [`Direction`] as a number.
    pub direction: u8,
    /// [`crate::Reason`] as a number.
    pub reason: u8,
    /// Not zero if the connection has been counted.
    pub counted: u8,
    /// Zero.
    pub padding: [u8; 4],
}

/// The decision in a [`Note`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct NoteVerdict(pub u8);

impl NoteVerdict {
    /// No note, or an expired one.
    pub const NONE: Self = Self(0);
    /// The proxy's listener gets it.
    pub const CAPTURED: Self = Self(1);
    /// Refused, because the proxy does not listen.
    pub const REFUSED: Self = Self(2);
    /// It may reach the pod's own listeners: it is exempt, or the proxy's delivery.
    pub const AUTHORIZED: Self = Self(3);
    /// A segment that neither belongs to a connection nor opens one.
    pub const STRAY: Self = Self(4);
}

/// A node proxy's listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ListenerKey {
    /// Cookie of its network namespace, host order, or [`ListenerKey::number`].
    pub owner: u64,
    /// Its port, host order.
    pub port: u16,
    /// One of [`ListenerKey::SLOTS`]: listeners may share a port.
    pub slot: u16,
    /// The connection's family, as [`crate::packet::address_family`] has it: a proxy may have a listener for each.
    pub family: u32,
}

impl ListenerKey {
    /// Slots for listeners that share a port.
    pub const SLOTS: core::ops::Range<u16> = 0..4;

    /// Replaces the cookie by a number that no other listener gets: the time in nanoseconds and the CPU at its first use. Cookies
    /// count from 1 and do not reach the highest bit.
    #[must_use]
    #[inline(always)]
    pub const fn number(time: u64, processor: u32) -> u64 {
        1 << 63 | time << 12 | processor as u64
    }
}

const _: () = {
    assert!(size_of::<Tuple>() == 36 && align_of::<Tuple>() == 1);
    assert!(size_of::<Note>() == 40 && size_of::<ListenerKey>() == 16);
    assert!(size_of::<Pod>() == 24 && align_of::<Pod>() == 4);
    assert!(size_of::<PodCounters>() == 96 && align_of::<PodCounters>() == 8);
    assert!(size_of::<PodAddress>() == 8 && align_of::<PodAddress>() == 8);
    assert!(size_of::<ProxyCgroup>() == 4 && align_of::<ProxyCgroup>() == 4);
    assert!(size_of::<Config>() == 24 && align_of::<Config>() == 8);
};

/// The key of `EXCLUDED_PORTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ExcludedPort {
    /// Which connections are meant.
    pub scope: Scope,
    /// Destination port, network order.
    pub port: [u8; 2],
}

/// The key of `EXCLUDED_IPV4` and `EXCLUDED_IPV6`, without the prefix length, which counts [`Scope::BITS`] more than that
/// of the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ExcludedAddress<A> {
    /// Which connections are meant.
    pub scope: Scope,
    /// The peer's address: the destination of outbound connections, the source of inbound ones.
    pub address: A,
}

/// The connections that an exclusion covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Scope {
    /// Cookie of the pod's network namespace, big endian; zero: every pod of the node.
    pub netns_cookie: [u8; 8],
    /// [`Direction`] as a number.
    pub direction: u8,
}

impl Scope {
    /// The size of the scope in a trie's key, in bits.
    pub const BITS: u32 = 72;

    /// Connections of one direction, of a pod or (cookie zero) of every pod.
    #[must_use]
    #[inline(always)]
    pub const fn new(netns_cookie: u64, direction: Direction) -> Self {
        Self { netns_cookie: netns_cookie.to_be_bytes(), direction: direction as u8 }
    }
}

/// The DNS servers that a socket has queried, in its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Asked {
    /// Time of the last query that named its server, in nanoseconds of `bpf_ktime_get_ns`.
    pub time: u64,
    /// The server that the socket is connected to, if any.
    pub peer: Server,
    /// A ring of the servers of the latest queries that named theirs.
    pub servers: [Server; Asked::RING],
    /// Number of such queries sent.
    pub sent: u32,
    /// Number of them answered.
    pub answered: u32,
    /// 1 if the socket is connected to a server, else 0.
    pub connected: u32,
}

impl Asked {
    /// Number of servers kept: resolvers query three at most.
    pub const RING: usize = 4;

    /// Nothing asked.
    pub const NOTHING: Self = Self {
        time: 0,
        peer: Server::NONE,
        servers: [Server::NONE; Self::RING],
        sent: 0,
        answered: 0,
        connected: 0,
    };

    /// After a pause of this length, in nanoseconds, unanswered queries count as lost: less than any resolver waits before
    /// it retries, more than an answer usually takes.
    pub const PAUSE: u64 = 700_000_000;

    /// Connects the socket to a server.
    #[inline(always)]
    pub fn connect(&mut self, server: Server) {
        self.peer = server;
        self.connected = 1;
        // A connected socket drops earlier datagrams of others.
        self.answered = self.sent;
    }

    /// Records the server of a query that names it.
    #[inline(always)]
    pub fn ask(&mut self, server: Server, now: u64) {
        if now.wrapping_sub(self.time) > Self::PAUSE {
            self.answered = self.sent;
        }
        self.time = now;
        if let Some(place) = self.servers.get_mut(self.sent as usize % Self::RING) {
            *place = server;
        }
        self.sent = self.sent.wrapping_add(1);
    }

    /// The server of an answer: that of the oldest open query. The kernel side sees nothing in an answer that identifies
    /// its query.
    #[inline(always)]
    pub fn answer(&mut self) -> Option<Server> {
        let open = self.sent.wrapping_sub(self.answered);
        // Two concurrent readers may have counted one answer too many.
        if open == 0 || open > u32::MAX / 2 {
            return self
                .peer()
                .or_else(|| self.servers.get(self.sent.wrapping_sub(1) as usize % Self::RING).copied());
        }
        if open as usize > Self::RING {
            // The oldest were overwritten.
            self.answered = self.sent.wrapping_sub(Self::RING as u32);
        }
        let place = self.answered as usize % Self::RING;
        self.answered = self.answered.wrapping_add(1);
        self.servers.get(place).copied()
    }

    /// The server that the socket is connected to, if any.
    #[inline(always)]
    pub fn peer(&self) -> Option<Server> {
        if self.connected == 1 { Some(self.peer) } else { None }
    }
}

/// A DNS server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Server {
    /// Its address; IPv4 in its v4-mapped form.
    pub address: [u8; 16],
    /// Its port, as the kernel's socket address has it: network order in the first two bytes.
    pub port: u32,
}

impl Server {
    const NONE: Self = Self { address: [0; 16], port: 0 };
}

const _: () = {
    assert!(size_of::<ExcludedPort>() == 11 && size_of::<ExcludedAddress<[u8; 4]>>() == 13);
    assert!(size_of::<ExcludedAddress<[u8; 16]>>() == 25 && Scope::BITS == 8 * size_of::<Scope>() as u32);
    assert!(size_of::<Asked>() == 120 && size_of::<Server>() == 20);
};

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $flag:ident = $bit:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name(pub u32);

        impl $name {
            $($(#[$doc])* pub const $flag: Self = Self(1 << $bit);)+

            /// Whether every flag of `other` is set.
            #[must_use]
            #[inline(always)]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// A copy with `other` set to `on`.
            #[must_use]
            pub const fn with(self, other: Self, on: bool) -> Self {
                Self(if on { self.0 | other.0 } else { self.0 & !other.0 })
            }
        }
    };
}

flags! {
    /// Flags of one pod.
    PodFlags {
        /// Inbound connections reach the application without the proxy (`ambient.istio.io/bypass-inbound-capture`).
        BYPASS_INBOUND = 0,
        /// The pod's DNS queries go to the proxy's resolver.
        DNS = 1,
        /// The pod has exclusions of its own.
        EXCLUSIONS = 2,
        /// The pod may send from addresses that are neither its own nor another enrolled pod's. Placement `node`.
        ANY_SOURCE = 3,
        /// Connections from before the enrollment may exist; they are left alone.
        EARLIER_CONNECTIONS = 4,
        /// The pod already ran when it was captured, at most a few minutes ago: connections that were half open then may
        /// complete as they began.
        HALF_OPEN = 5,
        /// The programs on the host ends of its devices capture new connections. Those in the pod serve the connections that they
        /// captured before the placement changed.
        ON_HOST = 6,
        /// The reverse: the programs in the pod capture new connections.
        IN_POD = 7,
    }
}

impl PodFlags {
    /// No program captures new connections of the pod, in either direction: each placement takes the other for the one that
    /// captures. The pod leaves the mesh, and the proxy's connections continue.
    pub const RELEASED: Self = Self(Self::ON_HOST.0 | Self::IN_POD.0);

    /// The flags of a pod that leaves the mesh. If it returns, the connections that it opened in between continue.
    #[must_use]
    pub const fn released(self) -> Self {
        self.with(Self::RELEASED, true).with(Self::EARLIER_CONNECTIONS, true).with(Self::HALF_OPEN, false)
    }
}

flags! {
    /// Flags of the node.
    ConfigFlags {
        /// Always on, for programs of earlier builds until they are replaced: without it they accept the proxy's mark as
        /// proof.
        PROXY_BY_CGROUP = 0,
        /// Connections without a listening proxy are refused at once; otherwise their SYNs are dropped.
        REFUSE = 1,
        /// Node-wide exclusions exist.
        EXCLUSIONS = 2,
        /// Placement `node`: sockets of processes in one of `PROXY_CGROUPS` are the proxy's even without its mark.
        UNMARKED_PROXY = 3,
        /// A monitor is attached.
        FLOWS = 4,
        /// The proxy's mark alone makes a socket the proxy's (`--proxy-identity mark`).
        PROXY_BY_MARK = 5,
        /// Connections to IPv6 link-local addresses go past the proxy.
        LINK_LOCAL = 6,
    }
}

#[cfg(feature = "user")]
mod user {
    use super::{Config, ExcludedAddress, ExcludedPort, Pod, PodAddress, PodCounters, ProxyCgroup};

    // SAFETY: `repr(C)`, integers only, no padding (sizes asserted above), every bit pattern is valid.
    unsafe impl aya::Pod for Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodAddress {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodCounters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProxyCgroup {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Config {}
    // SAFETY: as above, bytes only.
    unsafe impl aya::Pod for ExcludedPort {}
    // SAFETY: as above, bytes only.
    unsafe impl aya::Pod for ExcludedAddress<[u8; 4]> {}
    // SAFETY: as above, bytes only.
    unsafe impl aya::Pod for ExcludedAddress<[u8; 16]> {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn server(number: u8) -> Server {
        Server { address: [number; 16], port: 53 }
    }

    fn answers(asked: &mut Asked, count: usize) -> Vec<Option<u8>> {
        (0..count).map(|_| asked.answer().map(|server| server.address[0])).collect()
    }

    #[test]
    fn answers_come_from_the_servers_in_the_order_of_the_questions() {
        let mut asked = Asked::NOTHING;
        for number in 1..=3 {
            asked.ask(server(number), SECOND);
        }
        assert_eq!(answers(&mut asked, 4), [Some(1), Some(2), Some(3), Some(3)]);
    }

    #[test]
    fn more_questions_than_are_remembered_still_have_servers_that_were_asked() {
        let mut asked = Asked::NOTHING;
        for number in 1..=6 {
            asked.ask(server(number), SECOND);
        }
        assert_eq!(answers(&mut asked, 5), [Some(3), Some(4), Some(5), Some(6), Some(6)]);
    }

    #[test]
    fn a_lost_answer_shifts_no_others_after_a_pause() {
        let mut asked = Asked::NOTHING;
        asked.ask(server(1), SECOND);
        asked.ask(server(2), 2 * SECOND);
        assert_eq!(answers(&mut asked, 1), [Some(2)]);
        // Without a pause it is unknown which one was lost.
        asked.ask(server(1), 2 * SECOND + 2);
        asked.ask(server(2), 2 * SECOND + 3);
        assert_eq!(answers(&mut asked, 1), [Some(1)]);
    }

    #[test]
    fn a_connected_socket_keeps_its_server_whatever_else_it_asks() {
        let mut asked = Asked::NOTHING;
        assert_eq!(asked.peer(), None);
        asked.ask(server(9), SECOND);
        asked.connect(server(1));
        assert_eq!(answers(&mut asked, 2), [Some(1), Some(1)]);
        asked.ask(server(2), 2 * SECOND);
        assert_eq!(asked.peer(), Some(server(1)));
        assert_eq!(answers(&mut asked, 2), [Some(2), Some(1)]);
    }

    #[test]
    fn counters_that_wrap_or_that_two_threads_count_too_far_do_no_harm() {
        let mut asked = Asked { sent: u32::MAX, answered: u32::MAX, ..Asked::NOTHING };
        for number in 1..=2 {
            asked.ask(server(number), SECOND);
        }
        assert_eq!(answers(&mut asked, 2), [Some(1), Some(2)]);
        asked.answered = asked.sent.wrapping_add(1);
        assert_eq!(answers(&mut asked, 2), [Some(2), Some(2)]);
    }
}
