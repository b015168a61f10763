//! Periodic resync, for state the kernel sends no notifications for: pins, links, sysctls, map entries, and namespaces that
//! end. [`super::watch`] notices all other changes at once.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::drop_log::DropLog;
use super::pods::{Pods, Users};
use super::repairs::Kind;
use redirect_datapath::handle::{DatapathHandle, Gone};
use redirect_datapath::linux::Linux;

/// Runs until the datapath thread has ended.
pub(super) async fn reconcile_all(
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
            pods.check_drift(&uid).await;
        }
        repair(&kernel, &pods).await?;
        diagnostics.tell(&kernel).await;
        let known = pods.cookies().await;
        if let Ok(Err(error)) = kernel.run(move |linux| linux.collect(&known)).await {
            tracing::warn!(error = format!("{error:#}"), "cannot remove leftovers of pods that are gone");
        }
    }
}

/// How often to check whether the pods' namespaces are in use: an unused one is released within a second.
const USERS: Duration = Duration::from_millis(250);

/// Un-enrolls pods whose sandbox is gone. Needs the host's `/proc`.
pub(super) async fn leave_abandoned(proc: PathBuf, pods: Arc<Pods<Linux>>) -> anyhow::Result<()> {
    let mut ticks = interval(USERS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut users = Users::default();
    loop {
        ticks.tick().await;
        pods.leave_abandoned(&proc, &mut users).await;
    }
}

/// Repairs the node-wide parts. An error means that the datapath thread has ended.
pub(super) async fn repair(kernel: &DatapathHandle<Linux>, pods: &Pods<Linux>) -> Result<(), Gone> {
    match kernel.run(Linux::repair).await? {
        Ok(repaired) => {
            for what in repaired {
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
