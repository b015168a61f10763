//! Why the plugin can't be added to the chain.

use std::io;
use std::path::{Path, PathBuf};

use super::OWN_CONF;
use redirect_cni::SpecVersion;
use redirect_protocol::wire::client;

/// Why the chain differs from the wanted one. It works without the plugin all the same.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file can't be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no chain yet.
    #[error("there is no CNI configuration in {}{}: has the primary CNI started on this node?", directory.display(), list(.invalid))]
    NoConfiguration {
        /// The directory.
        directory: PathBuf,
        /// The invalid files, with the reasons.
        invalid: Vec<String>,
    },
    /// The named configuration is missing or invalid.
    #[error("{name} is not a CNI configuration in {}{}", directory.display(), list(.invalid))]
    NoSuchConfiguration {
        /// Its name.
        name: String,
        /// The directory.
        directory: PathBuf,
        /// The invalid files, with the reasons.
        invalid: Vec<String>,
    },
    /// Another configuration sorts before ours.
    #[error(
        "{first} comes before {OWN_CONF}, so container runtimes would not use {OWN_CONF}: rename {first}"
    )]
    NotFirst {
        /// The other configuration.
        first: String,
    },
    /// Two configurations would get the same name.
    #[error(
        "both {conf} and {conflist} exist, and container runtimes use {conf}: remove the one that you \
         don't want"
    )]
    Ambiguous {
        /// The single configuration.
        conf: String,
        /// The list.
        conflist: String,
    },
    /// The plugin does not support the chain's version.
    #[error(
        "{file} has cniVersion {found}, the plugin supports {}: raise it in the primary CNI's configuration",
        SpecVersion::ALL.map(SpecVersion::as_str).join(" ")
    )]
    Version {
        /// The configuration.
        file: String,
        /// Its version.
        found: String,
    },
    /// The binary does not answer like a plugin.
    #[error("cannot chain the plugin {}: {problem}", path.display())]
    Plugin {
        /// The binary.
        path: PathBuf,
        /// Its behavior.
        problem: String,
    },
    /// Pods could not start with the plugin in the chain.
    #[error("cannot chain the plugin: {0}")]
    Agent(#[from] client::Error),
}

impl Error {
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.into(), source }
    }

    pub(super) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.into(), source }
    }
}

fn list(invalid: &[String]) -> String {
    if invalid.is_empty() { String::new() } else { format!(" ({})", invalid.join("; ")) }
}
