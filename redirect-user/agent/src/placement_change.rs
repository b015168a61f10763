//! Takes over pods that an agent of the other placement captured, one by one, each when a proxy serves it in this placement.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::pods::Pods;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;

/// How often to retry pods, and to check whether the other placement's proxies have released them.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs until nothing of the other placement is left.
pub(super) async fn follow(kernel: DatapathHandle<Linux>, pods: Arc<Pods<Linux>>) -> anyhow::Result<()> {
    let mut changes = pods.proxy_changes();
    while kernel.run(|linux| linux.is_divided()).await? {
        for uid in pods.uids().await {
            if let Err(error) = pods.settle(&uid).await {
                tracing::warn!(uid, %error, "cannot take the pod over from the other placement yet");
            }
        }
        if let Err(error) = kernel.run(Linux::retire_other).await? {
            let error = format!("{error:#}");
            tracing::warn!(error, "cannot remove what the other placement has left on the node yet");
        }
        tokio::select! {
            Ok(()) = changes.changed() => {}
            () = sleep(PAUSE) => {}
        }
    }
    std::future::pending().await
}
