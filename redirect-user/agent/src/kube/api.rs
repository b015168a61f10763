//! The fields of Kubernetes objects that the agent reads and keeps.
//!
//! No other fields are decoded. So neither a newer API server nor an unusual pod makes the agent lose track of a node's pods,
//! and they take kilobytes of memory, not megabytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::ObjectMeta;
use kube::core::{NamespaceResourceScope, Resource};
use serde::Deserialize;

use super::exclusions;
use super::labels::{
    BYPASS_INBOUND, DNS_CAPTURE, Rules, SIDECAR, SOURCE_IP_VERIFICATION, UNENROLL_GRACE, VIRTUAL_INTERFACES,
};
use redirect_protocol::pod::PodIdentity;

/// The annotation that shows a pod's state.
pub(super) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// On the mirror pod of a static pod: the UID by which node and runtime know the pod.
const STATIC_POD_HASH: &str = "kubernetes.io/config.hash";

/// A pod as the API server sends it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ApiPod {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    host_network: Option<bool>,
    service_account_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
struct PodIp {
    ip: Option<String>,
}

impl Resource for ApiPod {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// The kept fields of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PodView {
    pub(super) uid: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) service_account: String,
    /// The UID by which the node knows the pod, if it differs.
    pub(super) static_uid: Option<String>,
    pub(super) host_network: bool,
    /// It is in a final phase.
    pub(super) ended: bool,
    /// It is being deleted.
    pub(super) terminating: bool,
    pub(super) addresses: Vec<IpAddr>,
    /// The value of the enrollment label.
    pub(super) mode: Option<String>,
    pub(super) sidecar: bool,
    pub(super) bypass_inbound: Option<String>,
    pub(super) virtual_interfaces: Option<String>,
    pub(super) dns_capture: Option<String>,
    pub(super) source_ip_verification: Option<String>,
    pub(super) unenroll_grace: Option<String>,
    /// See [`exclusions`].
    pub(super) exclusions: BTreeMap<&'static str, String>,
    /// The value of [`REDIRECTION`].
    pub(super) redirection: Option<String>,
}

/// The kept fields of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NamespaceView {
    pub(super) name: String,
    /// The value of the enrollment label.
    pub(super) mode: Option<String>,
}

/// Why an object is unusable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it has no {0}")]
    Missing(&'static str),
    #[error("its address {0:?} is none")]
    Address(String),
}

impl PodView {
    pub(super) fn new(pod: ApiPod, rules: &Rules) -> Result<Self, Unusable> {
        let ApiPod { metadata, spec, status } = pod;
        let mut annotations = metadata.annotations.unwrap_or_default();
        Ok(Self {
            uid: present(metadata.uid, "UID")?,
            namespace: present(metadata.namespace, "namespace")?,
            name: present(metadata.name, "name")?,
            service_account: spec.service_account_name.unwrap_or_default(),
            static_uid: annotations.remove(STATIC_POD_HASH),
            host_network: spec.host_network.unwrap_or_default(),
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            terminating: metadata.deletion_timestamp.is_some(),
            addresses: status.addresses()?,
            mode: mode(metadata.labels, rules),
            sidecar: annotations.contains_key(SIDECAR),
            bypass_inbound: annotations.remove(BYPASS_INBOUND),
            virtual_interfaces: annotations.remove(VIRTUAL_INTERFACES),
            dns_capture: annotations.remove(DNS_CAPTURE),
            source_ip_verification: annotations.remove(SOURCE_IP_VERIFICATION),
            unenroll_grace: annotations.remove(UNENROLL_GRACE),
            exclusions: exclusions::take(&mut annotations),
            redirection: annotations.remove(REDIRECTION),
        })
    }

    pub(super) fn identity(&self) -> PodIdentity {
        PodIdentity {
            uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// The UIDs that may appear in the cgroups of the pod's processes.
    pub(super) fn node_uids(&self) -> Vec<String> {
        std::iter::once(self.uid.clone()).chain(self.static_uid.clone()).collect()
    }

    /// Whether a runtime that reports this UID for a sandbox means this pod.
    pub(super) fn is(&self, uid: &str) -> bool {
        /// An older runtime reports no UID, and the container's ID replaces it.
        const CONTAINER_ID: usize = 64;
        self.uid == uid || self.static_uid.as_deref() == Some(uid) || uid.len() == CONTAINER_ID
    }

    pub(super) fn reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: Some(self.name.clone()),
            namespace: Some(self.namespace.clone()),
            uid: Some(self.uid.clone()),
            ..ObjectReference::default()
        }
    }
}

