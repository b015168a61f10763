//! Notifies systemd when containers may start: from then on, each of them passes the plugin.
//!
//! The unit is ordered before container runtimes. If it were ready any earlier, containers that start with the node would
//! bypass the plugin.

use tokio::sync::watch;

use super::health::Findings;
use redirect_linux::systemd;

/// Returns after systemd has been notified that the agent is ready.
pub(super) async fn announce(mut findings: watch::Receiver<Findings>) {
    let mut told = None;
    loop {
        let blocked = findings.borrow_and_update().blocked();
        let Some(why) = blocked else { break };
        if told.as_ref() != Some(&why) {
            systemd::starting(&why);
        }
        told = Some(why);
        // An error means that the agent is shutting down.
        if findings.changed().await.is_err() {
            return;
        }
    }
    systemd::ready("new pods are enrolled");
}
