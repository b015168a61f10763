//! Accepts connections.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::connection;
use super::handle::Handle;
use super::listener::Listener;
use super::peer::Peer;
use super::shared::Shared;
use redirect_linux::socket_file::BindError;

/// Why the agent does not want a proxy.
pub type AdmitError = Box<dyn std::error::Error + Send + Sync>;

/// What the agent completes for a new proxy before that proxy is told any pod. An error closes the connection.
pub type OnConnect =
    Arc<dyn Fn(Peer) -> Pin<Box<dyn Future<Output = Result<(), AdmitError>> + Send>> + Send + Sync>;

/// Something that is worth counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node proxy has connected.
    Connected,
    /// A node proxy answered a request.
    Answered {
        /// Whether it did what it was asked for.
        acknowledged: bool,
    },
    /// A node proxy's connection was closed.
    Closed {
        /// Why, as a label.
        reason: &'static str,
    },
}

/// Takes note of what happens on connections.
pub type Recorder = Arc<dyn Fn(Event) + Send + Sync>;

/// How the server behaves.
#[derive(Clone)]
pub struct Options {
    /// How long a new connection may take for its hello, and the agent for [`Self::on_connect`].
    pub hello_deadline: Duration,
    /// How long a proxy may take for the answer to one request.
    pub ack_deadline: Duration,
    /// How long until a refused pod is sent again.
    pub retry: Duration,
    /// How long a connection stays open after it failed. ztunnel reconnects without a pause as soon as it is closed.
    pub penalty: Duration,
    /// How many connections are served; others wait, unaccepted.
    pub max_connections: usize,
    /// See [`OnConnect`].
    pub on_connect: Option<OnConnect>,
    /// Who counts what happens.
    pub recorder: Option<Recorder>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hello_deadline: Duration::from_secs(5),
            ack_deadline: Duration::from_secs(5),
            retry: Duration::from_secs(5),
            penalty: Duration::from_secs(1),
            max_connections: 8,
            on_connect: None,
            recorder: None,
        }
    }
}

impl Options {
    pub(super) fn record(&self, event: Event) {
        if let Some(recorder) = &self.recorder {
            recorder(event);
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("hello_deadline", &self.hello_deadline)
            .field("ack_deadline", &self.ack_deadline)
            .field("retry", &self.retry)
            .field("penalty", &self.penalty)
            .field("max_connections", &self.max_connections)
            .finish_non_exhaustive()
    }
}

/// The listening socket.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    options: Arc<Options>,
}

impl Server {
    /// Creates the socket, within a runtime. Proxies that connect wait until [`Self::run`]: an agent that starts says
    /// first which pods it wants ([`Handle::set`]), because a proxy drops every pod that its snapshot lacks.
    pub fn bind(path: &Path, options: Options) -> Result<(Self, Handle), BindError> {
        let listener = Listener::bind(path)?;
        let shared = Shared::new();
        let handle = Handle { shared: Arc::clone(&shared), socket: path.into() };
        Ok((Self { listener, shared, options: Arc::new(options) }, handle))
    }

    /// Serves proxies until `shutdown`. Then connections are closed, which leaves the proxies' pods running, and the
    /// socket's file is removed.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let slots = Arc::new(Semaphore::new(self.options.max_connections));
        let mut connections = JoinSet::new();
        for id in 1.. {
            if slots.available_permits() == 0 {
                tracing::warn!(
                    connections = self.options.max_connections,
                    "no further node proxy is accepted: end those that are left over"
                );
            }
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
                Ok::<_, io::Error>((self.listener.accept().await?, slot))
            };
            let accepted = tokio::select! {
                () = &mut shutdown => break,
                accepted = accepted => accepted,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((socket, slot)) => {
                    let (shared, options) = (Arc::clone(&self.shared), Arc::clone(&self.options));
                    connections.spawn(async move {
                        connection::serve(id, socket, shared, options).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "a node proxy's connection cannot be accepted");
                    // Likely out of descriptors: give the others time to end.
                    tokio::select! {
                        () = &mut shutdown => break,
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    }
                }
            }
        }
        connections.shutdown().await;
    }
}
