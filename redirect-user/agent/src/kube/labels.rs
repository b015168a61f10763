//! The labels and annotations of Istio ambient, and ours.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The annotation that exempts inbound connections from capture.
pub(super) const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// The annotation with the interfaces whose inbound connections count as outbound.
pub(super) const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// The annotation that turns DNS capture on or off.
pub(super) const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// The annotation that decides whether packets from addresses that are not the pod's own are dropped. Placement `node`.
pub(super) const SOURCE_IP_VERIFICATION: &str = "ambient-redirect.io/source-ip-verification";
/// The annotation for the grace period, in seconds, of connections at the proxy when the pod is un-enrolled.
pub(super) const UNENROLL_GRACE: &str = "ambient-redirect.io/unenroll-grace";
/// The annotation of a pod whose sidecar is its proxy.
pub(super) const SIDECAR: &str = "sidecar.istio.io/status";
/// The label's value that opts a pod out.
pub(super) const OPT_OUT: &str = "none";

/// The node's settings for the decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The enrollment label.
    pub enable_label: EnableLabel,
    /// Excluded namespaces.
    pub excluded: BTreeSet<String>,
    /// Whether to honor the exclusions in the annotations of Istio's sidecars.
    pub istio_exclusions: bool,
    /// The grace period of connections at the proxy when a pod is un-enrolled, unless the pod's annotation sets it.
    pub unenroll_grace: Duration,
}

/// A label and its value for enrollment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnableLabel {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

impl Default for EnableLabel {
    fn default() -> Self {
        Self { key: "istio.io/dataplane-mode".into(), value: "ambient".into() }
    }
}

impl fmt::Display for EnableLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

impl FromStr for EnableLabel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() && value != OPT_OUT => {
                Ok(Self { key: key.into(), value: value.into() })
            }
            _ => Err(format!(
                "{text:?} is not a label that enrolls pods: write key=value, with a value other than \
                 {OPT_OUT}"
            )),
        }
    }
}

/// An invalid annotation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation} is {value:?}: {remedy}")]
pub(super) struct BadAnnotation {
    pub(super) annotation: &'static str,
    pub(super) value: String,
    pub(super) remedy: &'static str,
}
