//! Placement `node`: the node proxy is not connected to the agent, and need not know that there is one. The agent itself
//! stands in for it: as long as the proxy's listeners are there, it acknowledges every pod in the proxy's name.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::time::Duration;

use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use tokio::time::sleep;

use crate::netns::NetNs;
use crate::zds::client::{Backoff, Workloads, follow};
use crate::zds::messages::WorkloadInfo;
use crate::zds::server::Peer;

/// How often it is looked for the listeners.
const PAUSE: Duration = Duration::from_millis(250);

/// Works for ever.
pub(super) async fn stand_in(zds_socket: &Path) {
    loop {
        until(true).await;
        tracing::info!("a node proxy listens on ports {PORT_OUTBOUND} and {PORT_INBOUND} of the host");
        let mut served = Served;
        tokio::select! {
            () = follow(zds_socket, &mut served, Backoff::default()) => {}
            () = until(false) => {}
        }
        tracing::warn!(
            "no node proxy listens on ports {PORT_OUTBOUND} and {PORT_INBOUND} of the host: connections of pods wait, or \
             are refused, until one does"
        );
    }
}

/// Admits nobody but the agent itself.
pub(super) fn admit(peer: &Peer) -> anyhow::Result<()> {
    anyhow::ensure!(
        peer.pid.is_some_and(|pid| pid.cast_unsigned() == std::process::id()),
        "{peer}: in placement `node` the agent hands pods to nobody: run the proxy in that placement too, or the agent \
         with --placement pod"
    );
    Ok(())
}

/// Nothing is to be done for a pod.
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
        match listens() {
            Ok(found) if found == wanted => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "it can't be told whether a node proxy listens"),
        }
        sleep(PAUSE).await;
    }
}

fn listens() -> io::Result<bool> {
    let mut ports = BTreeSet::new();
    for path in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match File::open(path) {
            Ok(file) => ports.extend(listening(BufReader::new(file).lines().map_while(Result::ok))),
            // Without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok([PORT_OUTBOUND, PORT_INBOUND].iter().all(|port| ports.contains(port)))
}

/// The ports of the listeners in a table of sockets, which has them first.
fn listening(lines: impl Iterator<Item = String>) -> impl Iterator<Item = u16> {
    const LISTEN: &str = "0A";
    lines.skip(1).map_while(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        let (_, port) = local.rsplit_once(':')?;
        (state == LISTEN).then(|| u16::from_str_radix(port, 16).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_the_first_in_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                        0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1\n\
                        1: 0100007F:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2\n\
                        2: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 3\n";
        let ports: Vec<_> = listening(table.lines().map(str::to_owned)).collect();
        assert_eq!(ports, [PORT_OUTBOUND, PORT_INBOUND]);
    }
}
