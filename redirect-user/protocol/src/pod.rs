//! Identity, addresses and settings of a pod.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use redirect_ebpf::{Direction, Family};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A pod's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Kubernetes UID, or the sandbox's container ID without Kubernetes.
    pub uid: String,
    /// Kubernetes namespace; empty without Kubernetes.
    pub namespace: String,
    /// Kubernetes name, or the sandbox's container ID without Kubernetes.
    pub name: String,
    /// Kubernetes service account; empty if unknown.
    #[serde(default)]
    pub service_account: String,
}

impl PodIdentity {
    /// Whether `name` refers to this pod: its UID, its name, or namespace and name.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.uid == name || self.name == name || self.to_string() == name
    }
}

impl fmt::Display for PodIdentity {
    /// `namespace/name`, as users write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// The addresses of a pod, by family, in the order in which they were reported. The first of a family is the source
/// of the pod's own connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    /// IPv4 addresses.
    pub ipv4: Vec<Ipv4Addr>,
    /// IPv6 addresses.
    pub ipv6: Vec<Ipv6Addr>,
}

impl PodAddresses {
    /// Whether the pod has no address at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }

    /// The families of the pod's addresses.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        let v4 = (!self.ipv4.is_empty()).then_some(Family::Ipv4);
        let v6 = (!self.ipv6.is_empty()).then_some(Family::Ipv6);
        v4.into_iter().chain(v6)
    }

    /// Every address, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.iter().copied().map(IpAddr::V4).chain(self.ipv6.iter().copied().map(IpAddr::V6))
    }
}

impl Extend<IpAddr> for PodAddresses {
    fn extend<T: IntoIterator<Item = IpAddr>>(&mut self, addresses: T) {
        for address in addresses {
            match address.to_canonical() {
                IpAddr::V4(v4) if !self.ipv4.contains(&v4) => self.ipv4.push(v4),
                IpAddr::V6(v6) if !self.ipv6.contains(&v6) => self.ipv6.push(v6),
                IpAddr::V4(_) | IpAddr::V6(_) => {}
            }
        }
    }
}

impl FromIterator<IpAddr> for PodAddresses {
    fn from_iter<T: IntoIterator<Item = IpAddr>>(addresses: T) -> Self {
        let mut all = Self::default();
        all.extend(addresses);
        all
    }
}

/// The family of an address. A v4-mapped one counts as IPv4.
#[must_use]
pub fn family(address: IpAddr) -> Family {
    match address.to_canonical() {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    }
}

/// The settings of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSettings {
    /// Inbound connections reach the application without the proxy.
    pub bypass_inbound: bool,
    /// Whether the pod's DNS queries go to the proxy's resolver, if the pod sets it.
    pub dns: Option<bool>,
    /// Placement `node`: whether the pod may send from addresses that are not its own, if the pod sets it.
    pub any_source: Option<bool>,
    /// Exclusions from capture.
    pub exclusions: BTreeSet<Exclusion>,
    /// Interfaces whose inbound TCP counts as the pod's outbound, e.g. those to virtual machines.
    pub virtual_interfaces: Vec<String>,
}

/// Connections that are excluded from capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exclusion {
    /// With peers in a network: destinations of outbound connections, sources of inbound ones.
    Network(Direction, IpNet),
    /// To a port.
    Port(Direction, u16),
}

/// Parses a network, with or without host bits, or a single address.
pub fn network(text: &str) -> Result<IpNet, String> {
    let network = match text.parse::<IpNet>() {
        Ok(network) => network,
        Err(error) => text.parse::<IpAddr>().map(IpNet::from).map_err(|_| error.to_string())?,
    };
    match network {
        // On the wire such addresses are IPv4, so the exclusion would never match.
        IpNet::V6(network) if network.addr().to_ipv4_mapped().is_some() => {
            Err("v4-mapped networks are IPv4 networks: write a.b.c.d/n".into())
        }
        network => Ok(network.trunc()),
    }
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(direction, network) => write!(f, "{} {network}", direction.label()),
            Self::Port(direction, port) => write!(f, "{} port {port}", direction.label()),
        }
    }
}

/// Why a text is not a valid exclusion.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0:?} is not an exclusion, such as \"outbound 10.0.0.0/8\" or \"inbound port 80\"")]
pub struct NoExclusion(String);

impl FromStr for Exclusion {
    type Err = NoExclusion;

    fn from_str(text: &str) -> Result<Self, NoExclusion> {
        let parse = || {
            let (label, rest) = text.split_once(' ')?;
            let direction = *Direction::ALL.iter().find(|direction| direction.label() == label)?;
            match rest.strip_prefix("port ") {
                Some(port) => Some(Self::Port(direction, port.parse().ok()?)),
                None => Some(Self::Network(direction, rest.parse().ok()?)),
            }
        };
        parse().ok_or_else(|| NoExclusion(text.into()))
    }
}

impl Serialize for Exclusion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Exclusion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sorted_by_family_and_v4_mapped_ones_are_ipv4() {
        let addresses: PodAddresses = ["fd00::5", "10.0.0.5", "::ffff:10.0.0.5", "fd00::5"]
            .iter()
            .map(|text| text.parse::<IpAddr>().unwrap())
            .collect();
        assert_eq!(addresses.ipv4, [Ipv4Addr::new(10, 0, 0, 5)]);
        assert_eq!(addresses.ipv6, ["fd00::5".parse::<Ipv6Addr>().unwrap()]);
        assert_eq!(addresses.families().collect::<Vec<_>>(), Family::ALL);
    }
}
