//! The HTTP/1 server: one answer per connection.
//!
//! Health and readiness have a listener of their own on the node's loopback address, apart from the one for metrics, which is
//! reachable from the network. Their answers are in memory, so no client can cause work for the agent.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{Snapshot, registry, text};

/// The deadline for a connection, and for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The maximum size of a request with its headers.
const LONGEST_REQUEST: usize = 16 << 10;

/// A client's deadline to send its request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(2);

/// The maximum number of connections. See [`Connections`].
const MAX_CONNECTIONS: usize = 64;

/// How long the text of a scrape is reused. Reading all maps takes the datapath thread milliseconds.
const SCRAPE_LIFETIME: Duration = Duration::from_millis(200);

/// The retry interval for a port in use.
const PAUSE: Duration = Duration::from_secs(5);

/// A check's name and result.
pub(crate) type Check = (&'static str, Result<(), String>);

/// The source of answers.
pub(crate) trait Source: Send + Sync + 'static {
    /// The state of the agent.
    fn snapshot(&self) -> impl Future<Output = Result<Snapshot, String>> + Send;

    /// The conditions for the agent to work at all: if one fails, it should be restarted. Immediate.
    fn health(&self) -> Vec<Check>;

    /// The conditions for new pods to be enrolled. Immediate.
    fn readiness(&self) -> Vec<Check>;
}

/// The purpose of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// `/metrics`, `/healthz` and `/readyz`.
    Metrics,
    /// `/healthz` and `/readyz` only.
    Health,
}

impl Purpose {
    /// The option with its address.
    const fn option(self) -> &'static str {
        match self {
            Self::Metrics => "--metrics-address",
            Self::Health => "--health-address",
        }
    }
}

/// Serves until `shutdown`. Retries a port in use, because pods are captured without metrics as well.
pub(crate) async fn serve(
    purpose: Purpose,
    address: SocketAddr,
    source: Arc<impl Source>,
    shutdown: impl Future<Output = ()>,
) {
    let mut shutdown = pin!(shutdown);
    tokio::select! {
        () = &mut shutdown => {}
        () = listen(purpose, address, source) => {}
    }
}

async fn listen(purpose: Purpose, address: SocketAddr, source: Arc<impl Source>) {
    let mut reported = false;
    let listener = loop {
        match bind(address).await {
            Ok(listener) => break listener,
            Err(error) if !reported => {
                reported = true;
                tracing::error!(%address, %error, "cannot listen, retrying: see {}", purpose.option());
            }
            Err(_) => {}
        }
        sleep(PAUSE).await;
    };
    tracing::info!(address = ?listener.local_addr().ok(), ?purpose, "serving HTTP");
    let server = Arc::new(Server { purpose, source, scraped: Mutex::default() });
    let mut connections = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => connections.serve(stream, &server),
            Err(error) => {
                tracing::debug!(%error, "cannot accept HTTP connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The open connections. Accepting never waits: a client that only connects must not lock others out. When there are too
/// many, the oldest one without a request is closed, or else the new one.
#[derive(Default)]
struct Connections(VecDeque<Connection>);

struct Connection {
    task: AbortHandle,
    /// Whether its request has arrived.
    asked: Arc<AtomicBool>,
}

impl Connections {
    fn serve<S: Source>(&mut self, stream: TcpStream, server: &Arc<Server<S>>) {
        self.0.retain(|connection| !connection.task.is_finished());
        if self.0.len() >= MAX_CONNECTIONS {
            let silent = self.0.iter().position(|connection| !connection.asked.load(Ordering::Relaxed));
            let Some(silent) = silent.and_then(|index| self.0.remove(index)) else { return };
            silent.task.abort();
        }
        let (asked, server) = (Arc::<AtomicBool>::default(), Arc::clone(server));
        let asks = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            // Errors only concern the client.
            let _ = timeout(PATIENCE, converse(stream, server, asks)).await;
        });
        self.0.push_back(Connection { task: task.abort_handle(), asked });
    }
}

/// On a node without IPv6, the unspecified address means all IPv4 addresses.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if address.is_ipv6() && address.ip().is_unspecified() && no_ipv6(&error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

async fn converse<S: Source>(
    stream: TcpStream,
    server: Arc<Server<S>>,
    asked: Arc<AtomicBool>,
) -> hyper::Result<()> {
    let answer = service_fn(move |request| {
        asked.store(true, Ordering::Relaxed);
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.answer(&request).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_PATIENCE)
        .max_buf_size(LONGEST_REQUEST)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}

struct Server<S> {
    purpose: Purpose,
    source: Arc<S>,
    /// The text of the last scrape. Its lock makes other requests wait for a running scrape.
    scraped: Mutex<Option<(Instant, Bytes)>>,
}

impl<S: Source> Server<S> {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
        }
        match (request.uri().path(), self.purpose) {
            ("/metrics", Purpose::Metrics) => self.metrics(request.headers()).await,
            ("/healthz", _) => checked(request.uri().query(), &self.source.health()),
            ("/readyz", _) => checked(request.uri().query(), &self.source.readiness()),
            (_, Purpose::Metrics) => {
                plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into())
            }
            (_, Purpose::Health) => plain(StatusCode::NOT_FOUND, "there are /healthz and /readyz\n".into()),
        }
    }

    async fn metrics(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match self.scrape().await {
            Ok(text) if accepted.contains("application/openmetrics-text") => {
                respond(StatusCode::OK, text::OPEN_METRICS, text)
            }
            Ok(text) => {
                let text = text::prometheus(&String::from_utf8_lossy(&text));
                respond(StatusCode::OK, text::PROMETHEUS, text)
            }
            Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    async fn scrape(&self) -> Result<Bytes, String> {
        let mut scraped = self.scraped.lock().await;
        if let Some((at, text)) = &*scraped
            && at.elapsed() < SCRAPE_LIFETIME
        {
            return Ok(text.clone());
        }
        let snapshot = self.source.snapshot().await?;
        let text = text::open_metrics(&registry(snapshot)).map_err(|error| error.to_string())?;
        let text = Bytes::from(text);
        *scraped = Some((Instant::now(), text.clone()));
        Ok(text)
    }
}

/// One line for each check, in the API server's format, without the checks in `exclude=<name>`.
fn checked(query: Option<&str>, checks: &[Check]) -> Response<Full<Bytes>> {
    let excluded: Vec<&str> =
        query.unwrap_or_default().split('&').filter_map(|pair| pair.strip_prefix("exclude=")).collect();
    let lines = checks.iter().map(|(name, result)| match result {
        Ok(()) => format!("[+] {name}\n"),
        Err(why) if excluded.contains(name) => format!("[ ] {name}, excluded: {why}\n"),
        Err(why) => format!("[-] {name}: {why}\n"),
    });
    let good = checks.iter().all(|(name, result)| result.is_ok() || excluded.contains(name));
    plain(if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, lines.collect())
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text)
}

