//! Networks and ports that a pod's annotations exclude from capture.

use std::collections::{BTreeMap, BTreeSet};

use redirect_ebpf::Direction;

use super::labels::BadAnnotation;
use redirect_protocol::pod::{Exclusion, network};

/// The entries of an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum List {
    Networks,
    Ports,
}

/// An annotation with exclusions.
struct Annotation {
    name: &'static str,
    direction: Direction,
    list: List,
    /// Whether it is one of Istio's for sidecars, honored only if enabled.
    istio: bool,
}

const fn own(name: &'static str, direction: Direction, list: List) -> Annotation {
    Annotation { name, direction, list, istio: false }
}

const fn istio(name: &'static str, direction: Direction, list: List) -> Annotation {
    Annotation { name, direction, list, istio: true }
}

const ANNOTATIONS: [Annotation; 7] = [
    own("ambient-redirect.io/exclude-outbound-networks", Direction::Outbound, List::Networks),
    own("ambient-redirect.io/exclude-outbound-ports", Direction::Outbound, List::Ports),
    own("ambient-redirect.io/exclude-inbound-networks", Direction::Inbound, List::Networks),
    own("ambient-redirect.io/exclude-inbound-ports", Direction::Inbound, List::Ports),
    istio("traffic.sidecar.istio.io/excludeOutboundIPRanges", Direction::Outbound, List::Networks),
    istio("traffic.sidecar.istio.io/excludeOutboundPorts", Direction::Outbound, List::Ports),
    istio("traffic.sidecar.istio.io/excludeInboundPorts", Direction::Inbound, List::Ports),
];

/// Extracts the values of these annotations, by name.
pub(super) fn take(annotations: &mut BTreeMap<String, String>) -> BTreeMap<&'static str, String> {
    ANNOTATIONS
        .iter()
        .filter_map(|annotation| Some((annotation.name, annotations.remove(annotation.name)?)))
        .collect()
}

/// Their exclusions. One bad value refuses the pod: applying only some of the exclusions would not be what was
/// asked for.
pub(super) fn parse(
    values: &BTreeMap<&'static str, String>,
    honour_istio: bool,
) -> Result<BTreeSet<Exclusion>, BadAnnotation> {
    let mut exclusions = BTreeSet::new();
    for annotation in ANNOTATIONS.iter().filter(|annotation| honour_istio || !annotation.istio) {
        let Some(value) = values.get(annotation.name) else { continue };
        for item in value.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let exclusion = match annotation.list {
                List::Networks => {
                    network(item).ok().map(|network| Exclusion::Network(annotation.direction, network))
                }
                List::Ports => port(item).map(|port| Exclusion::Port(annotation.direction, port)),
            };
            exclusions.insert(exclusion.ok_or_else(|| BadAnnotation {
                annotation: annotation.name,
                value: value.clone(),
                remedy: match annotation.list {
                    List::Networks => "write IPv4 or IPv6 networks as address/length, separated by commas",
                    List::Ports => "write port numbers from 1 to 65535, separated by commas",
                },
            })?);
        }
    }
    Ok(exclusions)
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORKS: &str = "ambient-redirect.io/exclude-outbound-networks";
    const PORTS: &str = "ambient-redirect.io/exclude-inbound-ports";
    const ISTIO: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";

    fn of(pairs: &[(&str, &str)], honour_istio: bool) -> Result<BTreeSet<Exclusion>, BadAnnotation> {
        let mut annotations = pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        parse(&take(&mut annotations), honour_istio)
    }

    fn networks(list: &[&str]) -> BTreeSet<Exclusion> {
        list.iter().map(|text| Exclusion::Network(Direction::Outbound, text.parse().unwrap())).collect()
    }

    #[test]
    fn networks_of_both_families() {
        let value = "10.1.2.3/8, fd00:1::/64, 192.0.2.7/24 , 198.51.100.1,2001:db8::1,0.0.0.0/0,::/0";
        let expected = [
            "10.0.0.0/8",
            "fd00:1::/64",
            "192.0.2.0/24",
            "198.51.100.1/32",
            "2001:db8::1/128",
            "0.0.0.0/0",
            "::/0",
        ];
        assert_eq!(of(&[(NETWORKS, value)], false), Ok(networks(&expected)));
        assert_eq!(of(&[(NETWORKS, "")], false), Ok(BTreeSet::new()));
    }

    #[test]
    fn ports() {
        let expected = [9090, 15020].map(|port| Exclusion::Port(Direction::Inbound, port));
        assert_eq!(of(&[(PORTS, "15020, 9090")], false), Ok(expected.into()));
    }

    #[test]
    fn istios_annotations_count_where_they_are_honoured() {
        assert_eq!(of(&[(ISTIO, "10.0.0.0/8")], false), Ok(BTreeSet::new()));
        assert_eq!(of(&[(ISTIO, "10.0.0.0/8")], true), Ok(networks(&["10.0.0.0/8"])));
        assert_eq!(of(&[(ISTIO, "nonsense")], false), Ok(BTreeSet::new()));
    }

    #[test]
    fn one_bad_value_refuses_all_of_it() {
        for (name, value) in [
            (NETWORKS, "10.0.0.0/8,10.0.0.0/33"),
            (NETWORKS, "fd00::/129"),
            (NETWORKS, "example.com"),
            (NETWORKS, "*"),
            (NETWORKS, "::ffff:192.0.2.0/120"),
            (PORTS, "0"),
            (PORTS, "80,65536"),
            (PORTS, "http"),
            (PORTS, "-1"),
        ] {
            let bad = of(&[(name, value)], true).unwrap_err().to_string();
            assert!(
                bad.contains(name) && bad.contains(value) && bad.contains("separated by commas"),
                "{bad}"
            );
        }
    }

    proptest::proptest! {
        /// Any text is either parsed in full, or refused with the annotation's name.
        #[test]
        fn any_text_is_understood_or_refused(text in ".{0,200}|[0-9a-f:./, -]{0,60}") {
            for name in ANNOTATIONS.map(|annotation| annotation.name) {
                match of(&[(name, &text)], true) {
                    Ok(exclusions) => {
                        let items = text.split(',').filter(|item| !item.trim().is_empty()).count();
                        proptest::prop_assert!(exclusions.len() <= items, "{text:?}: {exclusions:?}");
                        proptest::prop_assert!(items == 0 || !exclusions.is_empty(), "{text:?} excludes nothing");
                    }
                    Err(error) => proptest::prop_assert!(error.to_string().contains(name), "{error}"),
                }
            }
        }
    }
}
