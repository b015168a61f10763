//! The process at the other end of a connection.

use std::fmt;

use nix::unistd::Uid;
use tokio_seqpacket::UnixSeqpacket;

use redirect_linux::cgroup;
use redirect_linux::peer_process::{PeerError, PeerProcess};

/// A connected proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// The number of the connection; increases with each.
    pub id: u64,
    /// Its process.
    pub process: PeerProcess,
    /// Its cgroup, from the root of the cgroup2 hierarchy. `None` if unknown, or if it is the root, which contains
    /// every process and so identifies none.
    pub cgroup_path: Option<String>,
    /// The ID of that cgroup, as the kernel side sees it.
    pub cgroup_id: Option<u64>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node proxy {} ({})", self.id, self.process)
    }
}

/// Whether a process of this user may be a proxy. It receives every pod's namespace, so it must already be as powerful.
pub(super) fn permitted(uid: u32) -> bool {
    uid == 0 || uid == Uid::effective().as_raw()
}

/// Identifies the process. Fails if it has ended, or can't be seen. Blocks for some system calls.
pub(super) fn examine(id: u64, pid: Option<i32>, socket: &UnixSeqpacket) -> Result<Peer, PeerError> {
    let process = PeerProcess::of(socket, pid)?;
    let found = cgroup::of_process(process.pid()).and_then(|cgroup| {
        let id = cgroup::id(&cgroup.directory)?;
        Ok((cgroup, id))
    });
    // Before any of it is used.
    process.check()?;
    let unknown = Peer { id, process, cgroup_path: None, cgroup_id: None };
    Ok(match found {
        Err(error) => {
            tracing::warn!(peer = %unknown, %error, "cannot find the node proxy's cgroup");
            unknown
        }
        Ok((cgroup, _)) if cgroup.is_root() => unknown,
        Ok((cgroup, id)) => Peer { cgroup_path: Some(cgroup.path), cgroup_id: Some(id), ..unknown },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_agents_own_user_may_connect() {
        let own = Uid::effective().as_raw();
        assert!(permitted(0));
        assert!(permitted(own));
        assert!(!permitted(own + 1));
    }

    #[tokio::test]
    async fn a_living_peer_is_examined() {
        let (left, _right) = UnixSeqpacket::pair().unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let peer = examine(7, Some(pid), &left).unwrap();
        assert_eq!((peer.id, peer.process.pid()), (7, pid));
        assert_eq!(peer.cgroup_path.is_some(), peer.cgroup_id.is_some());
        assert_ne!(peer.cgroup_path.as_deref(), Some("/"));
        assert!(matches!(examine(8, None, &left), Err(PeerError::NotVisible)));
    }
}
