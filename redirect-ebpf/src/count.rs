//! Counters of connections, by family, direction, verdict and reason.

use crate::family::Family;

macro_rules! counted {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// Every value, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The label that metrics and tables show.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
    };
}
pub(crate) use counted;

counted! {
    /// The direction of a connection, seen from the pod.
    Direction {
        /// From the pod's application.
        Outbound = "outbound",
        /// To the pod.
        Inbound = "inbound",
        /// From the proxy to the pod's application.
        Delivery = "delivery",
        /// A call of `bind()`.
        Bind = "bind",
    }
}

counted! {
    /// What the kernel side did with a connection.
    Verdict {
        /// Given to the node proxy.
        Captured = "captured",
        /// Left alone.
        Passed = "passed",
        /// Refused or held: its packets are dropped.
        Dropped = "dropped",
    }
}

counted! {
    /// Why it did that.
    Reason {
        /// An enrolled pod's connection.
        Enrolled = "enrolled",
        /// The node proxy's own connection.
        Proxy = "proxy",
        /// To 127.0.0.1 or ::1.
        Loopback = "loopback",
        /// To an address of the pod itself.
        OwnAddress = "own_address",
        /// To an IPv6 link-local address (a choice of the agent's whether it passes) or to a multicast group.
        LinkScoped = "link_scoped",
        /// To port 15008, for the proxy's tunnel listener only.
        TunnelPort = "tunnel_port",
        /// The pod accepts inbound connections without the proxy.
        BypassInbound = "bypass_inbound",
        /// Neither TCP nor DNS. Not counted.
        OtherTraffic = "other_traffic",
        /// An exclusion of the node or of the pod.
        Excluded = "excluded",
        /// A DNS query, to the proxy's resolver.
        Dns = "dns",
        /// A probe of the kubelet.
        Probe = "probe",
        /// An application tried to bind one of the proxy's ports.
        ProxyPort = "proxy_port",
        /// From or to an undeclared network behind the pod (containers inside the pod).
        Forwarded = "forwarded",
        /// The packet would bypass the proxy: the connect hook did not see the connection, or its mark was
        /// changed.
        Unmarked = "unmarked",
        /// No node proxy listens in the pod: the SYN is dropped until one does.
        NoListener = "no_listener",
        /// The proxy listens, but the kernel refuses to assign the connection to its listener.
        AssignFailed = "assign_failed",
        /// A source address that is not the pod's.
        Spoofed = "spoofed",
        /// A TCP header that is split across fragments, outside an established connection.
        Fragmented = "fragmented",
        /// Headers that are truncated, or chained too deeply.
        Malformed = "malformed",
        /// The socket refused its mark.
        MarkFailed = "mark_failed",
        /// Dropped at the host end of the pod's device: TCP that neither the proxy sent nor an exemption covers. It bypassed the
        /// programs in the pod (raw frames, filters that the pod added, a device that was moved out). In placement `node`: a
        /// packet of a connection that the proxy does not have.
        PastPod = "past_pod",
        /// It would reach a listener past the proxy: no TC program captured or exempted it.
        Uncaptured = "uncaptured",
        /// From outside, to a socket that is connecting: a simultaneous open.
        SimultaneousOpen = "simultaneous_open",
    }
}

/// Counters of the gates' drops, i.e. of attempts to bypass the node proxy. Expected to stay zero.
pub const OF_GATES: [(Direction, Reason); 4] = [
    (Direction::Outbound, Reason::PastPod),
    (Direction::Inbound, Reason::PastPod),
    (Direction::Inbound, Reason::Uncaptured),
    (Direction::Inbound, Reason::SimultaneousOpen),
];

/// The capacity of the map `COUNTERS`.
pub const COUNTERS: u32 =
    (Family::ALL.len() * Direction::ALL.len() * Verdict::ALL.len() * Reason::ALL.len()) as u32;

/// The index of a counter in the map `COUNTERS`.
#[must_use]
#[inline(always)]
pub const fn index(family: Family, direction: Direction, verdict: Verdict, reason: Reason) -> u32 {
    ((family as u32 * Direction::ALL.len() as u32 + direction as u32) * Verdict::ALL.len() as u32
        + verdict as u32)
        * Reason::ALL.len() as u32
        + reason as u32
}

/// The number of counters in an entry of the map `POD_COUNTERS`.
pub const OF_POD: usize = Family::ALL.len() * 2 * Verdict::ALL.len();

/// The index of a counter in a pod's entry. `None` for the node proxy's own connections and for `bind()` calls, which are
/// not connections of the pod.
#[must_use]
#[inline(always)]
pub const fn of_pod(family: Family, direction: Direction, verdict: Verdict, reason: Reason) -> Option<usize> {
    let way = match (direction, reason) {
        (_, Reason::Proxy) | (Direction::Delivery | Direction::Bind, _) => return None,
        (Direction::Outbound, _) => 0,
        (Direction::Inbound, _) => 1,
    };
    Some((family as usize * 2 + way) * Verdict::ALL.len() + verdict as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_counter_has_a_place_of_its_own() {
        let mut seen = HashSet::new();
        for family in Family::ALL {
            for &direction in Direction::ALL {
                for &verdict in Verdict::ALL {
                    for &reason in Reason::ALL {
                        let place = index(family, direction, verdict, reason);
                        assert!(place < COUNTERS);
                        assert!(seen.insert(place));
                    }
                }
            }
        }
        assert_eq!(seen.len(), COUNTERS as usize);
    }

    #[test]
    fn a_pod_has_a_counter_for_each_of_its_ways_and_none_for_the_proxy() {
        let mut seen = HashSet::new();
        for family in Family::ALL {
            for direction in [Direction::Outbound, Direction::Inbound] {
                for &verdict in Verdict::ALL {
                    let places = [Reason::Enrolled, Reason::Dns]
                        .map(|reason| of_pod(family, direction, verdict, reason));
                    assert_eq!(places[0], places[1]);
                    assert!(places[0].is_some_and(|place| place < OF_POD && seen.insert(place)));
                    assert_eq!(of_pod(family, direction, verdict, Reason::Proxy), None);
                }
            }
            for direction in [Direction::Delivery, Direction::Bind] {
                assert_eq!(of_pod(family, direction, Verdict::Dropped, Reason::ProxyPort), None);
            }
        }
        assert_eq!(seen.len(), OF_POD);
    }
}
