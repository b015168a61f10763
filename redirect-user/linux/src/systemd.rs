//! State notifications to systemd, for units of `Type=notify`. Without systemd (`NOTIFY_SOCKET` is not set) they do nothing.

use sd_notify::NotifyState;

/// The service does its work. systemd starts the units that are ordered after it.
pub fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The service still starts. `systemctl status` shows why.
pub fn starting(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// The service ends.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd notification failed");
    }
}
