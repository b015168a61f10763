//! Settings of the agent.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use redirect_ebpf::Direction;

use super::checkpoints;
use super::probes::Probers;
use super::service_accounts::ServiceAccount;
use crate::{install, kube, metrics};
use redirect_datapath::linux::{self, NotedBy, ProxyIdentity, TcMethod};
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::{Exclusion, network};
use redirect_protocol::wire;
use redirect_zds as zds;

/// The maximum length of the runtime's list of valid attachments, and of the directory of checkpoints.
const MOST_PODS: i64 = wire::MAX_ATTACHMENTS as i64;

/// Settings of the agent.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// UNIX socket for the CNI plugin and the CLI
    #[arg(long, default_value = wire::DEFAULT_SOCKET, env = "REDIRECT_SOCKET", value_name = "FILE")]
    pub socket: PathBuf,
    /// UNIX socket for node proxies (ZDS)
    #[arg(long, default_value = zds::DEFAULT_SOCKET, env = "REDIRECT_ZDS_SOCKET", value_name = "FILE")]
    pub zds_socket: PathBuf,
    /// Where the node proxy listens
    #[arg(long, value_enum, default_value_t, env = "REDIRECT_PLACEMENT")]
    pub placement: Placement,
    /// Placement `node`: priority of the host's routing rule; rules that route to pods must come later
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..), value_name = "NUMBER")]
    pub rule_priority: u32,
    /// Placement `node`: cgroup of a node proxy that does not mark its sockets; can be repeated
    #[arg(long, value_name = "DIRECTORY")]
    pub proxy_cgroup: Vec<PathBuf>,
    /// Placement `node`: cgroup of the part of such a proxy that listens on port 15001, if its other part has a cgroup of its
    /// own (--proxy-cgroup): connections between pods of the node then pass the proxy on both sides
    #[arg(long, value_name = "DIRECTORY")]
    pub outbound_proxy_cgroup: Vec<PathBuf>,
    /// Placement `node`: drop packets of pods whose source address is not the pod's. Addresses of other enrolled pods are
    /// always dropped
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub source_ip_verification: bool,
    /// Root of the cgroup2 hierarchy (default: the cgroup2 mount)
    #[arg(long, value_name = "DIRECTORY")]
    pub cgroup: Option<PathBuf>,
    /// Directory on a bpffs for the pins of maps and links, which outlive the agent
    #[arg(long, default_value = linux::DEFAULT_DIRECTORY, env = "REDIRECT_PIN_DIR", value_name = "DIRECTORY")]
    pub pin_dir: PathBuf,
    /// Directory for checkpoints of enrolled pods, which the next agent reads
    #[arg(long, default_value = checkpoints::DEFAULT_DIRECTORY, env = "REDIRECT_STATE_DIR", value_name = "DIRECTORY")]
    pub state_dir: PathBuf,
    /// What to do with enrolled pods when the agent stops
    #[arg(long, value_enum, default_value_t)]
    pub on_exit: OnExit,
    /// Resync interval for state the kernel sends no notifications for (pins, sysctls, map entries), in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..), value_name = "SECONDS")]
    pub check_interval: u64,
    /// Address and port that serve /metrics, /healthz and /readyz over HTTP
    #[arg(long, default_value = metrics::DEFAULT_ADDRESS, env = "REDIRECT_METRICS_ADDRESS", value_name = "ADDRESS:PORT")]
    pub metrics_address: SocketAddr,
    /// Address and port that serve only /healthz and /readyz over HTTP, for kubelet probes
    #[arg(long, default_value = metrics::DEFAULT_HEALTH_ADDRESS, env = "REDIRECT_HEALTH_ADDRESS", value_name = "ADDRESS:PORT")]
    pub health_address: SocketAddr,
    /// Report 1 in N connections to monitors (`redirect monitor`)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub flow_sample: u32,
    /// Report at most this many connections per second and CPU to monitors
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..), value_name = "NUMBER")]
    pub flow_rate: u32,
    /// eBPF object to load instead of the embedded one, for development
    #[arg(long, hide = true)]
    pub object: Option<PathBuf>,
    /// Which programs store the node proxy's listeners for the socket lookup (default: by kernel support)
    #[arg(long, value_enum, hide = true)]
    pub listeners_noted_by: Option<NotedBy>,
    /// Maximum number of enrolled pods, at most 65536
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=MOST_PODS), value_name = "NUMBER")]
    pub max_pods: u32,
    /// Maximum number of addresses of enrolled pods, per family (default: --max-pods)
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "NUMBER")]
    pub max_addresses: Option<u32>,
    /// Maximum number of excluded ports, and of excluded networks per family
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..), value_name = "NUMBER")]
    pub max_exclusions: u32,
    /// How long the enrollment of a pod waits for the node proxy, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..), value_name = "SECONDS")]
    pub proxy_deadline: u64,
    /// How to recognize the node proxy's own sockets
    #[arg(long, value_enum, default_value_t)]
    pub proxy_identity: ProxyIdentity,
    /// What to do with connections and DNS queries while no node proxy listens in the pod
    #[arg(long, value_enum, default_value_t)]
    pub without_proxy: WithoutProxy,
    /// What to do with TCP connections of pods to IPv6 link-local addresses (fe80::/10)
    #[arg(long, value_enum, default_value_t)]
    pub link_local: LinkLocal,
    /// Redirect DNS queries of pods to the node proxy's resolver
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub dns: bool,
    /// Without Kubernetes: service accounts of pods, each NAMESPACE/NAME=ACCOUNT. A * at the end of the name stands for anything,
    /// and the first that matches counts. One that the runtime names in CNI_ARGS (K8S_POD_SERVICE_ACCOUNT) comes before
    #[arg(long, value_delimiter = ',', value_name = "POD=ACCOUNT", conflicts_with = "kubernetes")]
    pub service_account: Vec<ServiceAccount>,
    /// How to attach TC programs
    #[arg(long, value_enum, default_value_t)]
    pub tc: TcMethod,
    /// Whose connections to pods are probes.
    #[command(flatten)]
    pub probers: Probers,
    /// Connections that are captured in no pod.
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

