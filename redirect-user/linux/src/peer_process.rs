//! The process at the other end of a UNIX socket.
//!
//! The kernel reuses process IDs. The contents of `/proc/<pid>` concern the peer only if the peer lived all the while, which a
//! process file descriptor proves (`SO_PEERPIDFD`, Linux 6.5). Before, the ID has to do.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// The reason why the peer can't be identified.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It is in a PID namespace that the agent can't see.
    #[error("its process is not visible to the agent: set hostPID: true for the agent's pod")]
    NotVisible,
    /// It has ended, so another process may have its ID.
    #[error("its process {0} has ended: nothing can be learnt about it any more")]
    Ended(i32),
    /// The kernel provides no descriptor of it.
    #[error("its process {pid} can't be identified: {error}")]
    Unidentified {
        /// The process.
        pid: i32,
        /// The cause.
        error: io::Error,
    },
}

/// The process that connected.
#[derive(Clone, Debug)]
pub struct PeerProcess {
    pid: i32,
    descriptor: Option<Arc<OwnedFd>>,
}

impl PeerProcess {
    /// The process at the other end of `socket`, whose credentials name `pid`.
    pub fn of(socket: &impl AsFd, pid: Option<i32>) -> Result<Self, PeerError> {
        let pid = pid.ok_or(PeerError::NotVisible)?;
        let descriptor = match getsockopt(&socket.as_fd(), sockopt::PeerPidfd) {
            Ok(descriptor) => Some(Arc::new(descriptor)),
            Err(Errno::ENOPROTOOPT) => None,
            Err(Errno::ESRCH | Errno::ENODATA) => return Err(PeerError::Ended(pid)),
            Err(error) => return Err(PeerError::Unidentified { pid, error: error.into() }),
        };
        let process = Self { pid, descriptor };
        process.check()?;
        Ok(process)
    }

    /// Its process ID, which another process may get once this one has ended.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Fails if the process has ended. If it succeeds, everything read by its process ID before is right.
    pub fn check(&self) -> Result<(), PeerError> {
        let lives = match &self.descriptor {
            Some(descriptor) => {
                let mut ended = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
                let ready = poll(&mut ended, PollTimeout::ZERO)
                    .map_err(|error| PeerError::Unidentified { pid: self.pid, error: error.into() })?;
                ready == 0
            }
            None => Path::new(&format!("/proc/{}", self.pid)).exists(),
        };
        if lives { Ok(()) } else { Err(PeerError::Ended(self.pid)) }
    }
}

impl PartialEq for PeerProcess {
    fn eq(&self, other: &Self) -> bool {
        self.pid == other.pid
    }
}

impl Eq for PeerProcess {}

impl Hash for PeerProcess {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.pid.hash(state);
    }
}

impl fmt::Display for PeerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    use nix::sys::socket::sockopt::PeerCredentials;

    use super::*;

    /// Starts a process that connects, and returns its socket and credentials.
    fn connected(script: &str) -> (std::process::Child, std::os::unix::net::UnixStream, Option<i32>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let program = format!(
            "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect({:?})\n{script}",
            path.display().to_string()
        );
        let child = Command::new("python3").args(["-c", &program]).spawn().unwrap();
        let (socket, _) = listener.accept().unwrap();
        let pid = getsockopt(&socket, PeerCredentials).unwrap().pid();
        (child, socket, Some(pid))
    }

    #[test]
    fn a_process_that_lives_is_told_from_one_that_has_ended() {
        let (mut child, socket, pid) = connected("sys.stdin.read(); import time; time.sleep(600)");
        let process = PeerProcess::of(&socket, pid).unwrap();
        assert_eq!(process.pid(), i32::try_from(child.id()).unwrap());
        process.check().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(process.check(), Err(PeerError::Ended(_))));
        assert!(matches!(PeerProcess::of(&socket, pid), Err(PeerError::Ended(_))));
    }

    #[test]
    fn a_process_that_nobody_sees_is_refused() {
        let (left, _right) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(PeerProcess::of(&left, None), Err(PeerError::NotVisible)));
    }
}
