//! Logs the changes of pods: one line for each, with the pod's UID, its families and the duration of the change.

use std::time::{Duration, Instant};

use super::{Error, list};
use redirect_datapath::datapath::{Observation, Target};
use redirect_protocol::pod::{PodAddresses, PodIdentity};

/// A pod is enrolled. The proxy's time is zero if the enrollment did not wait for it.
pub(super) fn captured(target: &Target, observation: &Observation, began: Instant, proxy: Duration) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        addresses = %list(target.addresses.iter()),
        microseconds = microseconds(began.elapsed()),
        proxy_microseconds = microseconds(proxy),
        "pod enrolled"
    );
    if !observation.namespace.ipv6 {
        tracing::info!(
            pod = %target.identity,
            uid = target.identity.uid,
            "IPv6 is disabled on the pod's lo: capturing IPv4 only, dropping IPv6 connections"
        );
    }
}

/// An enrollment failed.
pub(super) fn not_enrolled(pod: &PodIdentity, addresses: &PodAddresses, began: Instant, error: &Error) {
    tracing::warn!(
        %pod,
        uid = pod.uid,
        families = %list(addresses.families()),
        microseconds = microseconds(began.elapsed()),
        %error,
        "cannot enroll pod"
    );
}

/// A pod will be un-enrolled after a grace period.
pub(super) fn leaving(target: &Target, grace: Duration) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        seconds = grace.as_secs(),
        "pod leaves the mesh: new connections go directly, those of the node proxy may end"
    );
}

/// An enrolled pod has new addresses or settings.
pub(super) fn changed(target: &Target, began: Instant) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        addresses = %list(target.addresses.iter()),
        microseconds = microseconds(began.elapsed()),
        "pod changed"
    );
}

/// The kernel does not match a pod's desired state, and the repair failed.
pub(super) fn broken(target: &Target, began: Instant, error: &Error) {
    tracing::warn!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        %error,
        "cannot reconcile pod"
    );
}

/// A broken pod was repaired.
pub(super) fn repaired(target: &Target, began: Instant) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        "pod captured again"
    );
}

/// A pod was un-enrolled.
pub(super) fn no_longer_captured(target: &Target, began: Instant, proxy: Duration) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        proxy_microseconds = microseconds(proxy),
        "pod un-enrolled"
    );
}

/// JSON has no 128-bit numbers.
fn microseconds(time: Duration) -> u64 {
    time.as_micros().try_into().unwrap_or(u64::MAX)
}
