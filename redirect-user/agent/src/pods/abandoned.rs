//! Un-enrolls pods whose network namespace nobody else uses any more: its path is gone, no process is in it, and the runtime sent
//! no DEL. The descriptors of agent and proxy would keep the namespace alive, with interfaces that answer for addresses that
//! another pod may have.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Pods;
use redirect_datapath::datapath::Datapath;
use redirect_linux::netns::NetNs;

/// How many scans in a row must find a namespace unused: processes start and end during a scan.
const LOOKS: u32 = 2;

/// The users of the pods' namespaces at the last scan.
#[derive(Debug, Default)]
pub(crate) struct Users {
    /// By namespace cookie.
    known: HashMap<u64, User>,
    /// Whether the log already has the warning that scans fail.
    told: bool,
}

/// Only a namespace that the agent has seen in use can be abandoned: the runtime may keep one where the agent does not see it.
#[derive(Debug, Default)]
struct User {
    /// A process in the namespace, if the runtime's path does not lead there.
    witness: Option<PathBuf>,
    /// How many scans in a row found the namespace unused.
    missed: u32,
}

/// A pod's namespace.
struct Held {
    uid: String,
    netns_cookie: u64,
    netns: NetNs,
    found: bool,
    witness: Option<PathBuf>,
}

/// How a namespace is used.
enum Use {
    /// The runtime's path leads to it.
    Named,
    /// A process is in it.
    Process(PathBuf),
    Nobody,
}

impl<D: Datapath + Send + 'static> Pods<D> {
    /// Scans for users of the pods' namespaces, and un-enrolls the pods whose namespace has lost its last user.
    pub(crate) async fn leave_abandoned(&self, proc: &Path, users: &mut Users) {
        let held = self.slots.each(|uid, known| Held {
            uid: uid.to_owned(),
            netns_cookie: known.target.netns_cookie,
            netns: known.target.netns.clone(),
            found: known.found,
            witness: users.known.get(&known.target.netns_cookie).and_then(|user| user.witness.clone()),
        });
        let (held, proc) = (held.await, proc.to_owned());
        let looked = tokio::task::spawn_blocking(move || {
            let uses = look(&proc, &held);
            // Drops the descriptors here: one that is kept until the next scan would keep its namespace alive.
            let pods = held.into_iter().map(|held| (held.uid, held.netns_cookie, held.found));
            uses.map(|uses| pods.zip(uses).collect::<Vec<_>>())
        });
        let uses = match looked.await {
            Ok(Ok(uses)) => uses,
            Ok(Err(error)) => {
                if !std::mem::replace(&mut users.told, true) {
                    tracing::warn!(
                        %error,
                        "cannot see which network namespaces processes are in; pods without a sandbox stay \
                         until the runtime's DEL"
                    );
                }
                return;
            }
            // The agent ends.
            Err(_) => return,
        };
        users.known.retain(|cookie, _| uses.iter().any(|((_, known, _), _)| known == cookie));
        for ((uid, netns_cookie, found), used) in uses {
            if found {
                users.known.entry(netns_cookie).or_default();
            }
            match (used, users.known.get_mut(&netns_cookie)) {
                (Use::Nobody, None) => {}
                (Use::Nobody, Some(user)) => {
                    user.missed += 1;
                    if user.missed >= LOOKS {
                        self.unenroll_abandoned(&uid, netns_cookie).await;
                    }
                }
                (Use::Named, _) => _ = users.known.insert(netns_cookie, User::default()),
                (Use::Process(witness), _) => {
                    users.known.insert(netns_cookie, User { witness: Some(witness), missed: 0 });
                }
            }
        }
    }

    /// Un-enrolls a pod, unless another operation holds it or it has another namespace by now.
    async fn unenroll_abandoned(&self, uid: &str, netns_cookie: u64) {
        // The runtime may have put another namespace at the path.
        self.check_drift(uid).await;
        let Some(mut slot) = self.slots.find_idle(uid).await else { return };
        let gone = slot
            .as_ref()
            .filter(|known| known.target.netns_cookie == netns_cookie && known.adding.is_empty());
        if let Some(known) = gone {
            let (pod, again) = (known.target.identity.clone(), known.removing);
            if !again {
                tracing::warn!(%pod, uid, "sandbox is gone without a DEL of the runtime's; un-enrolling the pod");
            }
            match self.let_go(&mut slot).await {
                Err(error) if !again => {
                    tracing::error!(%error, "pod without a sandbox is not un-enrolled yet");
                }
                Err(error) => tracing::debug!(%error, "pod without a sandbox is still not un-enrolled"),
                Ok(_) => {}
            }
        }
        self.release(slot, uid).await;
    }
}

/// How each namespace is used. Blocks. Reads all of `/proc` only if neither the path nor the last known process leads to a
/// namespace.
fn look(proc: &Path, held: &[Held]) -> io::Result<Vec<Use>> {
    let mut processes = None;
    let mut uses = Vec::new();
    for Held { netns, witness, .. } in held {
        let leads_there = |path: &Path| netns.is_at(path);
        uses.push(if netns.path().is_some_and(leads_there) {
            Use::Named
        } else if let Some(witness) = witness.as_deref().filter(|path| leads_there(path)) {
            Use::Process(witness.to_owned())
        } else {
            let processes = match &mut processes {
                Some(processes) => processes,
                none => none.insert(scan(proc)?),
            };
            match netns.inode().ok().and_then(|inode| processes.get(&inode)) {
                Some(process) => Use::Process(process.clone()),
                None => Use::Nobody,
            }
        });
    }
    Ok(uses)
}

/// One process in each network namespace, by the namespace's inode. Fails if a process cannot be examined, because it may be in
/// any namespace. Skips process 1, which is in the host's.
fn scan(proc: &Path) -> io::Result<HashMap<u64, PathBuf>> {
    let mut found = HashMap::new();
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        let process = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if process.is_none_or(|process| process == 1) {
            continue;
        }
        let path = entry.path().join("ns/net");
        match fs::metadata(&path) {
            Ok(metadata) => _ = found.entry(metadata.ino()).or_insert(path),
            // The process has ended, or is about to.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn held(netns: NetNs, witness: Option<PathBuf>) -> Held {
        Held { uid: "uid".into(), netns_cookie: 1, netns, found: false, witness }
    }

    #[test]
    fn a_namespace_is_used_by_its_path_or_by_a_process() {
        let own = NetNs::open(Path::new("/proc/self/ns/net")).expect("a namespace");
        let nowhere = own.clone().at(Some("/nowhere".into()));
        let uses = look(Path::new("/proc"), &[held(own, None), held(nowhere.clone(), None)]).expect("uses");
        assert!(matches!(uses[0], Use::Named));
        let Use::Process(witness) = &uses[1] else { panic!("no process is in this process's namespace") };
        // The last known process is checked first.
        let uses =
            look(Path::new("/nowhere"), &[held(nowhere.clone(), Some(witness.clone()))]).expect("uses");
        assert!(matches!(&uses[0], Use::Process(known) if known == witness));
        // An unreadable `/proc` is an error, not an unused namespace.
        assert!(look(Path::new("/nowhere"), &[held(nowhere, None)]).is_err());
    }

    #[test]
    fn processes_that_end_are_none() {
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().expect("a process");
        child.wait().expect("its end");
        assert!(!scan(Path::new("/proc")).expect("processes").is_empty());
    }
}
