//! Finds programs of other software at our hooks: on the cgroup, and on the devices of enrolled pods.

use std::collections::BTreeSet;

use super::{Check, Requirements};
use redirect_datapath::linux::{self, Attached};
use redirect_linux::cgroup;

pub(super) fn at_cgroup(requirements: &Requirements) -> Vec<Check> {
    const NAME: &str = "programs of others";
    let cgroup = requirements.cgroup.clone().map_or_else(cgroup::mount, Ok);
    // Another check reports a missing hierarchy.
    let Ok(cgroup) = cgroup else { return Vec::new() };
    let shown = cgroup.display();
    let hooks = match linux::at_cgroup(&cgroup) {
        Ok(hooks) => hooks,
        Err(error) => return vec![unread(NAME, format!("cannot read those of {shown}: {error}"))],
    };
    let warning = |hook: &Attached, before: &str| {
        Check::warn(
            NAME,
            format!(
                "{} of {shown}: {before} runs before ours, so the node proxy sees the destination \
                 addresses that it chooses",
                hook.place
            ),
            "nothing, if that is intended; otherwise Linux 6.17, where ours run first, and a restart of \
             the agent",
        )
    };
    let mut checks = warnings(&hooks, warning);
    if checks.is_empty() {
        checks.push(Check::ok(NAME, summary("at our hooks", &hooks)));
    }
    checks
}

pub(super) fn on_devices(requirements: &Requirements) -> Vec<Check> {
    const NAME: &str = "TC programs of others";
    let pods = match super::enrolled(requirements) {
        Ok(pods) => pods,
        Err(error) => return vec![unread(NAME, format!("cannot read the enrolled pods: {error}"))],
    };
    let (mut checks, mut devices) = (Vec::new(), Vec::new());
    for found in pods {
        let (pod, Some(netns)) = (&found.checkpoint.identity, found.netns) else { continue };
        let attached = match linux::on_devices(&netns) {
            Ok(attached) => attached,
            Err(error) => {
                checks.push(unread(NAME, format!("cannot read those of pod {pod}: {error}")));
                continue;
            }
        };
        let warning = |device: &Attached, before: &str| {
            Check::warn(
                NAME,
                format!(
                    "pod {pod}: {}: {before} runs before ours, and packets that it decides on do not reach \
                     the node proxy",
                    device.place
                ),
                "attach it after ours, with BPF_F_AFTER or as a filter with a priority of 3 or more",
            )
        };
        checks.extend(warnings(&attached, warning));
        devices.extend(attached);
    }
    if checks.is_empty() {
        checks.push(Check::ok(NAME, summary("on the devices of enrolled pods", &devices)));
    }
    checks
}

fn unread(name: &str, detail: String) -> Check {
    Check::warn(name, detail, "run it as root, in the host's network and PID namespaces")
}

/// A warning for each hook where programs of others run before ours.
fn warnings(hooks: &[Attached], warning: impl Fn(&Attached, &str) -> Check) -> Vec<Check> {
    let before = hooks.iter().map(|hook| (hook, hook.before_ours())).filter(|(_, before)| !before.is_empty());
    before.map(|(hook, before)| warning(hook, &list(before))).collect()
}

fn summary(place: &str, hooks: &[Attached]) -> String {
    let others: BTreeSet<_> = hooks.iter().flat_map(Attached::others).collect();
    if others.is_empty() {
        return format!("none {place}");
    }
    format!("none before ours {place}; there are {}", list(others))
}

fn list(names: BTreeSet<&str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(", ")
}
