//! A network namespace, held by its descriptor.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use socket2::{Domain, Socket, Type};

/// A network namespace that cannot go away while this value, or a clone of it, exists.
#[derive(Clone, Debug)]
pub struct NetNs {
    fd: Arc<OwnedFd>,
    path: Option<Arc<Path>>,
}

impl NetNs {
    /// The namespace behind a descriptor of `/proc/<pid>/ns/net` or of a bind mount of it.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), path: None }
    }

    /// The same namespace, with a path at which other processes find it.
    #[must_use]
    pub fn at(self, path: Option<PathBuf>) -> Self {
        Self { path: path.map(Arc::from), ..self }
    }

    /// The namespace behind a path.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::from_fd(File::open(path)?.into()).at(Some(path.into())))
    }

    /// The calling thread's namespace.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The path at which it was found.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Whether the path leads to it.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        Self::open(path).is_ok_and(|there| there == *self)
    }

    /// The descriptor, to pass on.
    #[must_use]
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Moves the calling thread into the namespace.
    ///
    /// Never call it on a thread of an async runtime: any task that runs there next would run in the namespace
    /// too.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `work` on a thread of its own inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                self.enter()?;
                Ok(work())
            })?;
            thread.join().expect("a panic ends the process")
        })
    }

    /// The inode of the namespace, which is constant for its lifetime.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(fstat(self.fd.as_fd())?.st_ino)
    }

    /// Device and inode, which identify a namespace.
    fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = fstat(self.fd.as_fd())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// The addresses on the namespace's interfaces, loopback included.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        self.run(|| -> io::Result<Vec<IpAddr>> {
            let addresses = getifaddrs()?.filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            });
            Ok(addresses.collect())
        })?
    }

    /// The cookie by which the kernel side identifies the namespace. Needs Linux 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(current_cookie)?
    }
}

impl PartialEq for NetNs {
    /// Whether it is the same namespace. One that can't be read equals none.
    fn eq(&self, other: &Self) -> bool {
        match (self.identity(), other.identity()) {
            (Ok(this), Ok(other)) => this == other,
            (Err(_), _) | (_, Err(_)) => false,
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The cookie of the calling thread's network namespace.
pub fn current_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer has room for the eight bytes that `length` announces.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
