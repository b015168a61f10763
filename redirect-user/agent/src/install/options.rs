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
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIRECTORY")]
    pub cni_conf_dir: PathBuf,
    /// Directory of the node's CNI plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIRECTORY")]
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
    /// CNI configuration to add the plugin to (default: the first one, which container runtimes use)
    #[arg(long, value_name = "FILE", conflicts_with = "cni_own_conf")]
    pub cni_conf_name: Option<String>,
    /// Don't change the primary CNI's configuration: maintain a copy of it with the plugin, 00-ambient-redirect.conflist
    #[arg(long)]
    pub cni_own_conf: bool,
    /// Plugin to install (default: redirect-cni next to this program)
    #[arg(long, value_name = "FILE")]
    pub cni_plugin: Option<PathBuf>,
    /// Agent socket that the plugin connects to
    #[arg(long, default_value = wire::DEFAULT_SOCKET, value_name = "FILE")]
    pub cni_agent_socket: PathBuf,
    /// How long the plugin waits for the agent, in seconds (default: 25)
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    pub cni_timeout: Option<u64>,
    /// Namespaces whose pods may start without the agent (default: kube-system,ambient-redirect)
    #[arg(long, value_delimiter = ',', value_name = "NAMESPACES")]
    pub cni_exclude_namespaces: Option<Vec<String>>,
}

/// Add the CNI plugin to this node's chain
#[derive(Clone, Debug, clap::Args)]
pub struct Install {
    /// Keep running, and repair the chain when another process changes it
    #[arg(long, conflicts_with_all = ["remove", "check"])]
    pub watch: bool,
    /// Remove the plugin from every configuration, then its binary
    #[arg(long, conflicts_with = "check")]
    pub remove: bool,
    /// Change nothing; exit with 1 if anything is missing
    #[arg(long)]
    pub check: bool,
    /// Where and how. Last: what comes after it would be under its heading.
    #[command(flatten)]
    pub options: Options,
}

impl Directories {
    /// The path of the installed plugin.
    pub(super) fn installed_plugin(&self) -> PathBuf {
        self.cni_bin_dir.join(PLUGIN)
    }
}

impl Options {
    /// How long to wait for the agent before a configuration names the plugin.
    pub(super) const PATIENCE: Duration = Duration::from_secs(5);

    /// Our entry in the list of plugins.
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
