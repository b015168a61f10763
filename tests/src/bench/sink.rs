//! A node proxy that answers for every destination itself: the cost of a connection to it is that of the
//! redirection plus the minimum for any proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use redirect_linux::netns::NetNs;
use redirect_zds::client::{Backoff, Workloads, follow};
use redirect_zds::messages::WorkloadInfo;

use super::listener::{Listener, Owner};
use super::place::Place;

/// The proxy acknowledges pods of this Kubernetes namespace without serving them: there are many, and they
/// only have to exist.
pub const CROWD: &str = "crowd";

/// Settings of the sink.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where pods come from.
    #[arg(long)]
    pub zds_socket: PathBuf,
    /// Acknowledges pods but serves none, to measure what enrollment costs without a proxy.
    #[arg(long)]
    pub acknowledge_only: bool,
    /// Where it runs.
    #[command(flatten)]
    pub place: Place,
}

/// Runs until a signal ends the process.
pub fn run(options: &Options) -> Result<()> {
    options.place.take()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let mut sink = Sink { acknowledge_only: options.acknowledge_only, pods: BTreeMap::new() };
    let runtime = runtime.context("cannot start the async runtime")?;
    runtime.block_on(follow(&options.zds_socket, &mut sink, Backoff::default()));
    Ok(())
}

struct Sink {
    acknowledge_only: bool,
    pods: BTreeMap<String, [Listener; 2]>,
}

impl Workloads for Sink {
    async fn add(&mut self, uid: String, info: WorkloadInfo, netns: NetNs) -> Result<(), String> {
        if self.acknowledge_only || info.namespace == CROWD || self.pods.contains_key(&uid) {
            return Ok(());
        }
        let open = || Ok([listen(PORT_OUTBOUND)?, listen(PORT_INBOUND)?]);
        let opened = netns.run(open).and_then(|opened: std::io::Result<_>| opened);
        self.pods.insert(uid, opened.map_err(|error| error.to_string())?);
        Ok(())
    }

    async fn remove(&mut self, uid: &str) {
        self.pods.remove(uid);
    }

    async fn retain(&mut self, uids: &BTreeSet<String>) {
        self.pods.retain(|uid, _| uids.contains(uid));
    }
}

fn listen(port: u16) -> std::io::Result<Listener> {
    Listener::start(port, Owner::Proxy)
}
