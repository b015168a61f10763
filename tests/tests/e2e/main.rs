//! End-to-end tests: a real agent, a real node proxy, the real plugin in a real CNI chain, real sockets.
//!
//! They need root, the usual CNI plugins, bpftool and the release build of this workspace. Without them they are
//! skipped, visibly; with `REDIRECT_E2E=require` they fail instead.

mod abandoned;
mod batches;
mod bench;
mod closed_ports;
mod coexistence;
mod colluding;
mod container;
mod context;
mod diagnostics;
mod dns;
mod doctor;
mod eaddrinuse;
mod enrollment;
mod exclusions;
mod fault_walk;
mod faults;
mod flows;
mod fragments;
mod gate;
mod hand_over;
mod hardening;
mod harness;
mod host_gate;
mod identity;
mod inbound;
mod inspect;
mod install;
mod kubernetes;
mod leftovers;
mod limits;
mod load;
mod local;
mod logs;
mod metrics;
mod migration;
mod nodes;
mod odd_sockets;
mod on_node;
mod outbound;
mod placement_change;
mod pod_counters;
mod port_guard;
mod probes;
mod proxy_ports;
mod raw;
mod repairs;
mod reports;
mod restarts;
mod routing;
mod running_pods;
mod second_network;
mod services;
mod shared_listeners;
mod soak;
mod specification;
mod streams;
mod survival;
mod syn_flood;
mod tc_method;
mod time_wait;
mod top;
mod transcript;
mod transitions;
mod tunnel;
mod uninstall;
mod validate;
mod virtual_interfaces;
mod wire;
mod without_ipv6;
mod without_proxy;
mod xdp;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Conclusion, Trial};
use redirect_tests::signals;

use crate::context::Context;

fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    // Most tests wait for the kernel or for another process most of the time.
    arguments.test_threads.get_or_insert(4);
    signals::install()?;
    let contexts = Context::each();
    let [pod, node] = &contexts;
    let wanted = wanted();
    let chosen = |trial: &Trial| wanted.iter().any(|start| trial.name().starts_with(start));
    let trials = everywhere(pod).chain(in_pods(pod)).chain(everywhere(node)).chain(on_node::trials(node));
    let trials: Vec<Trial> = trials.filter(|trial| wanted.is_empty() || chosen(trial)).collect();
    let mut conclusions = vec![libtest_mimic::run(&arguments, trials)];
    if !arguments.list {
        // A test as well, the last one, so that it is counted and reported as the others are.
        let last = vec![leftovers::nothing_is_left(&contexts)];
        conclusions.push(libtest_mimic::run(&Arguments::default(), last));
    }
    Ok(if conclusions.iter().any(Conclusion::has_failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What holds wherever the proxy's listeners are.
fn everywhere(context: &Arc<Context>) -> impl Iterator<Item = Trial> + use<> {
    let trials = [
        outbound::trials(context),
        inbound::trials(context),
        local::trials(context),
        dns::trials(context),
        streams::trials(context),
        nodes::trials(context),
        enrollment::trials(context),
        restarts::trials(context),
        abandoned::trials(context),
        eaddrinuse::trials(context),
        probes::trials(context),
        exclusions::trials(context),
        odd_sockets::trials(context),
        host_gate::trials(context),
        fragments::trials(context),
        gate::trials(context),
        colluding::trials(context),
        syn_flood::trials(context),
        without_proxy::trials(context),
        time_wait::trials(context),
        closed_ports::trials(context),
        survival::trials(context),
        soak::trials(context),
        fault_walk::trials(context),
        uninstall::trials(context),
        validate::trials(context),
        without_ipv6::trials(context),
        doctor::trials_with_pods(context),
        metrics::trials(context),
        inspect::trials(context),
        specification::trials(context),
        flows::trials(context),
        top::trials(context),
        limits::trials(context),
        reports::trials(context),
        pod_counters::trials(context),
        tc_method::trials(context),
        hardening::trials(context),
        kubernetes::trials(context),
        identity::trials(context),
        proxy_ports::trials(context),
        services::trials(context),
        shared_listeners::trials(context),
        running_pods::trials(context),
        transitions::trials(context),
        placement_change::trials(context),
        coexistence::trials(context),
        diagnostics::trials(context),
    ];
    trials.into_iter().flatten()
}

/// What is tested in placement `pod` alone, and why.
fn in_pods(context: &Arc<Context>) -> impl Iterator<Item = Trial> + use<> {
    let trials = [
        // The tests' own tools.
        harness::trials(context),
        leftovers::trials(context),
        // Before pods are captured: the same code wherever the proxy is.
        doctor::trials(context),
        install::trials(context),
        // What is in pods there alone: rules, routes, sysctls, the proxy's listeners. `on_node` has its counterpart.
        repairs::trials(context),
        reports::trials_in_pods(context),
        port_guard::trials(context),
        gate::trials_in_pods(context),
        batches::trials(context),
        // The proxy is told of pods: in placement `node` the agent hands them to nobody, and `tcp_migrate_req`, without which a
        // proxy that ends resets what waits to be accepted, is the host's. `without_proxy` is tested in both.
        hand_over::trials(context),
        faults::trials(context),
        tunnel::trials(context),
        // A pod with a second way out is refused in placement `node`.
        virtual_interfaces::trials(context),
        second_network::trials(context),
        routing::trials(context),
        // From rules that send a pod's connections to a proxy in this pod.
        migration::trials(context),
        // Figures, not behaviour.
        load::trials(context),
        bench::trials(context),
        // How the agent's words look, and packaging: containers with the agent as it is shipped.
        logs::trials(context),
        transcript::trials(context),
        container::trials(context),
    ];
    trials.into_iter().flatten()
}

/// How the names of the tests that are wanted start, from `REDIRECT_TESTS`, separated by commas. All tests, if there is
/// none.
fn wanted() -> Vec<String> {
    let list = std::env::var("REDIRECT_TESTS").unwrap_or_default();
    list.split(',').filter(|start| !start.is_empty()).map(str::to_owned).collect()
}
