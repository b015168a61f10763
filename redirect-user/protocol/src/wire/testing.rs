//! An agent for tests: the real server on a real socket, with answers chosen by the test.

#![expect(clippy::unwrap_used, reason = "for tests alone, which fail where it panics")]

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::fstat;
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::server::{Handler, Server};
use super::{Error, FlowFilter, Reply, Request};
use redirect_linux::peer_process::PeerProcess;

type Answer = Box<dyn Fn(&Request) -> Vec<Reply> + Send + Sync>;

/// Answers with `answer` after `delay`, and records requests.
struct Recorder {
    answer: Answer,
    delay: Duration,
    requests: Mutex<Vec<(Request, Option<u64>)>>,
}

impl Handler for Recorder {
    async fn monitor(&self, filter: FlowFilter) -> Result<BoxStream<'static, Reply>, Error> {
        let replies = (self.answer)(&Request::Monitor { filter });
        // Until the client disconnects.
        Ok(stream::iter(replies).chain(stream::pending()).boxed())
    }

    async fn permit(&self, _: &PeerProcess) -> Result<(), Error> {
        Ok(())
    }

    async fn handle(&self, request: Request, netns: Option<OwnedFd>) -> Vec<Reply> {
        let inode = netns.map(|fd| {
            let flags = FdFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC), "programs that the agent starts must not inherit it");
            fstat(fd).unwrap().st_ino
        });
        let replies = (self.answer)(&request);
        self.requests.lock().unwrap().push((request, inode));
        tokio::time::sleep(self.delay).await;
        replies
    }
}

/// A running agent; stops when dropped.
pub struct TestAgent {
    directory: TempDir,
    recorder: Arc<Recorder>,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestAgent {
    /// An agent that answers at once.
    pub fn start(answer: impl Fn(&Request) -> Vec<Reply> + Send + Sync + 'static) -> Self {
        Self::start_slow(Duration::ZERO, answer)
    }

    /// An agent that answers after a delay.
    pub fn start_slow(
        delay: Duration,
        answer: impl Fn(&Request) -> Vec<Reply> + Send + Sync + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Arc::new(Recorder { answer: Box::new(answer), delay, requests: Mutex::default() });
        let (shutdown, stopped) = oneshot::channel();
        let (ready, bound) = std::sync::mpsc::channel();
        let (path, handler) = (directory.path().join("agent.sock"), Arc::clone(&recorder));
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let server = Server::bind(&path).unwrap();
                ready.send(()).unwrap();
                server.serve(handler, async { stopped.await.unwrap_or_default() }).await;
            });
        });
        bound.recv().unwrap();
        Self { directory, recorder, shutdown: Some(shutdown), thread: Some(thread) }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    /// The requests so far, with the inodes of their descriptors.
    pub fn requests(&self) -> Vec<(Request, Option<u64>)> {
        self.recorder.requests.lock().unwrap().clone()
    }

    /// Stops the agent as SIGTERM does, and waits until it is gone. The directory stays.
    pub fn stop(&mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            let _ = shutdown.send(());
        }
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop();
        }
    }
}

/// A socket path on which no process ever listened, below a directory that lives as long as the guard.
pub fn nobody() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    (directory, path)
}

/// A socket file whose owner died without removing it.
pub fn stale_socket(path: &Path) {
    let (listener, file) = redirect_linux::socket_file::listen_at(path).unwrap();
    drop(listener);
    std::mem::forget(file);
}

/// A descriptor to pass around, and a tracker that notices when its last copy is closed.
pub fn tracked_fd() -> (OwnedFd, FdTracker) {
    let (ours, passed) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (passed.into(), FdTracker(ours))
}

/// Detects that the descriptor is closed.
#[derive(Debug)]
pub struct FdTracker(UnixStream);

impl FdTracker {
    /// The stream ends when no process has a copy of the other end.
    pub fn assert_closed(mut self) {
        assert_eq!(self.0.read(&mut [0]).expect("the descriptor leaked"), 0);
    }
}
