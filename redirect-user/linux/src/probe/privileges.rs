//! Privileges of the process.

use caps::CapSet;

use super::{Cause, Check, Requirements};
use crate::privileges::{AGENT, Capability};

pub(super) fn checks(_: &Requirements) -> Vec<Check> {
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let name = |capability: &Capability| capability.to_string();
    let missing: Vec<_> = AGENT.iter().filter(|wanted| !held.contains(wanted)).map(name).collect();
    if missing.is_empty() {
        return vec![Check::ok("privileges", AGENT.iter().map(name).collect::<Vec<_>>().join(", "))];
    }
    vec![Check::fail(
        "privileges",
        Cause::Privileges,
        format!("missing capabilities: {}", missing.join(", ")),
        "run it as root, or add them to the container's securityContext",
    )]
}
