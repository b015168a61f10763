//! Finds the kubelet's cgroups. Only connections from them reach applications without the proxy, as probes.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;

use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_linux::cgroup;

use super::cgroup_watch::CgroupWatch;

/// Who probes pods.
#[derive(Clone, Debug, clap::Args)]
pub struct Probers {
    /// Names of kubelet processes; connections to pods from anywhere in their cgroups count as probes
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME",
        default_value = "kubelet,k3s,k3s-server,rke2,kubelite"
    )]
    pub probe_processes: Vec<String>,
    /// Cgroups of kubelets, relative to the root of the cgroup2 hierarchy; connections to pods from them count as probes
    #[arg(long, value_delimiter = ',', value_name = "PATH")]
    pub probe_cgroups: Vec<PathBuf>,
}

/// When to search processes again: soon after a change, because a cgroup exists before its process, then at growing
/// intervals. Only the first start has to be found this way; inotify reports later changes of its cgroup.
const LOOK_AGAIN: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(30);

/// How long to wait after a change.
const SETTLE: Duration = Duration::from_millis(20);

/// How many paths of earlier probers are watched.
const MOST_PLACES: usize = 64;

/// Keeps the probe program attached to the probers' cgroups, forever. Reports when the first search is complete.
pub(super) async fn follow(
    probers: Probers,
    root: PathBuf,
    kernel: DatapathHandle<Linux>,
    looked: watch::Sender<bool>,
) -> anyhow::Result<()> {
    let mut known = BTreeSet::new();
    // The paths of current, former and future probers: services return to the same paths.
    let mut places = probers.cgroups(&root);
    let mut pause = *LOOK_AGAIN.start();
    loop {
        // Starts before the search, so that no change is missed.
        let watch = CgroupWatch::new(&places);
        let (wanted, root_directory) = (probers.clone(), root.clone());
        let found =
            tokio::task::spawn_blocking(move || find(&wanted, &root_directory)).await.unwrap_or_default();
        if found != known {
            for directory in found.difference(&known) {
                tracing::info!(cgroup = %directory.display(), "connections from this cgroup to pods count \
                     as kubelet probes");
            }
            known.clone_from(&found);
        }
        let directories = found.clone();
        if let Err(error) = kernel.run(move |linux| linux.set_probe_cgroups(&directories)).await? {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot exempt kubelet probes; they go through the node proxy"
            );
        }
        looked.send_replace(true);
        if !found.is_subset(&places) {
            if places.len() > MOST_PLACES {
                places = probers.cgroups(&root);
            }
            places.extend(found);
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (2 * pause).min(*LOOK_AGAIN.end()),
            () = watch.changed() => {
                tokio::time::sleep(SETTLE).await;
                pause = *LOOK_AGAIN.start();
            }
        }
    }
}

impl Probers {
    /// The configured cgroups, whether they exist or not.
    fn cgroups(&self, root: &Path) -> BTreeSet<PathBuf> {
        self.probe_cgroups.iter().map(|path| root.join(path.strip_prefix("/").unwrap_or(path))).collect()
    }
}

/// The existing cgroups of probers.
fn find(probers: &Probers, root: &Path) -> BTreeSet<PathBuf> {
    let mut found = probers.cgroups(root);
    found.retain(|directory| directory.is_dir());
    for pid in processes(&probers.probe_processes) {
        match cgroup::of_process(pid) {
            // Every process is below the root, which would exempt the whole node.
            Ok(cgroup) if cgroup.is_root() => tracing::warn!(
                pid,
                "the kubelet runs in the root of the cgroup2 hierarchy, where its probes are \
                 indistinguishable from other connections: run it in a cgroup of its own, or its probes go \
                 through the node proxy"
            ),
            Ok(cgroup) => {
                found.insert(cgroup.directory);
            }
            Err(error) => tracing::warn!(pid, %error, "cannot find the cgroup of a kubelet process"),
        }
    }
    found
}

/// The host's processes with these names. A process in a pod can call itself a kubelet, but it has namespaces of
/// its own.
fn processes(names: &[String]) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            names.iter().any(|name| is_called(comm.trim_end(), name)) && is_of_host(*pid)
        })
        .collect()
}

/// The kernel truncates names to fifteen bytes.
fn is_called(comm: &str, name: &str) -> bool {
    const LONGEST: usize = 15;
    !comm.is_empty() && comm.as_bytes() == name.as_bytes().get(..LONGEST).unwrap_or(name.as_bytes())
}

/// Whether the process is in the network and PID namespaces of the agent, which are the host's.
fn is_of_host(pid: i32) -> bool {
    let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let own = network("self");
    // A process in an inner PID namespace has an additional ID there.
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    own.is_some()
        && own == network(&pid.to_string())
        && numbers.is_some_and(|numbers| numbers.split_whitespace().count() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_found_by_name() {
        let comm = fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(processes(&[comm]).contains(&own));
        assert!(!processes(&["no-such-process".into()]).contains(&own));
    }

    #[test]
    fn long_names_are_recognised_as_the_kernel_cuts_them() {
        assert!(is_called("kubelet", "kubelet"));
        assert!(is_called("a-rather-long-n", "a-rather-long-name"));
        assert!(!is_called("kubelet", "kube"));
        assert!(!is_called("", ""));
    }

    #[test]
    fn cgroups_that_do_not_exist_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("system.slice/kubelet.service")).unwrap();
        let probers = Probers {
            probe_processes: Vec::new(),
            probe_cgroups: vec!["/system.slice/kubelet.service".into(), "/system.slice/k3s.service".into()],
        };
        let found = find(&probers, root.path());
        assert_eq!(found, [root.path().join("system.slice/kubelet.service")].into());
    }
}
