//! Placement `node`: its own tests, and the list of shared tests that do not run in it, with the reasons.

mod haproxy;
mod others;
mod ports;
mod repairs;
mod routed;
mod rules;
mod sources;

use std::sync::Arc;

use anyhow::{Context as _, Result};
use libtest_mimic::Trial;
use redirect_tests::Pod;

use crate::context::Context;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    [
        repairs::trials(context),
        sources::trials(context),
        rules::trials(context),
        haproxy::trials(context),
        routed::trials(context),
        others::trials(context),
        ports::trials(context),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The name of the host end of a pod's interface.
pub(crate) fn host_device(pod: &Pod) -> Result<String> {
    let index = pod.netns().json("ip -j link show eth0")?[0]["link_index"].as_u64().context("no veth")?;
    let links = pod.node().netns().json("ip -j link show")?;
    let mut links = links.as_array().into_iter().flatten();
    let found = links.find(|link| link["ifindex"] == index).and_then(|link| link["ifname"].as_str());
    Ok(found.context("no device of the host leads to the pod")?.to_owned())
}

/// The differences.
const DIFFERENT: [(&str, &str); 6] = [
    ("dns::bound_to_a_device", "a socket that is bound to the pod's device is captured like any other"),
    ("dns::connected_and_then_elsewhere", "a connected socket hears nobody but its peer, as without a mesh"),
    ("dns::link_local_server", "the resolver could not answer on the pod's link: such questions are dropped"),
    ("dns::without_the_resolvers_address", "the resolver is not in the pod"),
    (
        "dns::sendmmsg_and_recvmmsg",
        "answers show who gave them, so that they need not come in the order of questions",
    ),
    ("without_ipv6::off_", "the host captures IPv6, whatever the pod's lo"),
];

/// Why a test does not run there.
pub(crate) fn reason(name: &str) -> Option<&'static str> {
    DIFFERENT.into_iter().find(|(start, _)| name.starts_with(start)).map(|(_, reason)| reason)
}