/// What happens to enrolled pods when the agent stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExit {
    /// `remove` if the agent's DaemonSet was deleted, otherwise `keep`. A 401, a 403 or an unreachable API server is not
    /// treated as a deletion.
    #[default]
    Auto,
    /// They stay enrolled, and the next agent adopts them.
    Keep,
    /// The agent un-enrolls them and removes everything from the node.
    Remove,
}

/// What happens to connections while no node proxy listens. They never bypass it in plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WithoutProxy {
    /// SYNs and DNS queries are dropped until a proxy listens; when they are sent again, they reach it.
    #[default]
    Hold,
    /// Connections and DNS queries are refused at once; DNS over UDP gets no answer in placement `node`.
    Refuse,
}

/// What becomes of TCP connections to IPv6 link-local addresses, which a node proxy cannot make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LinkLocal {
    /// They are refused.
    #[default]
    Drop,
    /// They leave the pod past the proxy, in plaintext.
    Pass,
}

/// Connections that are captured in no pod. Networks and ports are separated by commas.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Exclude {
    /// Don't capture outbound connections to these networks
    #[arg(long, value_delimiter = ',', value_name = "CIDR", value_parser = network)]
    pub exclude_outbound_networks: Vec<IpNet>,
    /// Don't capture outbound connections to these ports
    #[arg(long, value_delimiter = ',', value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub exclude_outbound_ports: Vec<u16>,
    /// Don't capture inbound connections from these networks
    #[arg(long, value_delimiter = ',', value_name = "CIDR", value_parser = network)]
    pub exclude_inbound_networks: Vec<IpNet>,
    /// Don't capture inbound connections to these ports
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
