//! The server over real sockets, against a double of ztunnel's client that checks the rules of the protocol.
//!
//! Plain files stand in for network namespaces: the server distinguishes namespaces by device and inode, as proxies
//! do.

mod double;
mod failures;
mod races;
mod scenarios;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::fstat;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{Handle, Options, Server, Workload};
use crate::messages::WorkloadInfo;

/// Long enough for anything expected to happen.
const LONG: Duration = Duration::from_secs(10);

/// Long enough to conclude that something does not happen.
const SHORT: Duration = Duration::from_millis(60);

/// A running server in a directory of its own.
struct Fixture {
    directory: TempDir,
    path: PathBuf,
    handle: Handle,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

/// Options with which tests need not wait; deadlines stay long, for machines under load.
fn quick() -> Options {
    Options { retry: Duration::from_millis(40), penalty: Duration::from_millis(5), ..Options::default() }
}

impl Fixture {
    fn start(options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("zds.sock");
        let (server, handle) = Server::bind(&path, options).unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Self { directory, path, handle, stop, server }
    }

    /// A file that stands in for a network namespace.
    fn netns(&self, name: &str) -> Arc<OwnedFd> {
        let path = self.directory.path().join(name);
        let file = File::options().create(true).append(true).open(path).unwrap();
        Arc::new(file.into())
    }

    fn workload(&self, uid: &str, netns: &str) -> Workload {
        Workload { uid: uid.into(), info: info(uid), netns: Some(self.netns(netns)) }
    }

    /// How many of this process's descriptors refer to the stand-ins.
    fn open_namespaces(&self) -> usize {
        let directory = self.directory.path().canonicalize().unwrap();
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.starts_with(&directory))
            .count()
    }

    /// The number of sockets on the server's side, including the listening one.
    fn server_sockets(&self) -> usize {
        let path = self.path.to_str().unwrap();
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        sockets.lines().filter(|line| line.ends_with(path)).count()
    }
}

fn info(uid: &str) -> WorkloadInfo {
    WorkloadInfo { name: format!("name-{uid}"), namespace: "default".into(), service_account: "sa".into() }
}

fn identity(descriptor: impl AsFd) -> (u64, u64) {
    let stat = fstat(descriptor).unwrap();
    (stat.st_dev, stat.st_ino)
}

/// Waits until the condition holds.
async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "did not happen: {what}");
}
