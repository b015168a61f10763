//! Permanently drops privileges that a process does not need.
//!
//! Capabilities belong to a thread, and new threads inherit them: so this must run before any thread starts.

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl::set_no_new_privs;

pub use caps::Capability;

/// What the agent keeps.
///
/// | capability | what for |
/// |---|---|
/// | `CAP_BPF`, `CAP_PERFMON` | programs and maps |
/// | `CAP_NET_ADMIN` | attaching them; rules, routes and TC filters of pods |
/// | `CAP_NET_BROADCAST` | notifications from all pods' network namespaces (`NETLINK_LISTEN_ALL_NSID`) |
/// | `CAP_SYS_ADMIN` | entering the network namespaces of pods, bpffs |
/// | `CAP_SYS_PTRACE` | finding the network namespaces of pods, and the cgroup of the node proxy, in `/proc` |
pub const AGENT: &[Capability] = &[
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BROADCAST,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_PTRACE,
];

/// What the embedded node proxy keeps.
///
/// | capability | what for |
/// |---|---|
/// | `CAP_NET_ADMIN` | transparent sockets and their mark |
/// | `CAP_SYS_ADMIN` | sockets in the network namespaces of pods |
pub const PROXY: &[Capability] = &[Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN];

/// The reason why a process can't drop its privileges.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It lacks required capabilities.
    #[error(
        "this needs the capabilities {0}: run it as root, or add them to the container's securityContext"
    )]
    Missing(String),
    /// The kernel refused.
    #[error("capabilities can't be given up")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel refused.
    #[error("no_new_privs can't be set")]
    NoNewPrivileges(#[source] Errno),
}

/// Drops all capabilities but these, and every way to regain others.
///
/// Must be called while the process has one thread.
pub fn keep(wanted: &[Capability]) -> Result<(), Error> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let missing: Vec<_> = wanted.iter().filter(|wanted| !permitted.contains(wanted)).map(name).collect();
    if !missing.is_empty() {
        return Err(Error::Missing(missing.join(", ")));
    }
    let wanted: CapsHashSet = wanted.iter().copied().collect();
    // The bounding set limits what an executed file could restore. Only CAP_SETPCAP may shrink it; without that,
    // no_new_privs alone prevents the others from coming back.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for surplus in caps::read(None, CapSet::Bounding)?.difference(&wanted) {
            caps::drop(None, CapSet::Bounding, *surplus)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &wanted)?;
    caps::set(None, CapSet::Permitted, &wanted)?;
    set_no_new_privs().map_err(Error::NoNewPrivileges)
}

fn name(capability: &Capability) -> String {
    capability.to_string()
}