impl NamespaceView {
    pub(super) fn new(metadata: ObjectMeta, rules: &Rules) -> Result<Self, Unusable> {
        Ok(Self { name: present(metadata.name, "name")?, mode: mode(metadata.labels, rules) })
    }
}

impl Status {
    fn addresses(self) -> Result<Vec<IpAddr>, Unusable> {
        let listed = self.pod_ips.unwrap_or_default().into_iter().filter_map(|ip| ip.ip);
        let mut addresses = Vec::new();
        for text in listed.chain(self.pod_ip).filter(|text| !text.is_empty()) {
            let address = text.parse::<IpAddr>().map_err(|_| Unusable::Address(text))?.to_canonical();
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        Ok(addresses)
    }
}

fn present(value: Option<String>, what: &'static str) -> Result<String, Unusable> {
    value.filter(|value| !value.is_empty()).ok_or(Unusable::Missing(what))
}

fn mode(labels: Option<BTreeMap<String, String>>, rules: &Rules) -> Option<String> {
    labels?.remove(&rules.enable_label.key)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn view(pod: serde_json::Value) -> Result<PodView, Unusable> {
        PodView::new(serde_json::from_value(pod).unwrap(), &Rules::default())
    }

    #[test]
    fn a_pod_is_stripped_to_what_matters() {
        let pod = json!({
            "metadata": {
                "name": "cart", "namespace": "shop", "uid": "u-1",
                "labels": {"app": "cart", "istio.io/dataplane-mode": "ambient"},
                "annotations": {
                    "ambient.istio.io/redirection": "enabled",
                    "kubernetes.io/config.hash": "0123",
                    "other": "x",
                },
                "managedFields": [{"manager": "kubelet"}],
            },
            "spec": {"serviceAccountName": "cart-sa", "containers": [{"name": "c", "image": "i"}], "unheardOf": 5},
            "status": {
                "phase": "Running", "podIP": "10.0.0.5",
                "podIPs": [{"ip": "10.0.0.5"}, {"ip": "fd00::5"}, {"ip": "::ffff:10.0.0.5"}, {}],
            },
        });
        let view = view(pod).unwrap();
        let addresses: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        let expected = PodView {
            uid: "u-1".into(),
            namespace: "shop".into(),
            name: "cart".into(),
            service_account: "cart-sa".into(),
            static_uid: Some("0123".into()),
            addresses,
            mode: Some("ambient".into()),
            redirection: Some("enabled".into()),
            ..PodView::default()
        };
        assert_eq!(view, expected);
        assert!(view.is("u-1") && view.is("0123") && view.is(&"a".repeat(64)) && !view.is("u-2"));
    }

    #[test]
    fn phases_that_are_never_left() {
        for (phase, ended) in [
            ("Pending", false),
            ("Running", false),
            ("Succeeded", true),
            ("Failed", true),
            ("Unknown", false),
        ] {
            let pod =
                json!({"metadata": {"name": "a", "namespace": "b", "uid": "c"}, "status": {"phase": phase}});
            assert_eq!(view(pod).unwrap().ended, ended, "{phase}");
        }
    }

    #[test]
    fn objects_without_what_is_needed() {
        for missing in ["name", "namespace", "uid"] {
            let mut pod = json!({"metadata": {"name": "a", "namespace": "b", "uid": "c"}});
            pod["metadata"][missing] = serde_json::Value::Null;
            assert!(matches!(view(pod), Err(Unusable::Missing(_))), "{missing}");
        }
        let pod = json!({
            "metadata": {"name": "a", "namespace": "b", "uid": "c"}, "status": {"podIPs": [{"ip": "10.0.0"}]},
        });
        assert_eq!(view(pod), Err(Unusable::Address("10.0.0".into())));
    }
}
