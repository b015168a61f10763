//! Placement `node`: the node proxy does not connect to the agent. While the proxy's listeners are open, the agent
//! acknowledges every pod on the proxy's behalf.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use tokio::time::sleep;

use redirect_datapath::listeners;
use redirect_linux::netns::NetNs;
use redirect_protocol::wire::Transport;
use redirect_zds::client::{Backoff, Workloads, follow};
use redirect_zds::messages::WorkloadInfo;
use redirect_zds::server::Peer;

/// How often to check the listeners.
const PAUSE: Duration = Duration::from_millis(250);

/// Runs forever.
pub(super) async fn acknowledge(zds_socket: PathBuf) -> anyhow::Result<()> {
    loop {
        until(true).await;
        tracing::info!("node proxy listens on ports {PORT_OUTBOUND} and {PORT_INBOUND} of the host");
        let mut served = Served;
        tokio::select! {
            () = follow(&zds_socket, &mut served, Backoff::default()) => {}
            () = until(false) => {}
        }
        tracing::warn!(
            "no node proxy listens on ports {PORT_OUTBOUND} and {PORT_INBOUND} of the host: connections of \
             pods wait, or are refused, until one does"
        );
    }
}

/// Admits only the agent itself.
pub(super) fn admit(peer: &Peer) -> anyhow::Result<()> {
    anyhow::ensure!(
        peer.process.pid().cast_unsigned() == std::process::id(),
        "{peer}: in placement `node` the agent announces no pods: run the proxy with --placement node too, \
         or the agent with --placement pod"
    );
    Ok(())
}

/// Serving a pod needs no action.
struct Served;

impl Workloads for Served {
    async fn add(&mut self, _: String, _: WorkloadInfo, _: NetNs) -> Result<(), String> {
        Ok(())
    }

    async fn remove(&mut self, _: &str) {}

    async fn retain(&mut self, _: &BTreeSet<String>) {}
}

async fn until(wanted: bool) {
    loop {
        // A node with many connections has long tables.
        match tokio::task::spawn_blocking(listens).await.unwrap_or_else(|error| Err(io::Error::other(error)))
        {
            Ok(found) if found == wanted => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot find out whether a node proxy listens"),
        }
        sleep(PAUSE).await;
    }
}

fn listens() -> io::Result<bool> {
    let mut ports = BTreeSet::new();
    for family in Family::ALL {
        ports.extend(listeners::bound(Transport::Tcp, family)?.into_iter().map(|bound| bound.port));
    }
    Ok([PORT_OUTBOUND, PORT_INBOUND].iter().all(|port| ports.contains(port)))
}
