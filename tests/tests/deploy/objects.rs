//! Objects against the types of Kubernetes' API, strictly: a field that the type does not have is an error.

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Namespace, ResourceQuota, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The objects of a YAML stream, all of them valid.
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
        ("v1", "Namespace") => strictly::<Namespace>(object),
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
        // A custom resource of the Prometheus operator, whose types are not at hand: its form is not checked.
        ("monitoring.coreos.com/v1", "PodMonitor") => Ok(()),
        (version, kind) => bail!("{version} {kind} is not known here"),
    }
}

/// What the type keeps of the object must be all of it.
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
