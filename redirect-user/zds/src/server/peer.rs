//! Who is at the other end of a connection.

use std::fmt;
use std::fs;
use std::os::fd::AsRawFd;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Uid;
use tokio_seqpacket::UnixSeqpacket;

use redirect_linux::cgroup;

/// A connected proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Counts the connections; a later one has a larger number.
    pub id: u64,
    /// Its process; `None` if it lives in a PID namespace that the agent cannot see.
    pub pid: Option<i32>,
    /// Its cgroup, from the root of the cgroup2 hierarchy. `None` if unknown, or if it is the root: every process is
    /// below that one, so it identifies none.
    pub cgroup_path: Option<String>,
    /// The number of that cgroup, as the kernel side sees it.
    pub cgroup_id: Option<u64>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node proxy {}", self.id)?;
        match self.pid {
            Some(pid) => write!(f, " (process {pid})"),
            None => f.write_str(" (process unknown)"),
        }
    }
}

/// Whether a process of this user may be a proxy. It receives every pod's namespace, and so must be as powerful already.
pub(super) fn permitted(uid: u32) -> bool {
    uid == 0 || uid == Uid::effective().as_raw()
}

/// Examines the other end. Blocks for some system calls.
pub(super) fn examine(id: u64, pid: Option<i32>, socket: &UnixSeqpacket) -> Peer {
    let unknown = Peer { id, pid, cgroup_path: None, cgroup_id: None };
    let Some(pid) = pid else {
        tracing::warn!(peer = %unknown, "node proxy process is not visible: set hostPID: true for the agent");
        return unknown;
    };
    let found = cgroup::of_process(pid).and_then(|cgroup| {
        let id = cgroup::id(&cgroup.directory)?;
        Ok((cgroup, id))
    });
    match found {
        Err(error) => {
            tracing::warn!(peer = %unknown, %error, "cannot find the node proxy's cgroup");
            unknown
        }
        Ok(_) if is_gone(pid, socket) => {
            tracing::warn!(peer = %unknown, "node proxy process ended right after connecting");
            unknown
        }
        Ok((cgroup, _)) if cgroup.is_root() => unknown,
        Ok((cgroup, id)) => Peer { cgroup_path: Some(cgroup.path), cgroup_id: Some(id), ..unknown },
    }
}

/// Whether the process that connected has ended, so that its number may be another's by now. Only kernels since 6.5 can
/// tell; with others the number is trusted.
fn is_gone(pid: i32, socket: &UnixSeqpacket) -> bool {
    let Ok(descriptor) = getsockopt(socket, sockopt::PeerPidfd) else { return false };
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
    let Ok(text) = fs::read_to_string(path) else { return false };
    let shown = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    shown.is_some_and(|shown| shown.trim().parse() != Ok(pid))
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
        assert!(!is_gone(pid, &left));
        let peer = examine(7, Some(pid), &left);
        assert_eq!((peer.id, peer.pid), (7, Some(pid)));
        assert_eq!(peer.cgroup_path.is_some(), peer.cgroup_id.is_some());
        assert_ne!(peer.cgroup_path.as_deref(), Some("/"));
        assert_eq!(examine(8, None, &left).cgroup_id, None);
    }
}
