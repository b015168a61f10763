//! A few tests on several kernels: what differs among kernels, in little time.

use std::time::Duration;

use super::{MEMORY, Plan, kernels};

/// The verifier on every program; each direction and DNS in every family; what TC can't give to a listener itself; the proxy in
/// each of its places.
const EVERYWHERE: [&str; 9] = [
    "doctor::this_node_is_fit",
    "outbound::captured::dual::",
    "inbound::from_pod::dual::",
    "dns::connected_udp::dual::",
    "shared_listeners::",
    "time_wait::one_source_port::outbound::dual::",
    "second_network::inbound::",
    "second_network::time_wait_inbound::",
    "node::outbound::captured::dual::",
];

/// A machine that hangs is ended after this, many times what it takes.
const LIMIT: Duration = Duration::from_secs(1200);

/// The oldest kernel that is supported, Debian's long-term ones, its newest; one without IPv6; one that is too old.
pub(crate) fn plans() -> Vec<Plan> {
    let plan = |kernel: &str, tests: &[&str]| Plan {
        kernel: kernel.to_owned(),
        arguments: String::new(),
        only: tests.iter().map(|&test| test.to_owned()).collect(),
        environment: Vec::new(),
        memory: MEMORY,
        // What has limits of its own, as the proxy's resolver has, is not slowed down by other tests.
        test_arguments: vec!["--test-threads=1".to_owned()],
        limit: LIMIT,
    };
    let without_ipv6 = ["without_ipv6::off_in_the_kernel"];
    let too_old = ["doctor::an_old_kernel_is_refused"];
    vec![
        plan("6.1", &EVERYWHERE),
        plan("6.12", &EVERYWHERE),
        plan(kernels::NEWEST, &EVERYWHERE),
        Plan { arguments: "ipv6.disable=1".into(), ..plan("6.12", &without_ipv6) },
        Plan { environment: vec![("REDIRECT_KERNEL", "old".into())], ..plan("5.10", &too_old) },
    ]
}
