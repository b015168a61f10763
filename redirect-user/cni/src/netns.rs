//! Opens the pod's network namespace and verifies that it is one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::error::Error;

/// `NS_GET_NSTYPE` of `linux/nsfs.h`: the `CLONE_NEW*` flag of a namespace.
const NS_GET_NSTYPE: nix::sys::ioctl::ioctl_num_type = nix::request_code_none!(0xb7, 0x3);

pub(super) fn open_netns(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |source: io::Error| Error::NamespaceIo { path: path.into(), source };
    // Without O_NONBLOCK, opening a FIFO would block for ever.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let fd = match open(path, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            return Err(Error::Namespace { path: path.into(), problem: "does not exist" });
        }
        Err(errno) => return Err(failed(errno.into())),
    };
    // The ioctl's number may mean something else on another file system.
    if fstatfs(&fd).map_err(|errno| failed(errno.into()))?.filesystem_type() != NSFS_MAGIC {
        return Err(Error::Namespace { path: path.into(), problem: "is not a namespace" });
    }
    // SAFETY: the descriptor is open, and the request takes no argument.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    match Errno::result(kind) {
        Ok(kind) if kind == CloneFlags::CLONE_NEWNET.bits() => Ok(fd),
        Ok(_) => {
            Err(Error::Namespace { path: path.into(), problem: "is a namespace, but not of the network" })
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::stat::fstat;

    use super::*;

    #[test]
    fn a_network_namespace_is_opened_and_not_inherited() {
        let fd = open_netns(Path::new("/proc/self/ns/net")).unwrap();
        assert_eq!(
            fstat(&fd).unwrap().st_ino,
            fstat(File::open("/proc/self/ns/net").unwrap()).unwrap().st_ino
        );
        let flags = FdFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
    }

    #[test]
    fn other_files_are_told_apart() {
        for (path, problem) in [
            ("/proc/self/ns/mnt", "is a namespace, but not of the network"),
            ("/dev/null", "is not a namespace"),
            ("/proc/self/ns", "is not a namespace"),
            ("/proc/self/ns/absent", "does not exist"),
        ] {
            let message = open_netns(Path::new(path)).unwrap_err().to_string();
            assert!(message.contains(problem) && message.contains(path), "{message}");
        }
    }
}
