//! Options, signals, shutdown.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Shared;
use super::access_log::AccessLog;
use super::pods::Pods;
use super::resolver::{Upstreams, parse_upstream};
use super::sockets::Namespaces;
use redirect_linux::netns::NetNs;
use redirect_linux::{descriptors, privileges};
use redirect_protocol::placement::Placement;
use redirect_zds as zds;
use redirect_zds::client::{Backoff, follow};

/// The interval between attempts to open a pod's listeners, as in ztunnel.
const RETRY: Duration = Duration::from_secs(5);

/// The default source of DNS servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Settings of the node proxy.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen
    #[arg(long, value_enum, default_value_t, env = "REDIRECT_PLACEMENT")]
    pub placement: Placement,
    /// The agent's UNIX socket for node proxies (ZDS)
    #[arg(long, default_value = zds::DEFAULT_SOCKET, env = "REDIRECT_ZDS_SOCKET", value_name = "FILE")]
    pub zds_socket: PathBuf,
    /// File for the access log, one line per connection and DNS query; `-` is standard output (default: no log)
    #[arg(long, env = "REDIRECT_ACCESS_LOG", value_name = "FILE")]
    pub access_log: Option<PathBuf>,
    /// How long open connections may continue after the proxy is told to stop, in seconds
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    pub drain: u64,
    /// Listen on IPv6 in pods that have it
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, env = "IPV6_ENABLED", value_name = "BOOL")]
    pub ipv6_enabled: bool,
    /// How to find the original destination of a connection
    #[arg(long, value_enum, default_value_t, value_name = "SOURCE")]
    pub original_destination: OriginalDestination,
    /// DNS servers that queries of pods are forwarded to, reachable from the pods, each `address` or `address:port`
    /// (default: those of the proxy's /etc/resolv.conf)
    #[arg(long, value_delimiter = ',', value_parser = parse_upstream, value_name = "SERVER")]
    pub dns_upstream: Vec<SocketAddr>,
    /// Number of worker threads (default: one per CPU)
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..), value_name = "NUMBER")]
    pub worker_threads: Option<u16>,
}

/// The source of a connection's original destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OriginalDestination {
    /// The accepted socket's local address, which nothing has rewritten.
    #[default]
    Socket,
    /// The conntrack entry, if any: for pods whose connections netfilter rules redirect.
    Conntrack,
}

/// Runs the proxy until a signal stops it.
pub fn run(options: Options) -> anyhow::Result<()> {
    privileges::keep(privileges::PROXY)?;
    descriptors::raise_limit();
    let (access_log, writer) = match &options.access_log {
        Some(path) => {
            let opened = AccessLog::open(path);
            let (log, writer) = opened.with_context(|| format!("--access-log {}", path.display()))?;
            (Some(log), Some(writer))
        }
        None => (None, None),
    };
    let mut builder = Builder::new_multi_thread();
    if let Some(threads) = options.worker_threads {
        builder.worker_threads(threads.into());
    }
    let runtime = builder.enable_all().build().context("starting the runtime")?;
    let result = runtime.block_on(serve(options, access_log));
    // Ends every task, and with them the log's last handle, so that its thread can finish.
    drop(runtime);
    if let Some(writer) = writer
        && writer.join().is_err()
    {
        tracing::error!("access log: thread failed");
    }
    result
}

async fn serve(options: Options, access_log: Option<AccessLog>) -> anyhow::Result<()> {
    let mut stop = Stop::new().context("listening for signals")?;
    let namespaces = Namespaces::start().context("starting the thread that enters network namespaces")?;
    let upstreams = Arc::new(Upstreams::new(&options.dns_upstream, Path::new(RESOLV_CONF)));
    let shared = Shared {
        namespaces,
        access_log,
        ipv6: options.ipv6_enabled,
        original_destination: options.original_destination,
        placement: options.placement,
        upstreams,
        retry: RETRY,
    };
    let pods = match options.placement {
        Placement::Pod => {
            let mut pods = Pods::new(shared);
            tokio::select! {
                () = follow(&options.zds_socket, &mut pods, Backoff::default()) => {}
                () = stop.asked() => {}
            }
            pods
        }
        Placement::Node => {
            let host = NetNs::current().context("the host's network namespace")?;
            let node = Pods::on_node(shared, host).await;
            stop.asked().await;
            node
        }
    };
    tracing::info!("stopping; connections have {} s to finish", options.drain);
    tokio::select! {
        () = pods.drain(Duration::from_secs(options.drain)) => {}
        () = stop.asked() => tracing::info!("second signal: stopping at once"),
    }
    Ok(())
}

/// The signals that end the process.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
