//! A few tests on several kernels: the differences between kernels, in a short time.

use std::time::Duration;

use super::{MEMORY, Plan, kernels};

/// The verifier on every program; each direction and DNS in every family; connections that TC can't assign; the proxy in both
/// placements.
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

/// The deadline of a machine, many times its usual duration.
const LIMIT: Duration = Duration::from_secs(1200);

/// The oldest supported kernel, Debian's long-term ones, its newest; one without IPv6; one that is too old.
pub(crate) fn plans() -> Vec<Plan> {
    let plan = |kernel: &str, tests: &[&str]| Plan {
        kernel: kernel.to_owned(),
        arguments: String::new(),
        only: tests.iter().map(|&test| test.to_owned()).collect(),
        environment: Vec::new(),
        memory: MEMORY,
        // Components with limits of their own, such as the proxy's resolver, must not be slowed down by other
        // tests.
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
