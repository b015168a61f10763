//! Whether connections reach their destinations, and through the proxy.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::SAMPLES;
use super::cluster::{self, Cluster};

/// Whether pods should be enrolled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Captured {
    Yes,
    No,
}

/// Every sleep pod gets the right greeting from every address of every Service and server.
pub(super) fn greetings(cluster: &Cluster<'_>, captured: Captured) -> Result<String> {
    let mut script = cluster.script("deploy/samples/validate.sh");
    if captured == Captured::No {
        script.arg("--plain");
    }
    let said = cluster::output(&mut script)?;
    let heard = |greeting: &str| said.lines().filter(|line| line.ends_with(&format!(": {greeting}"))).count();
    let greetings = ["hello dualstack", "hello ipv4", "hello ipv6"];
    let counts = greetings.map(heard);
    ensure!(counts.iter().all(|count| *count > 0), "not all greetings were heard:\n{said}");
    let counts: Vec<_> =
        greetings.iter().zip(counts).map(|(text, count)| format!("{text} {count}x")).collect();
    Ok(counts.join(", "))
}

/// By the embedded proxies' logs: each greeted address was the destination of a forwarded connection from the client's pod
/// (outbound) and into the server's (inbound); and each inbound connection came from a client, so the kubelet's probes are
/// not among them.
pub(super) fn passed_the_proxy(cluster: &Cluster<'_>) -> Result<String> {
    let mut entries = Vec::new();
    for pod in cluster.names(cluster.namespace(), "app.kubernetes.io/name=ambient-redirect-proxy")? {
        let log = cluster.logs(&pod, "proxy")?;
        entries.extend(log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()));
    }
    let seen = |direction: &str, field: &str| -> BTreeSet<SocketAddr> {
        let entries = entries.iter().filter(|entry| entry["direction"] == direction);
        entries.filter_map(|entry| entry[field].as_str()?.parse().ok()).map(canonical).collect()
    };
    let (outbound, inbound) =
        (seen("outbound", "original_destination"), seen("inbound", "original_destination"));

    let mut expected = BTreeSet::new();
    for service in cluster.list(SAMPLES, "services")? {
        for address in addresses(&service["spec"]["clusterIPs"], "") {
            expected.insert(SocketAddr::new(address, 9000));
        }
    }
    let missing: Vec<_> = expected.difference(&outbound).collect();
    ensure!(missing.is_empty(), "no proxy passed on what pods sent to {missing:?}");
    let families = expected.iter().filter(|address| address.is_ipv6()).count();
    ensure!(families > 0 && families < expected.len(), "not both families: {expected:?}");

    let mut servers = BTreeSet::new();
    for pod in cluster.pods(SAMPLES, "sample=tcp-echo")? {
        let own = addresses(&pod["status"]["podIPs"], "ip").into_iter().map(|ip| SocketAddr::new(ip, 9000));
        // Servers of one family are greeted over it.
        let own: Vec<_> = own.filter(|address| outbound.contains(address)).collect();
        ensure!(!own.is_empty(), "nobody greeted {}", pod["metadata"]["name"]);
        servers.extend(own);
    }
    let missing: Vec<_> = servers.difference(&inbound).collect();
    ensure!(missing.is_empty(), "no proxy passed on what came for {missing:?}");

    let count = |event: &str, direction: &str, counts: fn(&Value) -> bool| {
        let those = entries.iter().filter(|entry| entry["event"] == event && entry["direction"] == direction);
        those.filter(|entry| counts(entry)).count()
    };
    // Without refused ones, e.g. before a new Service has reached the node.
    let refused = count("close", "outbound", |entry| entry["upstream_local"].is_null());
    let left = count("open", "outbound", |_| true) - refused;
    let came = count("open", "inbound", |_| true);
    ensure!(
        left == came,
        "{left} connections left pods, {came} came to pods: probes passed a proxy, or pods by it"
    );
    let probes = probes(cluster)?;
    ensure!(probes > 0, "the agents saw no probe");
    Ok(format!(
        "{} Service addresses, {} servers' addresses; {left} connections out and in; {probes} probes by them",
        expected.len(),
        servers.len()
    ))
}

/// The number of kubelet connections that the agents let pass.
fn probes(cluster: &Cluster<'_>) -> Result<u64> {
    let mut probes = 0;
    for agent in cluster.agents()? {
        let status = cluster.redirect(&agent, &["status", "-o", "json"])?;
        let status: Value = serde_json::from_str(&status)?;
        let counters = status["counters"].as_array().into_iter().flatten();
        let of_probes = counters.filter(|counter| counter["reason"] == "probe");
        probes += of_probes.filter_map(|counter| counter["connections"].as_u64()).sum::<u64>();
    }
    Ok(probes)
}

/// The kernel has everything, according to the agent.
pub(super) fn in_the_kernel(cluster: &Cluster<'_>) -> Result<String> {
    let mut checked = 0;
    let pods = cluster.pods(SAMPLES, "")?;
    for agent in cluster.agents()? {
        for pod in pods.iter().filter(|pod| pod["spec"]["nodeName"] == agent["spec"]["nodeName"]) {
            let pod = format!("{SAMPLES}/{}", pod["metadata"]["name"].as_str().context("a name")?);
            cluster.redirect(&agent, &["pod", &pod]).with_context(|| pod.clone())?;
            checked += 1;
        }
    }
    ensure!(checked == pods.len(), "{checked} of {} pods are on nodes with an agent", pods.len());
    Ok(format!("all is in place for {checked} pods"))
}

fn addresses(list: &Value, key: &str) -> Vec<IpAddr> {
    let address = |item: &Value| {
        if key.is_empty() { item.as_str()?.parse().ok() } else { item[key].as_str()?.parse().ok() }
    };
    list.as_array().into_iter().flatten().filter_map(address).collect()
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
