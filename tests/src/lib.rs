//! Harness of the end-to-end tests and of the demo: nodes and pods made of network namespaces, wired by a real CNI
//! chain, with a real agent and a real node proxy in them.
//!
//! ```text
//! Session            this process: its cgroup, its signals, what must be gone at the end
//!  └─ Node           a network namespace with a bridge, an agent and a proxy
//!      └─ Pod        a network namespace, attached by bridge + host-local [+ redirect-cni]
//!          ├─ Server       listens in the pod, greets, echoes, remembers who came
//!          └─ Connection   dialled from the pod by a Stack: AF_INET, AF_INET6 or v4-mapped
//! ```
//!
//! Nothing touches the devices and addresses of the host. Only file descriptors hold namespaces, and child
//! processes die with the thread that spawns them. So even a killed test leaves no more than an empty cgroup,
//! which the next [`session::Session`] removes.

pub mod access_log;
pub mod agent;
pub mod bench;
pub mod caller;
pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod connection;
pub mod containerd;
pub mod dns;
pub mod echo;
pub mod faults;
pub mod foreign;
pub mod kernel;
pub mod load;
pub mod monitor;
pub mod netns;
pub mod node;
pub mod pod;
pub mod podman;
pub mod process;
pub mod proxy;
pub mod server;
pub mod session;
pub mod signals;
pub mod specification;
pub mod stack;
pub mod terminal;
pub mod testbed;
pub mod traffic;
pub mod transcript;
pub mod wait;

pub use access_log::{Direction, Entry};
pub use caller::Caller;
pub use cluster::Cluster;
pub use connection::Connection;
pub use monitor::Monitor;
pub use netns::Netns;
pub use node::{Node, NodeOptions, ProxyOptions};
pub use pod::{Pod, PodSpec};
pub use proxy::ProxyKind;
pub use server::Server;
pub use session::Session;
pub use stack::{Families, Stack};
