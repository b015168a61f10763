//! Settings.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::PLUGIN;
use redirect_protocol::wire;

/// Where the node's CNI chain is, as this process sees it.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "CNI chain")]
#[group(id = "chain-directories")]
pub struct Directories {
    /// Directory of the node's CNI configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    pub cni_conf_dir: PathBuf,
    /// Directory of the node's CNI plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    pub cni_bin_dir: PathBuf,
}

/// The node's CNI chain, and how the plugin is put into it. All paths but `cni_agent_socket` are as this process sees
/// them.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "CNI chain")]
#[group(id = "install-options")]
pub struct Options {
    /// Where it is.
    #[command(flatten)]
    pub directories: Directories,
    /// The configuration that gets the plugin; by default the first one, which is the one that container runtimes use
    #[arg(long, value_name = "FILE", conflicts_with = "cni_own_conf")]
    pub cni_conf_name: Option<String>,
    /// Leave the primary CNI's configuration alone: keep a copy of it, with the plugin, in 00-ambient-redirect.conflist
    #[arg(long)]
    pub cni_own_conf: bool,
    /// The plugin to install; by default redirect-cni beside this program
    #[arg(long, value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,
    /// Where the plugin finds the agent
    #[arg(long, default_value = wire::DEFAULT_SOCKET, value_name = "FILE")]
    pub cni_agent_socket: PathBuf,
    /// How long the plugin waits for the agent, in seconds; 25 by default
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    pub cni_timeout: Option<u64>,
    /// Namespaces whose pods start without the agent; kube-system and ambient-redirect by default
    #[arg(long, value_delimiter = ',', value_name = "NAMESPACES")]
    pub cni_exclude_namespaces: Option<Vec<String>>,
}

/// Put the CNI plugin into this node's chain
#[derive(Clone, Debug, clap::Args)]
pub struct Install {
    /// Stay, and repair the chain when another process changes it
    #[arg(long, conflicts_with_all = ["remove", "check"])]
    pub watch: bool,
    /// Take the plugin out of every configuration, and remove it
    #[arg(long, conflicts_with = "check")]
    pub remove: bool,
    /// Change nothing; fail if anything is not in place
    #[arg(long)]
    pub check: bool,
    /// Where and how. Last: what comes after it would be under its heading.
    #[command(flatten)]
    pub options: Options,
}

impl Directories {
    /// Where the plugin is put.
    pub(super) fn installed_plugin(&self) -> PathBuf {
        self.cni_bin_dir.join(PLUGIN)
    }
}

impl Options {
    /// How long the agent is waited for before a configuration names the plugin.
    pub(super) const PATIENCE: Duration = Duration::from_secs(5);

    /// Our object in the list of plugins.
    pub(super) fn entry(&self) -> Map<String, Value> {
        let mut entry = Map::new();
        entry.insert("type".into(), PLUGIN.into());
        entry.insert("agentSocket".into(), json!(self.cni_agent_socket));
        if let Some(seconds) = self.cni_timeout {
            entry.insert("timeoutSeconds".into(), seconds.into());
        }
        if let Some(namespaces) = &self.cni_exclude_namespaces {
            entry.insert("excludeNamespaces".into(), json!(namespaces));
        }
        entry
    }
}
