//! Deadlines and delays of the controller and of the admission of pods.

use std::time::Duration;

use super::informer::Patience;

/// How patient the controller is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// How long the plugin waits for the informer to show a pod before the API server is asked.
    pub(crate) patience: Duration,
    /// How long the plugin waits for a decision. With the proxy's deadline after it, it stays within the plugin's.
    pub(crate) admission: Duration,
    /// How often everything is compared with the kernel.
    pub(crate) resync: Duration,
    /// Interval for checking a pod that the proxy has not acknowledged.
    pub(crate) poll: Duration,
    /// How often the API server is told how often something has happened again.
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
