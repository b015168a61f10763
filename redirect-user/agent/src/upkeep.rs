//! Periodic resync, for state the kernel sends no notifications for: pins, links, sysctls, map entries, and namespaces that
//! end. [`super::watch`] notices all other changes at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::drop_log::DropLog;
use super::pods::Pods;
use super::repairs::Kind;
use redirect_datapath::handle::{DatapathHandle, Gone};
use redirect_datapath::linux::Linux;

/// Works until the datapath's thread is gone.
pub(super) async fn keep_up(
    every: Duration,
    kernel: DatapathHandle<Linux>,
    pods: Arc<Pods<Linux>>,
) -> anyhow::Result<()> {
    let mut ticks = interval(every);
    let mut diagnostics = DropLog::default();
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for uid in pods.uids().await {
            pods.look_after(&uid).await;
        }
        mend(&kernel, &pods).await?;
        diagnostics.tell(&kernel).await;
        let known = pods.cookies().await;
        if let Ok(Err(error)) = kernel.run(move |linux| linux.collect(&known)).await {
            tracing::warn!(error = format!("{error:#}"), "cannot remove leftovers of pods that are gone");
        }
    }
}

/// Looks after what is for the whole node. An error: nobody does any more.
pub(super) async fn mend(kernel: &DatapathHandle<Linux>, pods: &Pods<Linux>) -> Result<(), Gone> {
    match kernel.run(Linux::mend).await? {
        Ok(mended) => {
            for what in mended {
                pods.repairs().count(Kind::Link);
                tracing::warn!(what, "repaired node datapath drift");
            }
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "cannot repair node datapath");
        }
    }
    Ok(())
}
