//! Checks objects strictly against the types of Kubernetes' API: an unknown field is an error.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ResourceQuota, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The objects of a YAML stream; all must be valid.
pub(crate) fn read(text: &str) -> Result<Vec<Value>> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(text).context("not YAML")?;
    let objects: Vec<Value> = objects.into_iter().filter(|object| !object.is_null()).collect();
    for object in &objects {
        check(object).with_context(|| format!("{} {}", object["kind"], object["metadata"]["name"]))?;
    }
    ensure!(!objects.is_empty(), "nothing");
    Ok(objects)
}

fn check(object: &Value) -> Result<()> {
    let kind =
        (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default());
    match kind {
        ("v1", "ConfigMap") => strictly::<ConfigMap>(object),
        ("v1", "Namespace") => strictly::<Namespace>(object),
        ("v1", "Pod") => strictly::<Pod>(object),
        ("v1", "ResourceQuota") => strictly::<ResourceQuota>(object),
        ("v1", "Service") => strictly::<Service>(object),
        ("v1", "ServiceAccount") => strictly::<ServiceAccount>(object),
        ("apps/v1", "DaemonSet") => strictly::<DaemonSet>(object),
        ("apps/v1", "Deployment") => strictly::<Deployment>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => strictly::<NetworkPolicy>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => strictly::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => strictly::<ClusterRoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => strictly::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => strictly::<RoleBinding>(object),
        ("monitoring.coreos.com/v1", "PodMonitor") => custom::<PodMonitor>(object),
        ("monitoring.coreos.com/v1", "PrometheusRule") => custom::<PrometheusRule>(object),
        (version, kind) => bail!("{version} {kind} is not known here"),
    }
}

/// A custom resource: ordinary metadata and a specification.
fn custom<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
    strictly::<ObjectMeta>(&object["metadata"]).context("metadata")?;
    strictly::<T>(&object["spec"]).context("spec")
}

/// The part of the Prometheus operator's types that the chart uses, from its API reference.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodMonitor {
    selector: LabelSelector,
    pod_metrics_endpoints: Vec<Endpoint>,
}

/// The port is the name of one of the pod's ports.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Endpoint {
    port: String,
    path: String,
    interval: String,
}

/// promtool checks the rules themselves.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrometheusRule {
    groups: Vec<Group>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    alert: String,
    expr: String,
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pending: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// The type must preserve the whole object.
fn strictly<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
    let typed: T = serde_json::from_value(object.clone())?;
    lost(object, &serde_json::to_value(typed)?, String::new())
}

fn lost(given: &Value, kept: &Value, path: String) -> Result<()> {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (key, value) in given {
                let path = format!("{path}.{key}");
                match kept.get(key) {
                    Some(kept) => lost(value, kept, path)?,
                    None => bail!("{path} is no field"),
                }
            }
            Ok(())
        }
        (Value::Array(given), Value::Array(kept)) => {
            ensure!(given.len() == kept.len(), "{path} has lost elements");
            given
                .iter()
                .zip(kept)
                .enumerate()
                .try_for_each(|(i, (given, kept))| lost(given, kept, format!("{path}[{i}]")))
        }
        _ => {
            ensure!(given == kept, "{path}: {given} became {kept}");
            Ok(())
        }
    }
}
