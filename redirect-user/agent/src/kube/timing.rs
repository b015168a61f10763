//! Deadlines and delays of the controller and of the admission of pods.

use std::time::Duration;

use super::informer::Patience;

/// The controller's timing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// How long the plugin waits for the informer to show a pod before the agent queries the API server.
    pub(crate) patience: Duration,
    /// The plugin's deadline for a decision. With the proxy's deadline added, it stays within the plugin's.
    pub(crate) admission: Duration,
    /// The interval at which everything is reconciled.
    pub(crate) resync: Duration,
    /// The interval at which a pod is checked that the proxy has not acknowledged.
    pub(crate) poll: Duration,
    /// The interval at which counts of repeated events are written.
    pub(crate) events: Duration,
    pub(crate) api: Patience,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(2),
            admission: Duration::from_secs(12),
            resync: Duration::from_secs(60),
            poll: Duration::from_secs(1),
            events: Duration::from_secs(60),
            api: Patience::default(),
        }
    }
}
