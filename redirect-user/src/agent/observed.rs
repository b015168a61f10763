//! What Prometheus and the kubelet hear of the agent.

use std::time::Duration;

use tokio::time::timeout;

use super::service::Service;
use crate::install;
use crate::metrics::Snapshot;
use crate::metrics::server::{Check, Source};
use crate::placement::Placement;
use crate::wire::Reply;

/// How long the datapath's thread may take for a word. Enrolments are done in milliseconds; many may wait.
const PATIENCE: Duration = Duration::from_secs(5);

impl Source for Service {
    async fn snapshot(&self) -> Result<Snapshot, String> {
        let status = self.status().await.map_err(|error| error.message)?;
        let repairs = self.pods.repairs().counts().map(|(kind, count)| (kind.label(), count)).collect();
        Ok(Snapshot { status, pods: self.pods.report().await, repairs })
    }

    async fn health(&self) -> Vec<Check> {
        vec![("datapath", self.datapath().await)]
    }

    async fn readiness(&self) -> Vec<Check> {
        let proxy = match self.ready() {
            Reply::Error(error) => Err(error.message),
            _ => Ok(()),
        };
        let reconciled = if *self.reconciled.borrow() {
            Ok(())
        } else {
            Err("the API server has not told which pods run on this node".into())
        };
        vec![
            ("datapath", self.datapath().await),
            ("proxy", proxy),
            ("pods", reconciled),
            ("chain", self.chain().await),
        ]
    }
}

impl Service {
    /// Whether the plugin is in the node's CNI chain, if this agent keeps it there.
    async fn chain(&self) -> Result<(), String> {
        let Some(options) = self.chain.clone() else { return Ok(()) };
        match tokio::task::spawn_blocking(move || install::missing(&options)).await {
            Ok(Ok(missing)) if missing.is_empty() => Ok(()),
            Ok(Ok(missing)) => Err(format!("not in place: {}", missing.join(", "))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Whether the programs are attached and can be worked with.
    async fn datapath(&self) -> Result<(), String> {
        match timeout(PATIENCE, self.kernel.run(|linux| linux.report())).await {
            Ok(Ok(Ok(report))) => {
                let detached = |name: &&str| {
                    let found = report.programs.iter().find(|program| program.name == **name);
                    found.is_none_or(|program| program.links == 0)
                };
                let needed = match self.placement {
                    Placement::Pod => ["outbound_ipv4", "outbound_ipv6"],
                    Placement::Node => ["entrance_ipv4", "entrance_ipv6"],
                };
                match needed.iter().find(|name| detached(name)) {
                    Some(name) => Err(format!("program {name} is not attached")),
                    None => Ok(()),
                }
            }
            Ok(Ok(Err(error))) => Err(format!("the kernel can't be read: {error:#}")),
            Ok(Err(gone)) => Err(gone.to_string()),
            Err(_) => Err(format!("the datapath's thread does not answer within {PATIENCE:?}")),
        }
    }
}
