//! Decides which processes may use the agent's sockets: none in an enrolled pod.
//!
//! The sockets belong to root, in directories of the host. A pod that reaches them all the same (because it mounts the host's
//! files) must neither impersonate the node proxy, whose connections are not captured, nor un-enroll itself.

use std::path::PathBuf;

use anyhow::Context as _;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_linux::netns::NetNs;
use redirect_linux::peer_process::PeerProcess;

/// Fails if the process is in the network namespace of an enrolled pod, or if that is unknown.
pub(super) async fn check(kernel: &DatapathHandle<Linux>, process: &PeerProcess) -> anyhow::Result<()> {
    let pid = process.pid();
    let netns = NetNs::open(&PathBuf::from(format!("/proc/{pid}/ns/net")));
    // Before the namespace is attributed to the process.
    process.check()?;
    let netns = netns.with_context(|| format!("the network namespace of process {pid} is unknown"))?;
    // Most processes are in the agent's own namespace.
    if netns.inode()? == NetNs::current()?.inode()? {
        return Ok(());
    }
    let enrolled = kernel.run(move |linux| linux.is_enrolled(&netns)).await??;
    anyhow::ensure!(
        !enrolled,
        "process {pid} is in an enrolled pod, whose processes may not connect to the agent"
    );
    Ok(())
}
