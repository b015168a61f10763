//! Decides which pods are enrolled, by Istio ambient's conventions. Pure.

use std::time::Duration;

use super::api::{NamespaceView, PodView};
use super::exclusions;
use super::labels::{
    BYPASS_INBOUND, BadAnnotation, DNS_CAPTURE, OPT_OUT, Rules, SOURCE_IP_VERIFICATION, UNENROLL_GRACE,
    VIRTUAL_INTERFACES,
};
use redirect_protocol::pod::PodSettings;

/// `IFNAMSIZ` without the terminating zero.
const INTERFACE_NAME: usize = 15;

/// The decision about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Capture it.
    Enroll(PodSettings),
    /// Do not capture it.
    No(Reason),
    /// It should be captured, but its annotations are invalid.
    Refuse(BadAnnotation),
}

/// Why a pod is not enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Reason {
    #[error("its namespace is excluded")]
    Excluded,
    #[error("it uses the node's network (hostNetwork)")]
    HostNetwork,
    #[error("it has ended")]
    Ended,
    #[error("it has a sidecar")]
    Sidecar,
    #[error("its label opts it out")]
    OptedOut,
    #[error("neither it nor its namespace has the label")]
    NotLabelled,
    #[error("its namespace is not known yet")]
    NamespaceUnknown,
}

/// Decides about a pod. `namespace` is `None` if it is not known yet.
pub(super) fn decide(pod: &PodView, namespace: Option<&NamespaceView>, rules: &Rules) -> Decision {
    if let Some(reason) = left_alone(pod, rules) {
        return Decision::No(reason);
    }
    let enrolls = |mode: &Option<String>| mode.as_deref() == Some(rules.enable_label.value.as_str());
    if pod.mode.as_deref() == Some(OPT_OUT) {
        return Decision::No(Reason::OptedOut);
    }
    if !enrolls(&pod.mode) {
        match namespace {
            None => return Decision::No(Reason::NamespaceUnknown),
            Some(namespace) if !enrolls(&namespace.mode) => return Decision::No(Reason::NotLabelled),
            Some(_) => {}
        }
    }
    // An invalid annotation is an error now, not when the pod leaves.
    match grace(pod, rules).and_then(|_| settings(pod, rules)) {
        Ok(settings) => Decision::Enroll(settings),
        Err(bad) => Decision::Refuse(bad),
    }
}

impl Reason {
    /// The grace period of connections at the proxy when a pod is un-enrolled for this reason. Only a pod that continues to run
    /// unchanged can have one.
    pub(super) fn grace(self, pod: &PodView, rules: &Rules) -> Duration {
        match self {
            Self::OptedOut | Self::NotLabelled => grace(pod, rules).unwrap_or(rules.unenroll_grace),
            Self::Excluded | Self::HostNetwork | Self::Ended | Self::Sidecar | Self::NamespaceUnknown => {
                Duration::ZERO
            }
        }
    }
}

fn grace(pod: &PodView, rules: &Rules) -> Result<Duration, BadAnnotation> {
    let Some(value) = &pod.unenroll_grace else { return Ok(rules.unenroll_grace) };
    let seconds = value.trim().parse::<u32>().map_err(|_| BadAnnotation {
        annotation: UNENROLL_GRACE,
        value: value.clone(),
        remedy: "write a number of seconds",
    })?;
    Ok(Duration::from_secs(seconds.into()))
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

/// The spellings that Istio accepts.
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

/// Whether the kernel accepts it as an interface's name. `lo` is captured already.
fn is_interface(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    !matches!(name, "" | "." | ".." | "lo") && name.len() <= INTERFACE_NAME && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests;
