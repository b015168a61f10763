//! The network configuration on standard input.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::Error;
use super::version::SpecVersion;
use redirect_protocol::wire::{Attachment, DEFAULT_SOCKET};

/// The plugin's configuration: its own object in the `plugins` list of a network configuration list.
///
/// | key | type | default | meaning |
/// |---|---|---|---|
/// | `agentSocket` | absolute path | `/run/ambient-redirect/agent.sock` | where the agent listens |
/// | `timeoutSeconds` | 1 to 3600 | 25 | how long to wait for the agent; must be shorter than the runtime waits for the plugin |
/// | `excludeNamespaces` | list of strings | `["kube-system", "ambient-redirect"]` | pods of these Kubernetes namespaces start even if the agent does not answer within two seconds, because the agent's own pod and the node's critical pods must be able to start; if it answers, they are captured |
///
/// The specification's own keys are `cniVersion`, `name`, `type`, `prevResult`, `runtimeConfig` and, for `GC`,
/// `cni.dev/valid-attachments`. The plugin ignores other keys, so that a configuration can be written for a newer plugin. A known
/// key of the wrong type is an error, because its default would hide the mistake.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `cniVersion`.
    pub version: SpecVersion,
    /// `agentSocket`.
    pub agent_socket: PathBuf,
    /// `timeoutSeconds`.
    pub timeout: Duration,
    /// `excludeNamespaces`.
    pub exclude_namespaces: Vec<String>,
    /// `prevResult`, as it came.
    pub prev_result: Option<Value>,
    /// `cni.dev/valid-attachments`; `None` if the key is missing.
    pub valid_attachments: Option<Vec<Attachment>>,
}

/// An element of `cni.dev/valid-attachments`.
#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

impl Config {
    /// Parses the configuration. Checks the version first, because other versions may have another format.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let mut keys: Map<String, Value> = serde_json::from_slice(json).map_err(Error::Decode)?;
        let found: Option<String> = optional(&keys, "cniVersion")?;
        let Some(version) = found.as_deref().and_then(SpecVersion::parse) else {
            return Err(Error::Version { found });
        };
        optional::<String>(&keys, "name")?;
        optional::<String>(&keys, "type")?;
        optional::<Map<String, Value>>(&keys, "runtimeConfig")?;
        Ok(Self {
            version,
            agent_socket: agent_socket(&keys)?,
            timeout: timeout(&keys)?,
            exclude_namespaces: optional(&keys, "excludeNamespaces")?
                .unwrap_or_else(|| vec!["kube-system".to_owned(), "ambient-redirect".to_owned()]),
            valid_attachments: valid_attachments(&keys)?,
            prev_result: prev_result(&mut keys)?,
        })
    }
}

fn agent_socket(keys: &Map<String, Value>) -> Result<PathBuf, Error> {
    let key = "agentSocket";
    let path = optional::<PathBuf>(keys, key)?.unwrap_or_else(|| DEFAULT_SOCKET.into());
    // The specification does not define the plugin's working directory.
    if path.is_absolute() { Ok(path) } else { Err(wrong(key, "must be an absolute path")) }
}

fn timeout(keys: &Map<String, Value>) -> Result<Duration, Error> {
    let key = "timeoutSeconds";
    match optional::<u64>(keys, key)?.unwrap_or(25) {
        seconds @ 1..=3600 => Ok(Duration::from_secs(seconds)),
        _ => Err(wrong(key, "must be from 1 to 3600")),
    }
}

/// Go runtimes write an empty list as `null`. A missing key is different: as an empty list, it would make the agent forget every
/// pod.
fn valid_attachments(keys: &Map<String, Value>) -> Result<Option<Vec<Attachment>>, Error> {
    if !keys.contains_key(VALID_ATTACHMENTS) {
        return Ok(None);
    }
    let valid: Vec<ValidAttachment> = optional(keys, VALID_ATTACHMENTS)?.unwrap_or_default();
    let attachment = |a: ValidAttachment| Attachment { container_id: a.container_id, interface: a.ifname };
    Ok(Some(valid.into_iter().map(attachment).collect()))
}

