//! The server's options and callbacks.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::peer::Peer;

/// Why the agent refuses a proxy.
pub type AdmitError = Box<dyn std::error::Error + Send + Sync>;

/// The agent's work for a new proxy, to be completed before any pod is sent to it. An error closes the
/// connection.
pub type OnConnect =
    Arc<dyn Fn(Peer) -> Pin<Box<dyn Future<Output = Result<(), AdmitError>> + Send>> + Send + Sync>;

/// An event for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A node proxy has connected.
    Connected,
    /// A node proxy has answered a request.
    Answered {
        /// Whether it succeeded.
        acknowledged: bool,
    },
    /// A node proxy's connection was closed.
    Closed {
        /// The reason, as a label.
        reason: &'static str,
    },
}

/// Records events.
pub type Recorder = Arc<dyn Fn(Event) + Send + Sync>;

/// The server's options.
#[derive(Clone)]
pub struct Options {
    /// The deadline for a new connection's hello, and for the agent's [`Self::on_connect`].
    pub hello_deadline: Duration,
    /// The deadline for the answer to a request.
    pub ack_deadline: Duration,
    /// The interval at which a refused pod is sent again.
    pub retry: Duration,
    /// How long a connection stays open after it failed, because ztunnel reconnects without a pause when it is
    /// closed.
    pub penalty: Duration,
    /// The maximum number of connections; others wait, unaccepted.
    pub max_connections: usize,
    /// See [`OnConnect`].
    pub on_connect: Option<OnConnect>,
    /// Records events.
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
