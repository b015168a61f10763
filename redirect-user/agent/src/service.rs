//! Serves requests of the CNI plugin and the CLI.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use futures::stream::BoxStream;
use tokio::sync::watch;

use super::enrollment::{self, Enrollment};
use super::flows::Flows;
use super::health::Findings;
use super::inspect;
use super::peer_auth;
use super::pods::{self, Pods, Wanted};
use super::supervisor::Services;
use crate::metrics::Snapshot;
use crate::metrics::events::events;
use crate::metrics::server::{Check, Source};
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_linux::netns::NetNs;
use redirect_linux::peer_process::PeerProcess;
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::server::Handler;
use redirect_protocol::wire::{
    Error, ErrorKind, FeatureReport, FlowFilter, FlowStatus, ProxyReport, Reply, Request, Status,
};
use redirect_zds::server::{AddError, Handle};

pub(super) struct Service {
    pub(super) pods: Arc<Pods<Linux>>,
    pub(super) enrollment: Arc<dyn Enrollment>,
    pub(super) kernel: DatapathHandle<Linux>,
    pub(super) proxies: Handle,
    pub(super) started: Instant,
    pub(super) cgroup: String,
    /// The kernel's features, as probed.
    pub(super) features: Vec<FeatureReport>,
    pub(super) placement: Placement,
    pub(super) flows: Flows,
    /// Whether the agent knows all pods that Kubernetes wants captured.
    pub(super) reconciled: watch::Receiver<bool>,
    /// The findings of the last examination of kernel and chain.
    pub(super) findings: watch::Receiver<Findings>,
    /// The states of the agent's services.
    pub(super) services: Services,
}

impl Handler for Service {
    async fn permit(&self, process: &PeerProcess) -> Result<(), Error> {
        let permitted = peer_auth::check(&self.kernel, process).await;
        permitted.map_err(|error| Error::new(ErrorKind::Denied, format!("{error:#}")))
    }

    async fn monitor(&self, filter: FlowFilter) -> Result<BoxStream<'static, Reply>, Error> {
        self.flows.listen(filter).await
    }

    async fn handle(&self, request: Request, netns: Option<OwnedFd>) -> Vec<Reply> {
        let command = command(&request);
        let replies = self.answer(request, netns).await;
        if let (Some(command), Some(reply)) = (command, replies.last()) {
            events().cni(command, result(reply));
        }
        replies
    }
}

impl Source for Service {
    async fn snapshot(&self) -> Result<Snapshot, String> {
        let status = self.status().await.map_err(|error| error.message)?;
        let repairs = self.pods.repairs().counts().map(|(kind, count)| (kind.label(), count)).collect();
        Ok(Snapshot { status, pods: self.pods.report().await, repairs })
    }

    fn health(&self) -> Vec<Check> {
        vec![("datapath", self.findings.borrow().datapath()), ("services", self.services.health())]
    }

    fn readiness(&self) -> Vec<Check> {
        let proxy = match self.ready() {
            Reply::Error(error) => Err(error.message),
            _ => Ok(()),
        };
        let reconciled = if *self.reconciled.borrow() {
            Ok(())
        } else {
            Err("no pod list from the API server yet".into())
        };
        let findings = self.findings.borrow();
        vec![
            ("datapath", findings.datapath()),
            ("proxy", proxy),
            ("pods", reconciled),
            ("chain", findings.chain()),
            ("services", self.services.readiness()),
        ]
    }
}

impl Service {
    async fn answer(&self, request: Request, netns: Option<OwnedFd>) -> Vec<Reply> {
        match request {
            Request::Add { attachment, pod, addresses, netns_path } => {
                let Some(netns) = netns else { return vec![no_namespace()] };
                let wanted = Wanted { identity: pod, addresses, ..Wanted::default() };
                let netns = NetNs::from_fd(netns).at(netns_path);
                vec![enrollment::add(&self.pods, &*self.enrollment, attachment, wanted, netns).await]
            }
            Request::Del { attachment } => {
                vec![
                    self.pods
                        .del(&attachment)
                        .await
                        .map_or_else(|error| Reply::Error(error.into()), |()| Reply::Done),
                ]
            }
            Request::Check { attachment, addresses } => {
                vec![enrollment::check(&self.pods, &*self.enrollment, &attachment, &addresses).await]
            }
            Request::Gc { valid } => {
                self.pods.collect(&valid).await;
                vec![Reply::Done]
            }
            Request::Ready => vec![self.ready()],
            Request::Status => {
                vec![self.status().await.map_or_else(Reply::Error, |status| Reply::Status(Box::new(status)))]
            }
            Request::Pod { name } => {
                let detail = inspect::pod(&self.pods, &self.kernel, self.placement, &name).await;
                vec![detail.map_or_else(Reply::Error, |detail| Reply::Pod(Box::new(detail)))]
            }
            Request::Explain { from, to, transport } => {
                let question = inspect::Question { from, to, transport };
                let explained = inspect::explain(&self.pods, &self.kernel, self.placement, question).await;
                vec![explained.map_or_else(Reply::Error, |explained| Reply::Explained(Box::new(explained)))]
            }
            Request::Pods => match inspect::pods(&self.pods, &self.kernel).await {
                Ok(reports) => Reply::pods(reports),
                Err(error) => vec![Reply::Error(error)],
            },
            // `monitor` answers the first, and the server assembles the second.
            Request::Monitor { .. } | Request::GcPart { .. } => Vec::new(),
        }
    }
}