fn respond(status: StatusCode, content_type: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use redirect_protocol::wire::{FlowStatus, Status};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// An agent whose datapath thread may be stuck, and a counter of requests.
    struct Agent {
        is_stuck: bool,
        asked: AtomicUsize,
    }

    impl Source for Agent {
        async fn snapshot(&self) -> Result<Snapshot, String> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            if self.is_stuck {
                std::future::pending::<()>().await;
            }
            let status = Status {
                version: String::new(),
                pid: 1,
                uptime: 0,
                kernel: String::new(),
                cgroup: String::new(),
                tcx: false,
                features: Vec::new(),
                programs: Vec::new(),
                maps: Vec::new(),
                proxies: Vec::new(),
                counters: Vec::new(),
                repairs: Vec::new(),
                flows: FlowStatus::default(),
            };
            Ok(Snapshot { status, pods: Vec::new(), repairs: Vec::new() })
        }

        fn health(&self) -> Vec<Check> {
            vec![("datapath", Ok(()))]
        }

        fn readiness(&self) -> Vec<Check> {
            vec![("datapath", Ok(()))]
        }
    }

    fn agent(is_stuck: bool) -> Arc<Agent> {
        Arc::new(Agent { is_stuck, asked: AtomicUsize::new(0) })
    }

    async fn ask<S: Source>(server: &Arc<Server<S>>, path: &str) -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(converse(stream, Arc::clone(server), Arc::default()));
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn many_scrapes_at_once_are_one() {
        let agent = agent(false);
        let server = Arc::new(Server {
            purpose: Purpose::Metrics,
            source: Arc::clone(&agent),
            scraped: Mutex::default(),
        });
        let began = Instant::now();
        let answers = futures::future::join_all((0..50).map(|_| ask(&server, "/metrics"))).await;
        assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 200")), "{answers:?}");
        let most = began.elapsed().as_millis() / SCRAPE_LIFETIME.as_millis() + 1;
        let asked = agent.asked.load(Ordering::Relaxed);
        assert!(asked as u128 <= most, "{asked} dumps in {:?}", began.elapsed());
    }

    #[tokio::test]
    async fn health_needs_neither_the_datapath_nor_who_waits_for_it() {
        let agent = agent(true);
        for purpose in [Purpose::Metrics, Purpose::Health] {
            let server = Arc::new(Server { purpose, source: Arc::clone(&agent), scraped: Mutex::default() });
            let stuck = tokio::spawn({
                let server = Arc::clone(&server);
                async move { ask(&server, "/metrics").await }
            });
            for path in ["/healthz", "/readyz"] {
                let answer = timeout(Duration::from_secs(5), ask(&server, path)).await.unwrap();
                assert!(answer.starts_with("HTTP/1.1 200"), "{purpose:?} {path}: {answer}");
            }
            if purpose == Purpose::Health {
                assert!(stuck.await.unwrap().starts_with("HTTP/1.1 404"));
            }
        }
        assert!(agent.asked.load(Ordering::Relaxed) <= 1);
    }
}
