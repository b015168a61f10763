//! Who may use the agent's sockets: nobody in an enrolled pod.
//!
//! The sockets belong to root, in directories of the host. A pod that reaches them all the same (because it mounts the host's
//! files) must neither impersonate the node proxy, whose connections are not captured, nor un-enroll itself.

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
        "process {pid} is in an enrolled pod, whose processes may not connect to the agent"
    );
    Ok(())
}
