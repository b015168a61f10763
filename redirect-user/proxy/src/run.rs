//! Options, signals, the end.

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

/// How long to wait before another attempt to open the listeners of a pod, as ztunnel does.
const RETRY: Duration = Duration::from_secs(5);

/// Where the DNS servers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Settings of the node proxy.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen: in each pod that the agent names, or once on this node
    #[arg(long, value_enum, default_value_t, env = "REDIRECT_PLACEMENT")]
    pub placement: Placement,
    /// Where the agent listens
    #[arg(long, default_value = zds::DEFAULT_SOCKET, env = "REDIRECT_ZDS_SOCKET")]
    pub zds_socket: PathBuf,
    /// Where a line about each connection and each DNS question goes, `-` is standard output; nowhere by default
    #[arg(long, env = "REDIRECT_ACCESS_LOG")]
    pub access_log: Option<PathBuf>,
    /// How long connections may go on after the proxy was told to stop, in seconds
    #[arg(long, default_value_t = 5)]
    pub drain: u64,
    /// Whether to listen on IPv6 where a pod has it
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, env = "IPV6_ENABLED")]
    pub ipv6_enabled: bool,
    /// Where the original destination of a connection is found
    #[arg(long, value_enum, default_value_t)]
    pub original_destination: OriginalDestination,
    /// The servers that DNS questions of pods go to, as seen from the pods, each `address` or `address:port`; those of
    /// the proxy's own /etc/resolv.conf by default
    #[arg(long, value_delimiter = ',', value_parser = parse_upstream, value_name = "SERVER")]
    pub dns_upstream: Vec<SocketAddr>,
    /// Threads that relay; one per processor by default
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub worker_threads: Option<u16>,
}

/// Where the original destination of a connection is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OriginalDestination {
    /// The accepted socket's own address: nobody rewrote it.
    #[default]
    Socket,
    /// What conntrack remembers, if anything: for pods whose connections rules of netfilter redirect.
    Conntrack,
}

/// Runs the proxy until it is told to stop.
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
    // Ends every task, and with the last one the log's last handle, so that its thread can finish.
    drop(runtime);
    if let Some(writer) = writer
        && writer.join().is_err()
    {
        tracing::error!("access log: its thread failed");
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
    tracing::info!("stopping, connections may go on for {} s", options.drain);
    tokio::select! {
        () = pods.drain(Duration::from_secs(options.drain)) => {}
        () = stop.asked() => tracing::info!("asked twice, stopping at once"),
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
