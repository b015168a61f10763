//! User space of ambient-redirect.
//!
//! - [`agent`]: the DaemonSet process. Loads the kernel side, keeps pods in step with it, serves the CNI plugin and
//!   the node proxy.
//! - [`cni`]: the CNI plugin (`redirect-cni`), synchronous and without a runtime.
//! - [`doctor`]: whether a node can run the data path.
//! - [`install`]: puts the plugin into the node's CNI chain (`redirect install`).
//! - [`kube`]: which pods Kubernetes wants enrolled.
//! - [`wire`]: what plugin, command line and agent say to each other.
//! - [`validate`]: proves from inside a pod that it is steered (`redirect validate`).
//! - [`zds`]: what agent and node proxy say to each other.
//! - [`metrics`]: what the agent tells Prometheus and the kubelet.
//! - [`privileges`]: what agent and proxy give up when they start.
//! - [`proxy`]: the embedded node proxy (`redirect proxy`).

pub mod agent;
pub mod cli;
pub mod doctor;
pub mod install;
pub mod kube;
pub mod metrics;
pub mod top;
pub mod validate;

pub use redirect_cni as cni;
pub use redirect_linux::{bpf, cgroup, descriptors, netns, privileges};
pub use redirect_protocol::{placement, pod, wire};
pub use redirect_proxy as proxy;
#[cfg(test)]
pub use redirect_testing as skip;
pub use redirect_zds as zds;
