//! The agent: receives pods from the CNI plugin, enrolls them in the kernel, announces them to the node proxy.
//!
//! ```text
//!  redirect-cni ──wire──▶ service ──▶ pods ──▶ thread ──▶ datapath (facts, diff) ──▶ linux: maps, TC, netlink, sysctls
//!  redirect status, pods ──wire──▶    │  ▲
//!                                     ▼  └── watch: new interfaces in pods
//!                              zds::server ──▶ node proxy
//! ```

mod cgroup_watch;
pub mod checkpoints;
mod drift;
mod drop_log;
pub(crate) mod enrollment;
mod flows;
mod health;
mod inspect;
pub mod install;
pub mod kube;
pub mod metrics;
mod named_proxies;
mod node_ack;
mod node_proxies;
mod options;
mod peer_auth;
pub(crate) mod placement_change;
mod pods;
mod probes;
mod proxy_cgroups;
mod ready;
pub mod repairs;
mod run;
mod service;
mod service_accounts;
mod supervisor;
pub mod uninstall;
mod upkeep;
pub(crate) mod watch;

pub use options::Options;
pub use run::run;
