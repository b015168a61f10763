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
    // Most tests spend most of their time waiting for the kernel or another process.
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
        // Also a test, and the last one, so that it is counted and reported like the others.
        let last = vec![leftovers::nothing_is_left(&contexts)];
        conclusions.push(libtest_mimic::run(&Arguments::default(), last));
    }
    Ok(if conclusions.iter().any(Conclusion::has_failed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Tests for both placements.
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

/// Tests for placement `pod` only, with the reasons.
fn in_pods(context: &Arc<Context>) -> impl Iterator<Item = Trial> + use<> {
    let trials = [
        // The tests' own tools.
        harness::trials(context),
        leftovers::trials(context),
        // They run before pods are captured: the code is the same in both placements.
        doctor::trials(context),
        install::trials(context),
        // State that only exists in pods: rules, routes, sysctls, the proxy's listeners. `on_node` has the
        // counterparts.
        repairs::trials(context),
        reports::trials_in_pods(context),
        port_guard::trials(context),
        gate::trials_in_pods(context),
        batches::trials(context),
        // The proxy gets the pods from the agent. In placement `node` the agent sends none, and `tcp_migrate_req`, without
        // which a proxy that ends resets connections in its accept queue, is the host's. `without_proxy` is tested in both.
        hand_over::trials(context),
        faults::trials(context),
        tunnel::trials(context),
        // Placement `node` refuses a pod with a second way out.
        virtual_interfaces::trials(context),
        second_network::trials(context),
        routing::trials(context),
        // From rules that redirect a pod's connections to a proxy in the pod.
        migration::trials(context),
        // Numbers, not behavior.
        load::trials(context),
        bench::trials(context),
        // The agent's output, and packaging: containers with the shipped agent.
        logs::trials(context),
        transcript::trials(context),
        container::trials(context),
    ];
    trials.into_iter().flatten()
}

/// The wanted prefixes of test names, from `REDIRECT_TESTS`, separated by commas. All tests, if there are none.
fn wanted() -> Vec<String> {
    let list = std::env::var("REDIRECT_TESTS").unwrap_or_default();
    list.split(',').filter(|start| !start.is_empty()).map(str::to_owned).collect()
}
