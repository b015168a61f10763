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

/// Where metrics are served by default: every address, of both families. No port of Istio's, of ztunnel's or of ours.
pub const DEFAULT_ADDRESS: &str = "[::]:15091";

/// Where health and readiness are served by default: where only the node's own processes, such as the kubelet, reach it.
pub const DEFAULT_HEALTH_ADDRESS: &str = "127.0.0.1:15092";

/// Everything that is told, under the names that it is told by.
fn registry(snapshot: Snapshot) -> Registry {
    let mut registry = Registry::with_prefix("redirect");
    events::events().register(&mut registry);
    registry.register_collector(Box::new(snapshot));
    registry
}

#[cfg(test)]
mod tests;
