//! How the server behaves, and what it hands to the agent.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::peer::Peer;

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
