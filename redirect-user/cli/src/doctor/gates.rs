//! Finds pods' devices that have no host gate.

use super::{Check, Requirements};
use redirect_datapath::linux;

const NAME: &str = "gates on the host";

pub(super) fn check(requirements: &Requirements) -> Vec<Check> {
    const READ: &str = "run it as root, in the host's network and PID namespaces";
    const REMEDY: &str = "drop CAP_NET_RAW and CAP_NET_ADMIN from the pod's containers, or join the pod to the node by a veth pair";
    let pods = match super::enrolled(requirements) {
        Ok(pods) => pods,
        Err(error) => {
            return vec![Check::warn(NAME, format!("the enrolled pods can't be read: {error}"), READ)];
        }
    };
    let mut checks = Vec::new();
    for found in pods {
        let (pod, Some(netns)) = (&found.checkpoint.identity, found.netns) else { continue };
        match linux::unguarded(&netns) {
            Ok(interfaces) if interfaces.is_empty() => {}
            Ok(interfaces) => checks.push(Check::warn(
                NAME,
                format!(
                    "pod {pod}: {}: no veth pair with the node, so that raw frames of a process with CAP_NET_RAW pass the node proxy",
                    interfaces.join(", ")
                ),
                REMEDY,
            )),
            Err(error) => {
                checks.push(Check::warn(NAME, format!("the devices of pod {pod} can't be read: {error}"), READ));
            }
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(NAME, "every interface of an enrolled pod has an end on the host"));
    }
    checks
}
