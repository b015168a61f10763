//! Settings.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::labels::{EnableLabel, Rules};

/// How the agent works with Kubernetes.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Kubernetes")]
#[group(id = "kubernetes-options")]
pub struct Options {
    /// Enroll pods of this node by their Kubernetes labels; otherwise, every pod that the CNI plugin adds
    #[arg(long, env = "REDIRECT_KUBERNETES", requires = "node_name")]
    pub kubernetes: bool,
    /// Name of this node in Kubernetes
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Kubeconfig for the API server (default: KUBECONFIG, ~/.kube/config, then the pod's service account)
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespaces whose pods are never enrolled or changed (default: kube-system and the agent's own)
    #[arg(long, value_delimiter = ',', value_name = "NAMESPACES")]
    pub exclude_namespaces: Option<Vec<String>>,
    /// Namespace of the agent's pod
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME")]
    pub pod_namespace: Option<String>,
    /// DaemonSet of the agent: if it is deleted, the agent removes the CNI plugin from the chain when it stops
    #[arg(long, env = "DAEMONSET_NAME", requires = "pod_namespace", value_name = "NAME")]
    pub daemonset: Option<String>,
    /// Label that enrolls a pod, or all pods of a namespace; the value "none" opts a pod out
    #[arg(long, default_value_t, value_name = "KEY=VALUE")]
    pub enable_label: EnableLabel,
    /// Honor the annotations of Istio's sidecars that exclude networks and ports (traffic.sidecar.istio.io/exclude…)
    #[arg(long)]
    pub istio_exclusions: bool,
    /// How long connections that the node proxy has may go on when a running pod is un-enrolled, in seconds; new ones go directly at
    /// once. A pod overrides it by the annotation ambient-redirect.io/unenroll-grace
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub unenroll_grace: u32,
    /// Path of the host's /proc
    #[arg(long, default_value = "/proc", value_name = "DIRECTORY")]
    pub host_proc: PathBuf,
    /// How long node proxies wait for the API server's first pod list if there are no checkpoints, or network namespaces are enrolled
    /// without one, in seconds; 0 waits indefinitely
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
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
        Rules {
            enable_label: self.enable_label.clone(),
            excluded,
            istio_exclusions: self.istio_exclusions,
            unenroll_grace: Duration::from_secs(self.unenroll_grace.into()),
        }
    }
}
