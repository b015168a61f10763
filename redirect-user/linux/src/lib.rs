//! Linux interfaces that neither std nor aya provides: bpf(2), links, netlink, sysctls, namespaces, cgroups, privileges, and
//! probes of the node's features. Nothing here knows about pods.

pub mod bpf;
pub mod bpffs;
pub mod cgroup;
pub mod descriptors;
pub mod link;
pub mod lock;
pub mod netlink;
pub mod netns;
pub mod peer_process;
pub mod privileges;
pub mod probe;
pub mod proc_sys;
pub mod socket_file;
pub mod systemd;
