//! State notifications to systemd, for units of `Type=notify`. Without systemd (`NOTIFY_SOCKET` is not set) they do nothing.

use sd_notify::NotifyState;

/// Reports that the service is ready. systemd then starts the units ordered after it.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports that the service is still starting, with the reason for `systemctl status`.
pub fn starting(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Reports that the service is stopping.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd notification failed");
    }
}