fn prev_result(keys: &mut Map<String, Value>) -> Result<Option<Value>, Error> {
    let key = "prevResult";
    match keys.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(result @ Value::Object(_)) => Ok(Some(result)),
        Some(_) => Err(wrong(key, "must be an object")),
    }
}

/// A key's value; `null` counts as missing.
fn optional<T: DeserializeOwned>(keys: &Map<String, Value>, key: &str) -> Result<Option<T>, Error> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            T::deserialize(value).map(Some).map_err(|error| wrong(key, format!("is wrong: {error}")))
        }
    }
}

/// The error for an invalid key.
pub(super) fn wrong(key: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Config { key: key.into(), problem: problem.into() }
}

impl Config {
    /// The attachments that `GC` keeps.
    pub(super) fn require_valid_attachments(&self) -> Result<Vec<Attachment>, Error> {
        self.valid_attachments.clone().ok_or_else(|| wrong(VALID_ATTACHMENTS, "is missing; GC needs it"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<Config, Error> {
        Config::parse(value.to_string().as_bytes())
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = parse(&json!({ "cniVersion": "1.0.0", "someday": { "new": true } })).unwrap();
        assert_eq!(
            config,
            Config {
                version: SpecVersion::V1_0_0,
                agent_socket: "/run/ambient-redirect/agent.sock".into(),
                timeout: Duration::from_secs(25),
                exclude_namespaces: vec!["kube-system".into(), "ambient-redirect".into()],
                prev_result: None,
                valid_attachments: None,
            }
        );
    }

    #[test]
    fn versions_that_are_missing_or_unknown_are_named() {
        for (config, named) in [(json!({}), "0.1.0"), (json!({ "cniVersion": "0.2.0" }), "0.2.0")] {
            let error = parse(&config).unwrap_err();
            assert_eq!(error.code(), 1);
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn wrong_types_and_values_name_their_key() {
        for (key, value) in [
            ("cniVersion", json!(1)),
            ("name", json!(1)),
            ("type", json!([])),
            ("runtimeConfig", json!("x")),
            ("agentSocket", json!(7)),
            ("agentSocket", json!("")),
            ("agentSocket", json!("relative.sock")),
            ("timeoutSeconds", json!("25")),
            ("timeoutSeconds", json!(0)),
            ("timeoutSeconds", json!(-1)),
            ("timeoutSeconds", json!(1.5)),
            ("timeoutSeconds", json!(u64::MAX)),
            ("excludeNamespaces", json!("kube-system")),
            ("excludeNamespaces", json!([1])),
            ("prevResult", json!("result")),
            (VALID_ATTACHMENTS, json!([{ "containerID": "c" }])),
        ] {
            let mut config = json!({ "cniVersion": "1.1.0" });
            config[key] = value;
            let error = parse(&config).unwrap_err();
            assert_eq!(error.code(), 7, "{config}");
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn no_attachments_differ_from_no_list() {
        let config =
            |value: Value| parse(&json!({ "cniVersion": "1.1.0", VALID_ATTACHMENTS: value })).unwrap();
        assert_eq!(config(json!(null)).valid_attachments, Some(Vec::new()));
        assert_eq!(config(json!([])).valid_attachments, Some(Vec::new()));
        let valid = config(json!([{ "containerID": "c1", "ifname": "eth0" }])).valid_attachments;
        assert_eq!(valid, Some(vec![Attachment { container_id: "c1".into(), interface: "eth0".into() }]));
        assert_eq!(
            parse(&json!({ "cniVersion": "1.1.0" })).unwrap().require_valid_attachments().unwrap_err().code(),
            7
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Config::parse(&bytes);
        }

        #[test]
        fn almost_right_configurations_do_no_harm(text in r#"[{}\[\]":,0-9a-z ]{0,60}"#) {
            let _ = Config::parse(format!(r#"{{"cniVersion":"1.1.0",{text}}}"#).as_bytes());
            let _ = Config::parse(format!(r#"{{"cniVersion":"1.1.0","prevResult":{{"ips":{text}}}}}"#).as_bytes());
        }
    }
}
