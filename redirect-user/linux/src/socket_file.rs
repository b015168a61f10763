//! A UNIX socket of the agent: created with its final mode, never taken from a running process, removed at the end.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, fchmod};

use crate::lock;

/// The reason why the agent cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error("another process listens on {}: stop the other agent on this node, ours or Istio's", .0.display())]
    InUse(PathBuf),
    /// The path is a file that is not a socket.
    #[error("{} exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// The path of the socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Removes the socket's file when dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

/// A listening, non-blocking `SOCK_SEQPACKET` socket at `path` with mode 0600.
pub fn listen_at(path: &Path) -> Result<(OwnedFd, SocketFile), BindError> {
    let failed = |source: io::Error| BindError::Io { path: path.into(), source };
    let errno = |errno: Errno| failed(errno.into());

    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
    // Two agents that start at once must not take each other's new socket for a stale one.
    let _lock = lock::of_directory(directory).map_err(failed)?;
    remove_if_stale(path)?;

    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(errno)?;
    // bind() creates the file with the mode of the socket, so the file never has a wider one.
    fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR).map_err(errno)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path).map_err(errno)?).map_err(errno)?;
    let file = SocketFile { path: path.into(), inode: inode(path).map_err(failed)? };
    listen(&listener, Backlog::MAXCONN).map_err(errno)?;
    Ok((listener, file))
}

fn remove_if_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source: io::Error| BindError::Io { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(BindError::NotASocket(path.into())),
        Ok(_) => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let address = UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
    let probe = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None);
    let probe = probe.map_err(|errno| failed(errno.into()))?;
    match connect(probe.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(failed),
        // EAGAIN: its backlog is full; EPROTOTYPE: it is a socket of another type. Either way a process has
        // it open.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(BindError::InUse(path.into())),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another process may have replaced the file.
        if inode(&self.path).is_ok_and(|now| now == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove socket file");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_file_is_private_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/on/demand/agent.sock");
        let listening = listen_at(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_socket_stays_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let (listener, file) = listen_at(&path).unwrap();
        assert!(matches!(listen_at(&path), Err(BindError::InUse(_))));

        drop(listener);
        std::mem::forget(file);
        assert!(path.exists());
        let (_listener, _file) = listen_at(&path).unwrap();
        assert!(matches!(listen_at(&path), Err(BindError::InUse(_))));
    }

    #[test]
    fn sockets_of_another_type_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let stream = directory.path().join("stream.sock");
        let _listener = UnixListener::bind(&stream).unwrap();
        assert!(matches!(listen_at(&stream), Err(BindError::InUse(_))));

        let plain = directory.path().join("file");
        fs::write(&plain, "precious").unwrap();
        assert!(matches!(listen_at(&plain), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&plain).unwrap(), "precious");
    }

    #[test]
    fn a_successor_s_file_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let (listener, file) = listen_at(&path).unwrap();
        // The new name keeps the inode in use, so that its number is not reused.
        fs::rename(&path, directory.path().join("old.sock")).unwrap();
        let _successor = listen_at(&path).unwrap();
        drop((listener, file));
        assert!(path.exists());
    }
}
