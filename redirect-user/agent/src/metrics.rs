//! Metrics, health and readiness: `/metrics`, `/healthz`, `/readyz`.
//!
//! Each scrape reads the kernel's counters (`snapshot`). Events in this process are counted where they happen ([`events`]).
//! There are no metrics per pod, so the number of series does not grow with the pods.

pub mod events;
pub(crate) mod server;
pub(crate) mod snapshot;
mod text;

pub(crate) use snapshot::Snapshot;

use prometheus_client::registry::Registry;

/// The default address for metrics: every address, of both families. The port is none of Istio's, ztunnel's or ours.
pub const DEFAULT_ADDRESS: &str = "[::]:15091";

/// The default address for health and readiness: reachable only by the node's own processes, such as the kubelet.
pub const DEFAULT_HEALTH_ADDRESS: &str = "127.0.0.1:15092";

/// Registers all metrics under their names.
fn registry(snapshot: Snapshot) -> Registry {
    let mut registry = Registry::with_prefix("redirect");
    events::events().register(&mut registry);
    registry.register_collector(Box::new(snapshot));
    registry
}

#[cfg(test)]
mod tests;
