//! Settings.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::labels::{EnableLabel, Rules};

/// How the agent works with Kubernetes.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Kubernetes")]
#[group(id = "kubernetes-options")]
pub struct Options {
    /// Enrol the pods of this node that Kubernetes wants enrolled; without it, all that the CNI plugin brings
    #[arg(long, env = "REDIRECT_KUBERNETES", requires = "node_name")]
    pub kubernetes: bool,
    /// The node's name in Kubernetes
    #[arg(long, env = "NODE_NAME")]
    pub node_name: Option<String>,
    /// How to reach the API server; by default KUBECONFIG, ~/.kube/config, then the pod's service account
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespaces whose pods are never enrolled, and nothing in which is touched; by default kube-system and the
    /// agent's own
    #[arg(long, value_delimiter = ',')]
    pub exclude_namespaces: Option<Vec<String>>,
    /// The agent's own namespace
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: Option<String>,
    /// The agent's own DaemonSet: when it is deleted, the agent takes the CNI plugin out of the chain as it ends
    #[arg(long, env = "DAEMONSET_NAME", requires = "pod_namespace")]
    pub daemonset: Option<String>,
    /// The label that enrols a pod, or all pods of a namespace; with the value "none" it keeps a pod out
    #[arg(long, default_value_t)]
    pub enable_label: EnableLabel,
    /// Honour the annotations of Istio's sidecars that exclude networks and ports (traffic.sidecar.istio.io/exclude…)
    #[arg(long)]
    pub istio_exclusions: bool,
    /// The host's /proc
    #[arg(long, default_value = "/proc")]
    pub host_proc: PathBuf,
    /// How long node proxies that connect wait for the API server's first answer, in seconds; 0: for as long as it takes
    #[arg(long, default_value_t = 10)]
    pub initial_wait: u64,
}

impl Options {
    /// The rules that these settings make.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let excluded = match &self.exclude_namespaces {
            Some(namespaces) => namespaces.iter().filter(|name| !name.is_empty()).cloned().collect(),
            None => {
                let own = self.pod_namespace.clone();
                std::iter::once("kube-system".to_owned()).chain(own).collect::<BTreeSet<_>>()
            }
        };
        Rules { enable_label: self.enable_label.clone(), excluded, istio_exclusions: self.istio_exclusions }
    }
}
