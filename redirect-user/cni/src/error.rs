//! Errors, and how they are reported to the container runtime.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::MAX_STDIN;
use super::version::SpecVersion;
use redirect_protocol::wire::{self, ErrorKind, client};

/// Why a command failed. Printed as the specification's JSON object, with exit status 1.
///
/// | code | meaning |
/// |---|---|
/// | 1 | `cniVersion` is missing or not supported, or has no such command |
/// | 3 | the agent does not know the container (`CHECK`) |
/// | 4 | an environment variable is missing or wrong; the message names it |
/// | 5 | standard input or the network namespace cannot be read, or the note of an earlier deletion cannot be removed |
/// | 6 | the configuration is not a JSON object, or larger than 16 MiB |
/// | 7 | a key of the configuration is wrong; the message names it |
/// | 11 | the agent cannot be reached, did not answer in time or is not ready: try again later |
/// | 50 | `STATUS`: `ADD` would not be served |
/// | 51 | `STATUS`: as 50, and captured pods may be cut off, too |
/// | 100 | plugin and agent are of different releases |
/// | 101 | the kernel is not as `ADD` left it (`CHECK`) |
/// | 102 | the kernel refused, or a map is full |
/// | 103 | the node proxy refused the pod |
/// | 104 | the agent failed in another way |
/// | 105 | the agent refuses requests of this user |
///
/// Codes from 100 on are this plugin's own.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration's version is unknown.
    #[error("cniVersion {} is not supported; supported versions: {}", found.as_deref().unwrap_or("0.1.0 (none is given)"), supported())]
    Version {
        /// The configuration's version.
        found: Option<String>,
    },
    /// The command is younger than the configuration's version.
    #[error("{command} needs cniVersion {since} or later; the configuration has {version}")]
    CommandVersion {
        /// The command.
        command: &'static str,
        /// The version that introduced it.
        since: SpecVersion,
        /// The configuration's version.
        version: SpecVersion,
    },
    /// Environment variables are missing or wrong.
    #[error("the environment violates the CNI specification: {problems}")]
    Environment {
        /// The variables with their problems.
        problems: String,
    },
    /// The configuration cannot be read.
    #[error("cannot read the network configuration from standard input")]
    Stdin(#[source] io::Error),
    /// The configuration is too large.
    #[error("the network configuration is larger than {MAX_STDIN} bytes")]
    StdinTooLarge,
    /// The configuration is not JSON.
    #[error("the network configuration is not a JSON object")]
    Decode(#[source] serde_json::Error),
    /// A key of the configuration is wrong.
    #[error("{key:?} of the network configuration {problem}")]
    Config {
        /// A key, or a path into `prevResult`.
        key: String,
        /// The problem.
        problem: String,
    },
    /// There is no `prevResult`.
    #[error(
        "the configuration has no prevResult: ambient-redirect must be chained after a plugin that sets addresses"
    )]
    NotChained,
    /// `prevResult` has no address inside the pod.
    #[error(
        "prevResult has neither an IPv4 nor an IPv6 address inside the pod: \
         ambient-redirect must be chained after a plugin that sets addresses"
    )]
    NoAddresses,
    /// `CNI_NETNS` is not a network namespace.
    #[error("CNI_NETNS {} {problem}", path.display())]
    Namespace {
        /// The variable's value.
        path: PathBuf,
        /// The problem.
        problem: &'static str,
    },
    /// `CNI_NETNS` cannot be opened.
    #[error("cannot open the network namespace CNI_NETNS {}", path.display())]
    NamespaceIo {
        /// The variable's value.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The note of an earlier `DEL` of this container cannot be removed.
    #[error(
        "the note that this container was deleted cannot be removed beside {}: the next agent would un-enroll the pod",
        socket.display()
    )]
    Note {
        /// The agent's socket.
        socket: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The agent did not answer, or reported a failure.
    #[error(transparent)]
    Agent(#[from] client::Error),
    /// The agent is not there or not ready (`STATUS`).
    #[error("pods cannot be added: {0}")]
    NotReady(client::Error),
}

fn supported() -> String {
    SpecVersion::ALL.map(SpecVersion::as_str).join(" ")
}

impl Error {
    /// The code that the runtime sees.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } | Self::CommandVersion { .. } => 1,
            Self::Environment { .. } | Self::Namespace { .. } => 4,
            Self::Stdin(_) | Self::NamespaceIo { .. } | Self::Note { .. } => 5,
            Self::StdinTooLarge | Self::Decode(_) => 6,
            Self::Config { .. } | Self::NotChained | Self::NoAddresses => 7,
            Self::Agent(error) => agent_code(error),
            Self::NotReady(error) => match error {
                client::Error::Refused(wire::Error {
                    kind: ErrorKind::Datapath | ErrorKind::Proxy, ..
                }) => 51,
                _ => 50,
            },
        }
    }

    /// The messages of the kernel or the JSON parser, for `details`.
    fn causes(&self) -> String {
        let first = match self {
            Self::NotReady(error) => error.source(),
            other => other.source(),
        };
        let causes = std::iter::successors(first, |&cause| cause.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}

fn agent_code(error: &client::Error) -> u32 {
    match error {
        client::Error::Unreachable { .. } | client::Error::Closed { .. } | client::Error::TimedOut { .. } => {
            11
        }
        client::Error::Version { .. } => 100,
        client::Error::TooLarge { .. }
        | client::Error::Malformed { .. }
        | client::Error::Unexpected { .. }
        | client::Error::Io { .. } => 104,
        client::Error::Refused(error) => match error.kind {
            ErrorKind::Unknown => 3,
            ErrorKind::TryAgain => 11,
            ErrorKind::Version => 100,
            ErrorKind::Mismatch => 101,
            ErrorKind::Datapath => 102,
            ErrorKind::Proxy => 103,
            ErrorKind::Malformed | ErrorKind::Internal => 104,
            ErrorKind::Denied => 105,
        },
    }
}

/// An error, with the pod that it concerns.
#[derive(Debug)]
pub(super) struct Failure {
    pod: Option<String>,
    error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { pod: None, error }
    }
}

impl Failure {
    pub(super) fn of_pod(pod: Option<String>, error: Error) -> Self {
        Self { pod, error }
    }

    /// The specification's error object.
    pub(super) fn report(&self, version: SpecVersion) -> Value {
        let message = self.error.to_string();
        let message = match &self.pod {
            // The agent's messages should name the pod, but the plugin does not rely on it.
            Some(pod) if !message.contains(pod.as_str()) => format!("pod {pod}: {message}"),
            _ => message,
        };
        let mut report = json!({
            "cniVersion": version.as_str(),
            "code": self.error.code(),
            "msg": format!("ambient-redirect: {message}"),
        });
        let details = self.error.causes();
        if !details.is_empty() {
            report["details"] = details.into();
        }
        report
    }
}
