//! Reports when cgroups appear and vanish: service managers create a new one with the same name for each start of a
//! service.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

/// Watches paths for cgroups, from its creation on.
pub(super) struct CgroupWatch(nix::Result<OwnedFd>);

impl CgroupWatch {
    /// Watches these paths, or their nearest existing parents.
    pub(super) fn new(places: &BTreeSet<PathBuf>) -> Self {
        Self(watch(places))
    }

    /// Returns when a cgroup has appeared or vanished; never, if the kernel has no watch left.
    pub(super) async fn changed(self) {
        let Ok(descriptor) = self.0 else { return std::future::pending().await };
        // SAFETY: an owned descriptor does not change until it is dropped.
        match unsafe { AsyncFd::register(descriptor) } {
            Ok(descriptor) => {
                let _ = descriptor.readable().await;
            }
            Err(_) => std::future::pending().await,
        }
    }
}

fn watch(places: &BTreeSet<PathBuf>) -> nix::Result<OwnedFd> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    for place in places {
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
        // The nearest directory that exists.
        place.ancestors().skip(1).find(|directory| inotify.add_watch(*directory, flags).is_ok());
    }
    inotify.as_fd().try_clone_to_owned().map_err(|_| nix::errno::Errno::EMFILE)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_cgroup_that_comes_back_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        // At the path itself, and at a parent.
        for created in ["kubelet.service", "kubelet.slice"] {
            let places =
                ["kubelet.service", "kubelet.slice/kubelet.service"].map(|place| root.path().join(place));
            let watch = CgroupWatch::new(&places.into());
            std::fs::create_dir(root.path().join(created)).unwrap();
            tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.unwrap();
        }
    }
}
