//! Maintains the kernel side's map of proxy cgroups.

use std::collections::BTreeMap;

use anyhow::Context as _;
use redirect_ebpf::maps::ProxyPart;
use tokio::sync::Mutex;

use super::checkpoints::Checkpoints;
use super::peer_auth;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::{Linux, ProxyIdentity};
use redirect_zds::server::Peer;

/// The cgroups of the proxies that have connected so far.
pub(super) struct Cgroups {
    identity: ProxyIdentity,
    /// Newest first. Locked until file and map are written: two proxies that connect at once must not leave different lists.
    known: Mutex<Vec<u64>>,
    checkpoints: Checkpoints,
}

impl Cgroups {
    /// Begins with the previous agent's proxies, which may still be running.
    pub(super) fn new(identity: ProxyIdentity, checkpoints: Checkpoints) -> Self {
        let known = if identity == ProxyIdentity::Mark { Vec::new() } else { checkpoints.proxies() };
        Self { identity, known: known.into(), checkpoints }
    }

    pub(super) async fn known(&self) -> BTreeMap<u64, ProxyPart> {
        whole(&self.known.lock().await)
    }

    /// Admits a proxy, before any pod is sent to it.
    pub(super) async fn admit(&self, kernel: &DatapathHandle<Linux>, peer: Peer) -> anyhow::Result<()> {
        peer_auth::check(kernel, &peer.process).await?;
        if self.identity == ProxyIdentity::Mark {
            return Ok(());
        }
        let cgroup = peer.cgroup_id.with_context(|| {
            format!(
                "{peer} has no cgroup of its own, so that its sockets can't be told from those of other processes: run it in one, \
                 as a service or in a container, or the agent with --proxy-identity mark, where any process with CAP_NET_RAW in \
                 a pod can pass for the proxy"
            )
        })?;
        let mut known = self.known.lock().await;
        let wanted = with(&known, cgroup);
        let cgroups = whole(&wanted);
        // The map comes before the file, so that every cgroup in the file has been in force.
        kernel.run(move |linux| linux.set_proxy_cgroups(&cgroups)).await??;
        let (checkpoints, written) = (self.checkpoints.clone(), wanted.clone());
        tokio::task::spawn_blocking(move || checkpoints.set_proxies(&written)).await?;
        *known = wanted;
        Ok(())
    }
}

/// Newest first. Those of earlier proxies stay: they may still be draining, or come back.
fn with(known: &[u64], cgroup: u64) -> Vec<u64> {
    const MOST: usize = redirect_ebpf::constants::MAX_PROXY_CGROUPS as usize / 2;
    let earlier = known.iter().copied().filter(|earlier| *earlier != cgroup);
    [cgroup].into_iter().chain(earlier).take(MOST).collect()
}

/// The cgroups of whole proxies.
fn whole(cgroups: &[u64]) -> BTreeMap<u64, ProxyPart> {
    cgroups.iter().map(|cgroup| (*cgroup, ProxyPart::IN_PODS)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cgroups_are_kept() {
        let mut known = with(&[], 5);
        assert_eq!(known, [5]);
        known = with(&known, 6);
        assert_eq!(known, [6, 5]);
        known = with(&known, 5);
        assert_eq!(known, [5, 6]);
        for cgroup in 10..40 {
            known = with(&known, cgroup);
            assert_eq!(known.first(), Some(&cgroup));
            assert!(known.len() <= 8);
        }
    }
}
