//! What the agent tells Prometheus and the kubelet: `/metrics`, `/healthz`, `/readyz`.
//!
//! What the kernel counts is read at each scrape (`snapshot`); what happens in this process is counted where it happens
//! ([`events`]). Nothing is counted per pod: the number of series does not grow with the pods.

pub mod events;
pub(crate) mod server;
pub(crate) mod snapshot;
mod text;

pub(crate) use snapshot::Snapshot;

use prometheus_client::registry::Registry;

/// Where metrics are served by default: every address, of both families. No port of Istio's, of ztunnel's or of ours.
pub const DEFAULT_ADDRESS: &str = "[::]:15091";

/// Everything that is told, under the names that it is told by.
fn registry(snapshot: Snapshot) -> Registry {
    let mut registry = Registry::with_prefix("redirect");
    events::events().register(&mut registry);
    registry.register_collector(Box::new(snapshot));
    registry
}

#[cfg(test)]
mod tests;
