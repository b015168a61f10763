//! Who is enrolled: Istio ambient's conventions, as a pure function.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::api::{NamespaceView, PodView};
use super::exclusions;
use redirect_protocol::pod::PodSettings;

/// The annotation that keeps inbound connections from the proxy.
pub(super) const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// The annotation that names interfaces whose inbound connections count as outbound.
pub(super) const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// The annotation that turns the capture of DNS questions on or off.
pub(super) const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// The annotation that says whether what the pod sends from addresses that are not its own is dropped. Placement `node`.
pub(super) const SOURCE_IP_VERIFICATION: &str = "ambient-redirect.io/source-ip-verification";
/// The annotation of a pod whose sidecar is its proxy.
pub(super) const SIDECAR: &str = "sidecar.istio.io/status";
/// The value of the label that keeps a pod out.
const OPT_OUT: &str = "none";
/// `IFNAMSIZ` without the terminating zero.
const INTERFACE_NAME: usize = 15;

/// What the decision depends on, apart from the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The label that enrols.
    pub enable_label: EnableLabel,
    /// Namespaces that are left alone.
    pub excluded: BTreeSet<String>,
    /// Whether the annotations of Istio's sidecars that exclude networks and ports are honoured.
    pub istio_exclusions: bool,
}

/// A label and the value that enrols.
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
                "{text:?} is no label that enrols: write key=value, with another value than {OPT_OUT}"
            )),
        }
    }
}

/// What is to be done about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is to be steered.
    Enrol(PodSettings),
    /// It is not.
    No(Reason),
    /// It would be, but what it asks for makes no sense.
    Refuse(BadAnnotation),
}

/// Why a pod is not enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Reason {
    #[error("its namespace is excluded")]
    Excluded,
    #[error("it is in the node's network (hostNetwork)")]
    HostNetwork,
    #[error("it has ended")]
    Ended,
    #[error("it has a sidecar")]
    Sidecar,
    #[error("its label keeps it out")]
    OptedOut,
    #[error("neither it nor its namespace has the label")]
    NotLabelled,
    #[error("its namespace is not known yet")]
    NamespaceUnknown,
}

/// An annotation that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation} is {value:?}: {remedy}")]
pub(super) struct BadAnnotation {
    pub(super) annotation: &'static str,
    pub(super) value: String,
    pub(super) remedy: &'static str,
}

/// Decides about a pod. `None` for its namespace: nothing is known of that yet.
pub(super) fn decide(pod: &PodView, namespace: Option<&NamespaceView>, rules: &Rules) -> Decision {
    if let Some(reason) = left_alone(pod, rules) {
        return Decision::No(reason);
    }
    let enrols = |mode: &Option<String>| mode.as_deref() == Some(rules.enable_label.value.as_str());
    if pod.mode.as_deref() == Some(OPT_OUT) {
        return Decision::No(Reason::OptedOut);
    }
    if !enrols(&pod.mode) {
        match namespace {
            None => return Decision::No(Reason::NamespaceUnknown),
            Some(namespace) if !enrols(&namespace.mode) => return Decision::No(Reason::NotLabelled),
            Some(_) => {}
        }
    }
    match settings(pod, rules) {
        Ok(settings) => Decision::Enrol(settings),
        Err(bad) => Decision::Refuse(bad),
    }
}

/// Why a pod is not enrolled, whatever its labels are.
fn left_alone(pod: &PodView, rules: &Rules) -> Option<Reason> {
    if rules.excluded.contains(&pod.namespace) {
        Some(Reason::Excluded)
    } else if pod.host_network {
        Some(Reason::HostNetwork)
    } else if pod.ended {
        Some(Reason::Ended)
    } else if pod.sidecar {
        Some(Reason::Sidecar)
    } else {
        None
    }
}

fn settings(pod: &PodView, rules: &Rules) -> Result<PodSettings, BadAnnotation> {
    let boolean = |annotation, value: &Option<String>| -> Result<Option<bool>, BadAnnotation> {
        value.as_deref().map(|value| boolean(annotation, value)).transpose()
    };
    Ok(PodSettings {
        bypass_inbound: boolean(BYPASS_INBOUND, &pod.bypass_inbound)?.unwrap_or(false),
        dns: boolean(DNS_CAPTURE, &pod.dns_capture)?,
        any_source: boolean(SOURCE_IP_VERIFICATION, &pod.source_ip_verification)?.map(|verified| !verified),
        exclusions: exclusions::parse(&pod.exclusions, rules.istio_exclusions)?,
        virtual_interfaces: pod.virtual_interfaces.as_deref().map_or(Ok(Vec::new()), interfaces)?,
    })
}

/// The spellings that Istio takes.
fn boolean(annotation: &'static str, value: &str) -> Result<bool, BadAnnotation> {
    match value.trim() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(BadAnnotation { annotation, value: value.into(), remedy: "write \"true\" or \"false\"" }),
    }
}

fn interfaces(value: &str) -> Result<Vec<String>, BadAnnotation> {
    let mut names: Vec<String> = Vec::new();
    if value.trim().is_empty() {
        return Ok(names);
    }
    for name in value.split(',').map(str::trim) {
        if !is_interface(name) {
            return Err(BadAnnotation {
                annotation: VIRTUAL_INTERFACES,
                value: value.into(),
                remedy: "write names of interfaces (of at most 15 characters, not lo), separated by commas",
            });
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
    Ok(names)
}

/// What the kernel takes as an interface's name. `lo` is steered already.
fn is_interface(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    !matches!(name, "" | "." | ".." | "lo") && name.len() <= INTERFACE_NAME && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
