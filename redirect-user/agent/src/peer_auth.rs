//! Who may speak to the agent's sockets: nobody in a pod that the agent steers.
//!
//! The sockets are root's, in directories of the host. A pod that can reach them all the same (it mounts the host's files)
//! must neither pass for the node proxy, whose connections are not captured, nor un-enrol itself.

use std::path::PathBuf;

use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_linux::netns::NetNs;

/// Fails if the process is in the network namespace of an enrolled pod. A process that has ended is none.
pub(super) async fn check(kernel: &DatapathHandle<Linux>, pid: Option<i32>) -> anyhow::Result<()> {
    let Some(pid) = pid else { return Ok(()) };
    let Ok(netns) = NetNs::open(&PathBuf::from(format!("/proc/{pid}/ns/net"))) else { return Ok(()) };
    // By far the most are in the agent's own.
    if netns.inode()? == NetNs::current()?.inode()? {
        return Ok(());
    }
    let enrolled = kernel.run(move |linux| linux.is_enrolled(&netns)).await??;
    anyhow::ensure!(
        !enrolled,
        "process {pid} is in an enrolled pod, whose processes may not speak to the agent"
    );
    Ok(())
}
