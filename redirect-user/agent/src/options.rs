//! Settings of the agent.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use redirect_ebpf::Direction;

use super::probes::Probers;
use super::proxy_cgroups::ProxyIdentity;
use super::records;
use crate::{install, kube, metrics};
use redirect_datapath::linux::{self, NotedBy, TcMethod};
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::{Exclusion, network};
use redirect_protocol::wire;
use redirect_zds as zds;

/// Settings of the agent.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the CNI plugin and the command line find the agent
    #[arg(long, default_value = wire::DEFAULT_SOCKET, env = "REDIRECT_SOCKET")]
    pub socket: PathBuf,
    /// Where node proxies find the agent
    #[arg(long, default_value = zds::DEFAULT_SOCKET, env = "REDIRECT_ZDS_SOCKET")]
    pub zds_socket: PathBuf,
    /// Where the node proxy's listeners are
    #[arg(long, value_enum, default_value_t, env = "REDIRECT_PLACEMENT")]
    pub placement: Placement,
    /// Placement `node`: the priority of the host's routing rule; rules that look pods' addresses up have to come later
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub rule_priority: u32,
    /// Placement `node`: a cgroup whose processes are the node proxy, for proxies that do not mark their sockets
    #[arg(long, value_name = "DIRECTORY")]
    pub proxy_cgroup: Vec<PathBuf>,
    /// Placement `node`: likewise, of the part of such a proxy that listens on port 15001, where the rest has a cgroup of its
    /// own (--proxy-cgroup): what it connects to another pod of the node comes in there through the proxy as well
    #[arg(long, value_name = "DIRECTORY")]
    pub outbound_proxy_cgroup: Vec<PathBuf>,
    /// Placement `node`: drop what pods send from addresses that are not theirs; addresses of other enrolled pods are
    /// never let pass
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub source_ip_verification: bool,
    /// Root of the cgroup2 hierarchy; found among the mounts by default
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// Where maps and links are pinned, so that they outlive the agent: a directory of a bpffs
    #[arg(long, default_value = linux::DEFAULT_DIRECTORY, env = "REDIRECT_PIN_DIR")]
    pub pin_dir: PathBuf,
    /// Where the agent writes down which pods it steers, for the agent after it
    #[arg(long, default_value = records::DEFAULT_DIRECTORY, env = "REDIRECT_STATE_DIR")]
    pub state_dir: PathBuf,
    /// What becomes of the pods when the agent is told to end
    #[arg(long, value_enum, default_value_t)]
    pub on_exit: OnExit,
    /// How often it is looked whether others changed what the kernel tells nobody of (pins, sysctls), in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub check_interval: u64,
    /// Address and port that serve /metrics, and /healthz and /readyz as well, over HTTP
    #[arg(long, default_value = metrics::DEFAULT_ADDRESS, env = "REDIRECT_METRICS_ADDRESS")]
    pub metrics_address: SocketAddr,
    /// Address and port that serve /healthz and /readyz alone over HTTP, for the kubelet's probes
    #[arg(long, default_value = metrics::DEFAULT_HEALTH_ADDRESS, env = "REDIRECT_HEALTH_ADDRESS")]
    pub health_address: SocketAddr,
    /// Of how many connections one is told to those who listen (`redirect monitor`)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub flow_sample: u32,
    /// How many connections are told of in a second, on each CPU
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub flow_rate: u32,
    /// Another eBPF object than the embedded one, for development
    #[arg(long, hide = true)]
    pub object: Option<PathBuf>,
    /// Who notes the node proxy's listeners for the socket lookup; as the kernel allows it by default
    #[arg(long, value_enum, hide = true)]
    pub listeners_noted_by: Option<NotedBy>,
    /// How many pods can be enrolled at once
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_pods: u32,
    /// How many addresses of each family enrolled pods can have; one per pod by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_addresses: Option<u32>,
    /// How many ports, and how many networks of each family, can be excluded in all
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_exclusions: u32,
    /// How long an enrolment waits for the node proxy, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub proxy_deadline: u64,
    /// How the node proxy's own sockets are recognised
    #[arg(long, value_enum, default_value_t)]
    pub proxy_identity: ProxyIdentity,
    /// What becomes of connections while no node proxy listens in the pod
    #[arg(long, value_enum, default_value_t)]
    pub without_proxy: WithoutProxy,
    /// Send the DNS questions of pods to the node proxy's resolver
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub dns: bool,
    /// How TC programs are attached
    #[arg(long, value_enum, default_value_t)]
    pub tc: TcMethod,
    /// Whose connections to pods are probes.
    #[command(flatten)]
    pub probers: Probers,
    /// What is not steered, in any pod.
    #[command(flatten)]
    pub exclude: Exclude,
    /// Kubernetes.
    #[command(flatten)]
    pub kubernetes: kube::Options,
    /// Keep the CNI plugin in this node's chain
    #[arg(long, help_heading = "CNI chain")]
    pub install_cni: bool,
    /// The CNI chain.
    #[command(flatten)]
    pub chain: install::Options,
}

/// What becomes of the pods when the agent is told to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExit {
    /// As `remove` if the agent's DaemonSet is gone or being deleted, else, also if that can't be told, as `keep`.
    #[default]
    Auto,
    /// They stay steered, and the next agent takes them over.
    Keep,
    /// Everything is removed.
    Remove,
}

/// What becomes of connections while no node proxy listens. None of it is plaintext past the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WithoutProxy {
    /// They wait: a retransmission meets the proxy when it is back.
    #[default]
    Hold,
    /// They are refused at once.
    Refuse,
}

/// Connections that are not steered, in any pod. Networks and ports are separated by commas.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Exclude {
    /// Destination networks of outbound connections
    #[arg(long, value_delimiter = ',', value_name = "CIDR", value_parser = network)]
    pub exclude_outbound_networks: Vec<IpNet>,
    /// Destination ports of outbound connections
    #[arg(long, value_delimiter = ',', value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub exclude_outbound_ports: Vec<u16>,
    /// Source networks of inbound connections
    #[arg(long, value_delimiter = ',', value_name = "CIDR", value_parser = network)]
    pub exclude_inbound_networks: Vec<IpNet>,
    /// Destination ports of inbound connections
    #[arg(long, value_delimiter = ',', value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub exclude_inbound_ports: Vec<u16>,
}

impl Exclude {
    pub(super) fn exclusions(&self) -> BTreeSet<Exclusion> {
        let networks = |direction, networks: &[IpNet]| -> Vec<Exclusion> {
            networks.iter().map(|network| Exclusion::Network(direction, *network)).collect()
        };
        let ports = |direction, ports: &[u16]| -> Vec<Exclusion> {
            ports.iter().map(|port| Exclusion::Port(direction, *port)).collect()
        };
        [
            networks(Direction::Outbound, &self.exclude_outbound_networks),
            ports(Direction::Outbound, &self.exclude_outbound_ports),
            networks(Direction::Inbound, &self.exclude_inbound_networks),
            ports(Direction::Inbound, &self.exclude_inbound_ports),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
