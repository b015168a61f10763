//! Events of single connections, and filters for them.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::pod::PodIdentity;

/// The decision on one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowReport {
    /// The time.
    pub time: jiff::Timestamp,
    /// The pod, if the agent knows it.
    pub pod: Option<PodIdentity>,
    /// `IPv4` or `IPv6`: that of the packets.
    pub family: String,
    /// See [`redirect_ebpf::Direction`].
    pub direction: String,
    /// The source; unknown until the kernel has chosen it. For `bind()`, the bound address.
    pub source: Option<SocketAddr>,
    /// The destination that the client dialed, even if the connection was captured.
    pub destination: Option<SocketAddr>,
    /// See [`redirect_ebpf::Verdict`].
    pub verdict: String,
    /// See [`redirect_ebpf::Reason`].
    pub reason: String,
    /// The cookie of the pod's own socket (`SO_COOKIE`, `ss -e`), if known.
    pub socket_cookie: Option<u64>,
}

/// Which events are wanted: those that every condition holds for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
pub struct FlowFilter {
    /// Only connections of this pod: NAMESPACE/NAME, name or UID
    #[arg(long)]
    pub pod: Option<String>,
    /// Only connections of pods in this namespace
    #[arg(long)]
    pub namespace: Option<String>,
    /// Only connections of this family
    #[arg(long, value_parser = ["IPv4", "IPv6"], ignore_case = true)]
    pub family: Option<String>,
    /// Only connections in this direction
    #[arg(long, value_parser = ["outbound", "inbound", "delivery", "bind"])]
    pub direction: Option<String>,
    /// Only connections with this verdict
    #[arg(long, value_parser = ["captured", "passed", "dropped"])]
    pub verdict: Option<String>,
    /// Only connections from or to this address or network, such as 192.0.2.0/24 or 2001:db8::1
    #[arg(long, value_name = "CIDR", value_parser = crate::pod::network)]
    pub address: Option<IpNet>,
}

impl FlowFilter {
    /// Whether the event matches.
    #[must_use]
    pub fn wants(&self, flow: &FlowReport) -> bool {
        let is = |wanted: &Option<String>, found: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(found))
        };
        let pod = |wanted: &String| flow.pod.as_ref().is_some_and(|pod| pod.is_called(wanted));
        let namespace = |wanted: &String| flow.pod.as_ref().is_some_and(|pod| pod.namespace == *wanted);
        let address = |wanted: &IpNet| {
            [flow.source, flow.destination].into_iter().flatten().any(|end| wanted.contains(&end.ip()))
        };
        is(&self.family, &flow.family)
            && is(&self.direction, &flow.direction)
            && is(&self.verdict, &flow.verdict)
            && self.pod.as_ref().is_none_or(pod)
            && self.namespace.as_ref().is_none_or(namespace)
            && self.address.as_ref().is_none_or(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> FlowReport {
        FlowReport {
            time: jiff::Timestamp::UNIX_EPOCH,
            pod: Some(PodIdentity {
                uid: "u1".into(),
                namespace: "shop".into(),
                name: "web".into(),
                ..PodIdentity::default()
            }),
            family: "IPv6".into(),
            direction: "outbound".into(),
            source: Some("[fd00::2]:40000".parse().unwrap()),
            destination: Some("[2001:db8::1]:80".parse().unwrap()),
            verdict: "captured".into(),
            reason: "enrolled".into(),
            socket_cookie: Some(7),
        }
    }

    #[test]
    fn every_condition_has_to_hold() {
        let all = FlowFilter {
            pod: Some("shop/web".into()),
            namespace: Some("shop".into()),
            family: Some("IPv6".into()),
            direction: Some("outbound".into()),
            verdict: Some("captured".into()),
            address: Some("2001:db8::/32".parse().unwrap()),
        };
        assert!(FlowFilter::default().wants(&flow()) && all.wants(&flow()));
        for pod in ["web", "u1"] {
            assert!(FlowFilter { pod: Some(pod.into()), ..all.clone() }.wants(&flow()));
        }
        assert!(FlowFilter { address: Some("fd00::2/128".parse().unwrap()), ..all.clone() }.wants(&flow()));
        for other in [
            FlowFilter { pod: Some("shop/we".into()), ..all.clone() },
            FlowFilter { namespace: Some("other".into()), ..all.clone() },
            FlowFilter { family: Some("IPv4".into()), ..all.clone() },
            FlowFilter { direction: Some("inbound".into()), ..all.clone() },
            FlowFilter { verdict: Some("passed".into()), ..all.clone() },
            FlowFilter { address: Some("10.0.0.0/8".parse().unwrap()), ..all },
        ] {
            assert!(!other.wants(&flow()), "{other:?}");
        }
    }

    #[test]
    fn an_event_of_an_unknown_pod_is_no_pod_s() {
        let unknown = FlowReport { pod: None, source: None, ..flow() };
        assert!(FlowFilter::default().wants(&unknown));
        assert!(!FlowFilter { namespace: Some(String::new()), ..FlowFilter::default() }.wants(&unknown));
    }
}
