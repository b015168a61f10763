//! The node proxies, by placement: those in pods connect to the agent, the one on the host does not.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::{Linux, ProxyIdentity};
use redirect_ebpf::maps::ProxyPart;
use redirect_protocol::placement::Placement;
use redirect_zds::server::Peer;

use super::checkpoints::Checkpoints;
use super::named_proxies::NamedProxies;
use super::node_ack;
use super::options::Options;
use super::proxy_cgroups::Cgroups;
use super::supervisor::{Stop, Supervisor};

#[derive(Clone)]
pub(super) enum NodeProxies {
    InPods(Arc<Cgroups>),
    OnNode(NamedProxies),
}

impl NodeProxies {
    pub(super) fn new(options: &Options, checkpoints: &Checkpoints) -> anyhow::Result<Self> {
        Ok(match options.placement {
            Placement::Pod => {
                Self::InPods(Arc::new(Cgroups::new(options.proxy_identity, checkpoints.clone())))
            }
            Placement::Node => {
                Self::OnNode(NamedProxies::new(&options.proxy_cgroup, &options.outbound_proxy_cgroup)?)
            }
        })
    }

    /// How to recognize their sockets, given the option.
    pub(super) fn identity(&self, wanted: ProxyIdentity) -> ProxyIdentity {
        match self {
            Self::OnNode(named) if named.is_empty() => {
                tracing::warn!(
                    "no --proxy-cgroup names the node proxy's cgroup: any process with CAP_NET_RAW in the node's network namespace \
                     can pass for it"
                );
                ProxyIdentity::Mark
            }
            Self::InPods(_) | Self::OnNode(_) => wanted,
        }
    }

    /// The cgroups of the known proxies.
    pub(super) async fn known(&self) -> anyhow::Result<BTreeMap<u64, ProxyPart>> {
        match self {
            Self::InPods(cgroups) => Ok(cgroups.known().await),
            Self::OnNode(named) => named.all(),
        }
    }

    /// Admits a process that connects as a proxy, before any pod is sent to it.
    pub(super) async fn admit(&self, kernel: &DatapathHandle<Linux>, peer: Peer) -> anyhow::Result<()> {
        match self {
            Self::InPods(cgroups) => cgroups.admit(kernel, peer).await,
            Self::OnNode(_) => node_ack::admit(&peer),
        }
    }

    /// Starts the acknowledgements on behalf of a proxy that does not connect.
    pub(super) fn serve_node_ack(
        self,
        supervisor: &mut Supervisor,
        kernel: &DatapathHandle<Linux>,
        zds_socket: &Path,
    ) {
        let Self::OnNode(named) = self else { return };
        let (kernel, zds_socket) = (kernel.clone(), zds_socket.to_owned());
        supervisor
            .restarting("cgroups of the node proxy", Stop::Cut, move || named.clone().follow(kernel.clone()));
        supervisor.restarting("stand-in for the node proxy", Stop::Cut, move || {
            node_ack::acknowledge(zds_socket.clone())
        });
    }
}
