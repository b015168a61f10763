//! What the log says of pods: one line for each change of a pod's state, with its UID, its families and how long the change
//! took.

use std::time::{Duration, Instant};

use super::{Error, list};
use redirect_datapath::datapath::{Observation, Target};
use redirect_protocol::pod::{PodAddresses, PodIdentity};

/// A pod is enrolled. Nothing is said of a proxy that was not waited for.
pub(super) fn steered(target: &Target, observation: &Observation, began: Instant, proxy: Duration) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        addresses = %list(target.addresses.iter()),
        microseconds = microseconds(began.elapsed()),
        proxy_microseconds = microseconds(proxy),
        "pod is steered"
    );
    if !observation.namespace.ipv6 {
        tracing::info!(
            pod = %target.identity,
            uid = target.identity.uid,
            "IPv6 is off on the pod's lo: the pod is steered in IPv4 alone, connections in IPv6 are dropped"
        );
    }
}

/// A pod that shall be enrolled is not.
pub(super) fn not_enrolled(pod: &PodIdentity, addresses: &PodAddresses, began: Instant, error: &Error) {
    tracing::warn!(
        %pod,
        uid = pod.uid,
        families = %list(addresses.families()),
        microseconds = microseconds(began.elapsed()),
        %error,
        "pod can't be enrolled"
    );
}

/// An enrolled pod has other addresses or settings.
pub(super) fn changed(target: &Target, began: Instant) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        addresses = %list(target.addresses.iter()),
        microseconds = microseconds(began.elapsed()),
        "pod has changed"
    );
}

/// A pod is not as it should be in the kernel, and can't be brought there.
pub(super) fn broken(target: &Target, began: Instant, error: &Error) {
    tracing::warn!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        %error,
        "the pod can't be kept in step"
    );
}

/// A broken pod is as it should be again.
pub(super) fn mended(target: &Target, began: Instant) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        "pod is steered again"
    );
}

/// A pod was un-enrolled.
pub(super) fn no_longer_steered(target: &Target, began: Instant, proxy: Duration) {
    tracing::info!(
        pod = %target.identity,
        uid = target.identity.uid,
        families = %list(target.addresses.families()),
        microseconds = microseconds(began.elapsed()),
        proxy_microseconds = microseconds(proxy),
        "pod is no longer steered"
    );
}

/// A number in JSON, which one of 128 bits is not.
fn microseconds(time: Duration) -> u64 {
    time.as_micros().try_into().unwrap_or(u64::MAX)
}
