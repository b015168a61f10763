//! Keeps the kernel side's map of proxy cgroups.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redirect_ebpf::maps::ProxyPart;

use super::peer_auth;
use super::records::Records;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_zds::server::Peer;

/// How the proxy's own sockets are recognized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProxyIdentity {
    /// By mark and by the cgroup of the process, if the connected proxies have cgroups of their own.
    #[default]
    Cgroup,
    /// By mark only: any process with CAP_NET_ADMIN in a pod can impersonate the proxy.
    Mark,
}

/// The cgroups of the proxies that have connected so far.
pub(super) struct Cgroups {
    identity: ProxyIdentity,
    known: Mutex<Vec<u64>>,
    records: Records,
}

impl Cgroups {
    /// Those that the agent before knew are known: their proxies are still at work.
    pub(super) fn new(identity: ProxyIdentity, records: Records) -> Self {
        let known = if identity == ProxyIdentity::Mark { Vec::new() } else { records.proxies() };
        Self { identity, known: known.into(), records }
    }

    pub(super) fn known(&self) -> BTreeMap<u64, ProxyPart> {
        whole(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a proxy, before it is told any pod.
    pub(super) async fn admit(&self, kernel: &DatapathHandle<Linux>, peer: Peer) -> anyhow::Result<()> {
        peer_auth::check(kernel, peer.pid).await?;
        if self.identity == ProxyIdentity::Mark {
            return Ok(());
        }
        let cgroups = self.with(&peer);
        if cgroups.is_empty() {
            tracing::warn!(
                %peer,
                "node proxy has no cgroup of its own: its sockets are identified by their mark only, which \
                 any process with CAP_NET_ADMIN in a pod can set"
            );
        }
        self.records.set_proxies(&cgroups);
        let cgroups = whole(&cgroups);
        kernel.run(move |linux| linux.set_proxy_cgroups(&cgroups)).await?
    }

    /// Those of earlier proxies stay: they may still be draining, or come back.
    fn with(&self, peer: &Peer) -> Vec<u64> {
        const MOST: usize = redirect_ebpf::constants::MAX_PROXY_CGROUPS as usize / 2;
        let mut known = self.lock();
        match peer.cgroup_id {
            Some(cgroup) => {
                known.retain(|earlier| *earlier != cgroup);
                known.insert(0, cgroup);
                known.truncate(MOST);
            }
            None => known.clear(),
        }
        known.clone()
    }
}

/// Those of whole proxies.
fn whole(cgroups: &[u64]) -> BTreeMap<u64, ProxyPart> {
    cgroups.iter().map(|cgroup| (*cgroup, ProxyPart::ALL)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(cgroup_id: Option<u64>) -> Peer {
        Peer { id: 1, pid: Some(1), cgroup_path: None, cgroup_id }
    }

    #[test]
    fn the_newest_cgroups_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::new(ProxyIdentity::Cgroup, Records::at(directory.path()));
        assert_eq!(cgroups.with(&peer(Some(5))), [5]);
        assert_eq!(cgroups.with(&peer(Some(6))), [6, 5]);
        assert_eq!(cgroups.with(&peer(Some(5))), [5, 6]);
        for cgroup in 10..40 {
            assert!(cgroups.with(&peer(Some(cgroup))).len() <= 8);
        }
        assert!(
            cgroups.with(&peer(None)).is_empty(),
            "one proxy without a cgroup, and only the mark is left"
        );
    }
}
