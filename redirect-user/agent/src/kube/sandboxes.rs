//! Finds the network namespaces of running pods by their processes.
//!
//! The API server, the runtime and `/proc` each know a part, and none of them is trusted alone: a namespace counts if a
//! process in the pod's cgroup runs in it, if it is not the host's, and if it has the pod's addresses (`agent::pods` checks
//! that).

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::process_cgroup::{self, Membership};
use crate::pods::Sandbox;
use redirect_linux::cgroup;
use redirect_linux::netns::NetNs;

/// How long a scan of all processes is reused: starting agents and bursts of pods ask often.
const FRESH: Duration = Duration::from_millis(500);

/// The processes of this node.
#[derive(Debug)]
pub(super) struct Sandboxes {
    proc: PathBuf,
    processes: Mutex<Option<(Instant, Arc<Processes>)>>,
}

/// Process IDs and containers by the pod's UID.
type Processes = HashMap<String, Vec<(u32, Option<String>)>>;

impl Sandboxes {
    pub(super) fn new(proc: PathBuf) -> Self {
        Self { proc, processes: Mutex::default() }
    }

    /// The namespaces of processes in the cgroups of a pod, by any of these UIDs. Usually one; containers can create
    /// more. Blocks for some system calls per process of the node.
    pub(super) fn find(&self, uids: &[String]) -> io::Result<Vec<Sandbox>> {
        let hosts = self.host_namespaces()?;
        let (processes, fresh) = self.processes(false)?;
        let found = self.look(&processes, uids, &hosts);
        if fresh || !found.is_empty() {
            return Ok(found);
        }
        let (processes, _) = self.processes(true)?;
        Ok(self.look(&processes, uids, &hosts))
    }

    fn look(&self, processes: &Processes, uids: &[String], hosts: &[NetNs]) -> Vec<Sandbox> {
        let mut sandboxes: Vec<Sandbox> = Vec::new();
        for (pid, container) in uids.iter().filter_map(|uid| processes.get(uid)).flatten() {
            let directory = self.proc.join(pid.to_string());
            let Ok(netns) = NetNs::open(&directory.join("ns/net")) else { continue };
            // The process may have ended meanwhile, and another may have its ID.
            if !membership(&directory).is_some_and(|now| uids.contains(&now.uid)) || hosts.contains(&netns) {
                continue;
            }
            let containers = container.iter().cloned();
            match sandboxes.iter_mut().find(|known| known.netns == netns) {
                Some(known) => known.containers.extend(containers),
                None => sandboxes.push(Sandbox { netns, containers: containers.collect::<BTreeSet<_>>() }),
            }
        }
        sandboxes
    }

    /// The agent's own namespace, which is the host's, and that of process 1 if the agent may read it.
    fn host_namespaces(&self) -> io::Result<Vec<NetNs>> {
        let path = self.proc.join("1/ns/net");
        let mut hosts = vec![NetNs::current()?];
        match NetNs::open(&path) {
            Ok(host) => hosts.push(host),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::debug!(path = %path.display(), %error, "using the agent's own network namespace \
                     as the host's");
            }
            Err(error) => {
                let message = format!("{}: {error}: is it the host's /proc?", path.display());
                return Err(io::Error::new(error.kind(), message));
            }
        }
        Ok(hosts)
    }

    /// All pods' processes, and whether this call scanned them.
    fn processes(&self, anew: bool) -> io::Result<(Arc<Processes>, bool)> {
        let mut kept = self.processes.lock();
        if let Some((at, processes)) = &*kept
            && !anew
            && at.elapsed() < FRESH
        {
            return Ok((Arc::clone(processes), false));
        }
        let proc = self.proc.clone();
        let processes = Arc::new(cgroup::in_host_view(move || scan(&proc))?);
        *kept = Some((Instant::now(), Arc::clone(&processes)));
        Ok((processes, true))
    }
}

fn scan(proc: &Path) -> io::Result<Processes> {
    let mut processes = Processes::new();
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(Membership { uid, container }) = membership(&entry.path()) {
            processes.entry(uid).or_default().push((pid, container));
        }
    }
    for of_pod in processes.values_mut() {
        of_pod.sort();
    }
    Ok(processes)
}

/// The pod of a process; `None` if the process has ended.
fn membership(directory: &Path) -> Option<Membership> {
    process_cgroup::membership(&fs::read_to_string(directory.join("cgroup")).ok()?)
}

#[cfg(test)]
mod tests;
