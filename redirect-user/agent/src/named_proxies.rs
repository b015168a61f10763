//! The node proxies of placement `node`, identified by the cgroups in the agent's options.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_ebpf::maps::ProxyPart;
use redirect_linux::cgroup;

use super::cgroup_watch::CgroupWatch;

/// The configured cgroups, and the part of the proxy in each.
#[derive(Clone, Debug)]
pub(super) struct NamedProxies(BTreeMap<PathBuf, ProxyPart>);

/// The cgroups by their IDs, as the kernel side knows them.
pub(super) type Numbers = BTreeMap<u64, ProxyPart>;

/// How often to search for the cgroups if inotify reports nothing.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

impl NamedProxies {
    /// From the arguments of `--proxy-cgroup` and `--outbound-proxy-cgroup`.
    pub(super) fn new(all: &[PathBuf], outbound: &[PathBuf]) -> anyhow::Result<Self> {
        let rest = if outbound.is_empty() { ProxyPart::ALL } else { ProxyPart::INBOUND };
        let mut named: BTreeMap<_, _> = all.iter().map(|directory| (directory.clone(), rest)).collect();
        for directory in outbound {
            if named.insert(directory.clone(), ProxyPart::OUTBOUND) == Some(rest) {
                bail!(
                    "--outbound-proxy-cgroup {}: it is named with --proxy-cgroup as well",
                    directory.display()
                );
            }
        }
        Ok(Self(named))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The existing cgroups; all of them have to exist.
    pub(super) fn all(&self) -> anyhow::Result<Numbers> {
        let number = |directory: &Path| {
            cgroup::id(directory).with_context(|| format!("cgroup {} of the node proxy", directory.display()))
        };
        self.0.iter().map(|(directory, part)| Ok((number(directory)?, *part))).collect()
    }

    /// Keeps the kernel side's IDs up to date, forever. A cgroup's ID stays known until another cgroup takes its place: sockets
    /// may outlive it.
    pub(super) async fn follow(self, kernel: DatapathHandle<Linux>) -> anyhow::Result<()> {
        let places: BTreeSet<PathBuf> = self.0.keys().cloned().collect();
        let mut known: BTreeMap<PathBuf, u64> = BTreeMap::new();
        loop {
            // Starts before the search, so that no change is missed.
            let watch = CgroupWatch::new(&places);
            let mut found = known.clone();
            found.extend(places.iter().filter_map(|place| Some((place.clone(), cgroup::id(place).ok()?))));
            if found != known && found.len() == places.len() {
                let numbers = found.iter().map(|(place, number)| (*number, self.0[place])).collect();
                kernel.run(move |linux| linux.set_proxy_cgroups(&numbers)).await??;
                known = found;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = watch.changed() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_one_part() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let named = NamedProxies::new(&paths(&["/a"]), &[]).unwrap();
        assert_eq!(named.0, [("/a".into(), ProxyPart::ALL)].into());
        let named = NamedProxies::new(&paths(&["/a"]), &paths(&["/b"])).unwrap();
        assert_eq!(named.0, [("/a".into(), ProxyPart::INBOUND), ("/b".into(), ProxyPart::OUTBOUND)].into());
        let error = NamedProxies::new(&paths(&["/a"]), &paths(&["/a"])).unwrap_err();
        assert!(error.to_string().contains("--outbound-proxy-cgroup /a"), "{error}");
    }

    #[test]
    fn a_missing_cgroup_is_named() {
        let named = NamedProxies::new(&[PathBuf::from("/no/such/cgroup")], &[]).unwrap();
        assert!(named.all().unwrap_err().to_string().contains("/no/such/cgroup"));
    }
}