/// The plugin's command, as metrics name it.
fn command(request: &Request) -> Option<&'static str> {
    match request {
        Request::Add { .. } => Some("add"),
        Request::Del { .. } => Some("del"),
        Request::Check { .. } => Some("check"),
        Request::Gc { .. } | Request::GcPart { .. } => Some("gc"),
        Request::Ready => Some("status"),
        Request::Status
        | Request::Pods
        | Request::Pod { .. }
        | Request::Explain { .. }
        | Request::Monitor { .. } => None,
    }
}

fn result(reply: &Reply) -> &'static str {
    match reply {
        Reply::Added { enrolled: false } => "not_enrolled",
        Reply::Error(error) => error.kind.label(),
        _ => "ok",
    }
}

fn no_namespace() -> Reply {
    Reply::Error(Error::new(ErrorKind::Malformed, "the request carries no network namespace"))
}

impl Service {
    pub(super) fn ready(&self) -> Reply {
        if self.proxies.proxies().iter().any(|proxy| proxy.synced) {
            return Reply::Done;
        }
        Reply::Error(Error::new(
            ErrorKind::TryAgain,
            "no node proxy is connected to the agent: is ztunnel running on this node?",
        ))
    }

    pub(super) async fn status(&self) -> Result<Status, Error> {
        let report = inspect::read(self.kernel.run(|linux| linux.report()).await)?;
        let proxies = self.proxies.proxies().into_iter().map(|proxy| ProxyReport {
            pid: proxy.peer.process.pid().cast_unsigned(),
            cgroup: proxy.peer.cgroup_path,
            synced: proxy.synced,
            acknowledged: proxy.acknowledged,
            refused: proxy.refused,
        });
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime: self.started.elapsed().as_secs(),
            kernel: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            cgroup: self.cgroup.clone(),
            tcx: report.tcx,
            features: self.features.clone(),
            programs: report.programs,
            maps: report.maps,
            proxies: proxies.collect(),
            counters: report.counters,
            repairs: self.pods.repairs().report(),
            flows: FlowStatus {
                listeners: self.flows.listeners(),
                rate_limit: report.flows_limited,
                ring_full: report.flows_full,
                slow_listener: self.flows.lost_by_listeners(),
            },
        })
    }
}

impl From<pods::Error> for Error {
    fn from(error: pods::Error) -> Self {
        let kind = match &error {
            pods::Error::Datapath(_) | pods::Error::NotRemoved { .. } => ErrorKind::Datapath,
            pods::Error::Thread(_)
            | pods::Error::Cookie { .. }
            | pods::Error::Addresses { .. }
            | pods::Error::Listeners { .. }
            | pods::Error::Checkpoint { .. } => ErrorKind::Internal,
            pods::Error::Proxy(AddError::NotConnected { .. } | AddError::Timeout { .. }) => {
                ErrorKind::TryAgain
            }
            pods::Error::Proxy(_) => ErrorKind::Proxy,
            pods::Error::HostNetwork(_)
            | pods::Error::NoAddresses(_)
            | pods::Error::SameUid { .. }
            | pods::Error::ForeignAddress { .. }
            | pods::Error::Workload(_) => ErrorKind::Malformed,
            pods::Error::NoNamespace(_) | pods::Error::NamespaceTaken(_) | pods::Error::TakenDown(_) => {
                ErrorKind::TryAgain
            }
            pods::Error::Unknown(_) => ErrorKind::Unknown,
            pods::Error::Missing { .. } => ErrorKind::Mismatch,
        };
        Self::new(kind, error.to_string())
    }
}
