//! Serves them: HTTP/1, one answer per path.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::{Snapshot, registry, text};

/// How long a connection may last, and an answer take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many are served at once; others wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 16;

/// How long to wait before a port that is taken is tried again.
const PAUSE: Duration = Duration::from_secs(5);

/// One thing that an answer depends on, and what is wrong with it.
pub(crate) type Check = (&'static str, Result<(), String>);

/// What is asked.
pub(crate) trait Source: Send + Sync + 'static {
    /// The state of the agent.
    fn snapshot(&self) -> impl Future<Output = Result<Snapshot, String>> + Send;

    /// What has to hold for the agent to be of any use: otherwise it should be restarted.
    fn health(&self) -> impl Future<Output = Vec<Check>> + Send;

    /// What has to hold for new pods to be enrolled.
    fn readiness(&self) -> impl Future<Output = Vec<Check>> + Send;
}

/// Serves until `shutdown`. A port that is taken is tried again: pods are steered without metrics as well.
pub(crate) async fn serve(address: SocketAddr, source: Arc<impl Source>, shutdown: impl Future<Output = ()>) {
    let mut shutdown = pin!(shutdown);
    tokio::select! {
        () = &mut shutdown => {}
        () = listen(address, source) => {}
    }
}

async fn listen(address: SocketAddr, source: Arc<impl Source>) {
    let mut told = false;
    let listener = loop {
        match bind(address).await {
            Ok(listener) => break listener,
            Err(error) if !told => {
                told = true;
                tracing::error!(%address, %error, "metrics can't be served, which is tried again: see --metrics-address");
            }
            Err(_) => {}
        }
        sleep(PAUSE).await;
    };
    tracing::info!(address = ?listener.local_addr().ok(), "metrics are served");
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let source = Arc::clone(&source);
                tokio::spawn(async move {
                    // Whatever goes wrong is the client's business.
                    let _ = timeout(PATIENCE, converse(stream, source)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a client of the metrics can't be accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// On a node without IPv6, all addresses are all IPv4 addresses.
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

async fn converse<S: Source>(stream: TcpStream, source: Arc<S>) -> hyper::Result<()> {
    let answer = service_fn(move |request| {
        let source = Arc::clone(&source);
        async move { Ok::<_, Infallible>(answer(&request, &*source).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer)
        .await
}

async fn answer<S: Source>(request: &Request<Incoming>, source: &S) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
    }
    match request.uri().path() {
        "/metrics" => metrics(source.snapshot().await, request.headers()),
        "/healthz" => checked(request.uri().query(), &source.health().await),
        "/readyz" => checked(request.uri().query(), &source.readiness().await),
        _ => plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into()),
    }
}

fn metrics(snapshot: Result<Snapshot, String>, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let written = snapshot
        .and_then(|snapshot| text::open_metrics(&registry(snapshot)).map_err(|error| error.to_string()));
    let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match written {
        Ok(text) if accepted.contains("application/openmetrics-text") => {
            respond(StatusCode::OK, text::OPEN_METRICS, text)
        }
        Ok(text) => respond(StatusCode::OK, text::PROMETHEUS, text::prometheus(&text)),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// One line for each check, as the API server writes them; what `exclude=<name>` names does not count, as there.
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

fn respond(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}
