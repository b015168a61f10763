//! `redirect status` and `redirect pods`.

use std::time::Duration;

use comfy_table::{Table, presets::NOTHING};
use redirect_ebpf::{Direction, Verdict};
use serde::Serialize;

use super::{Output, Query};
use redirect_protocol::wire::{FlowStatus, PodCounter, PodReport, Reply, Request, Status, client};

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn status(query: &Query) -> anyhow::Result<()> {
    let replies = client::call(&query.socket, &Request::Status, None, PATIENCE)?;
    let Some(Reply::Status(status)) = replies.into_iter().next() else {
        anyhow::bail!("the agent at {} did not answer with its status", query.socket.display())
    };
    match query.output {
        Output::Json => json(&status),
        Output::Table => {
            print!("{}", status_text(&status));
            Ok(())
        }
    }
}

pub(super) fn pods(query: &Query) -> anyhow::Result<()> {
    let replies = client::call(&query.socket, &Request::Pods, None, PATIENCE)?;
    let pods: Vec<PodReport> = replies
        .into_iter()
        .flat_map(|reply| if let Reply::Pods { pods, .. } = reply { pods } else { Vec::new() })
        .collect();
    match query.output {
        Output::Json => json(&pods),
        Output::Table => {
            println!("{}", pods_table(&pods));
            Ok(())
        }
    }
}

pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().map(|name| name.to_uppercase()));
    table
}

fn status_text(status: &Status) -> String {
    let mut programs = table(&["program", "id", "attached"]);
    for program in &status.programs {
        programs.add_row([program.name.clone(), program.id.to_string(), program.links.to_string()]);
    }
    let mut features = table(&["kernel", "found"]);
    for feature in &status.features {
        features.add_row([&feature.name, &feature.found]);
    }
    let mut maps = table(&["map", "entries", "capacity"]);
    for map in &status.maps {
        maps.add_row([map.name.clone(), map.entries.to_string(), map.capacity.to_string()]);
    }
    let mut proxies = table(&["node proxy", "cgroup", "snapshot", "pods", "refused"]);
    for proxy in &status.proxies {
        proxies.add_row([
            format!("pid {}", proxy.pid),
            proxy.cgroup.clone().unwrap_or_else(|| "none of its own".into()),
            if proxy.synced { "acknowledged" } else { "not yet" }.into(),
            proxy.acknowledged.to_string(),
            proxy.refused.iter().map(|(uid, why)| format!("{uid}: {why}")).collect::<Vec<_>>().join("\n"),
        ]);
    }
    let mut counters = table(&["family", "direction", "verdict", "reason", "connections"]);
    for counter in &status.counters {
        counters.add_row([
            counter.family.clone(),
            counter.direction.clone(),
            counter.verdict.clone(),
            counter.reason.clone(),
            counter.connections.to_string(),
        ]);
    }
    let mut repairs = String::new();
    if !status.repairs.is_empty() {
        let counted = status.repairs.iter().map(|repair| format!("{} {}", repair.repairs, repair.kind));
        repairs = format!(
            "\nrepairs after changes by other software: {}\n",
            counted.collect::<Vec<_>>().join(", ")
        );
    }
    let FlowStatus { listeners, rate_limit, ring_full, slow_listener } = status.flows;
    let flows = format!(
        "monitors {listeners}; lost to the rate limit {rate_limit}, to a full buffer {ring_full}, to slow \
         monitors {slow_listener}"
    );
    format!(
        "agent {} (pid {}), up {}, Linux {}\noutbound programs on {}, TC programs by \
         {}\n\n{features}\n\n{programs}\n\n{maps}\n\n{}\n\n{}\n\nconnection events: {flows}\n{repairs}",
        status.version,
        status.pid,
        duration(status.uptime),
        status.kernel,
        status.cgroup,
        if status.tcx { "tcx links" } else { "clsact filters" },
        if status.proxies.is_empty() { "no node proxy is connected".into() } else { proxies.to_string() },
        if status.counters.is_empty() { "no connections so far".into() } else { counters.to_string() },
    )
}

pub(super) fn pods_table(pods: &[PodReport]) -> Table {
    let mut table = table(&[
        "pod",
        "state",
        "families",
        "addresses",
        "interfaces",
        "node proxy",
        "outbound",
        "inbound",
        "since",
    ]);
    for report in pods {
        table.add_row([
            report.pod.to_string(),
            report.state.label().into(),
            report.captured.join(", "),
            report.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
            interfaces(report),
            match &report.proxy {
                Ok(()) => "acknowledged".into(),
                Err(why) => why.clone(),
            },
            connections(&report.counters, Direction::Outbound),
            connections(&report.counters, Direction::Inbound),
            duration(report.since),
        ]);
    }
    table
}

/// A pod's interfaces, with remarks.
fn interfaces(report: &PodReport) -> String {
    let own = report.interfaces.iter().map(|name| match report.unguarded.contains(name) {
        true => format!("{name} (no gate)"),
        false => name.clone(),
    });
    let strayed = report.strayed.iter().map(|name| format!("{name} (moved away)"));
    own.chain(strayed).collect::<Vec<_>>().join(", ")
}

/// A pod's connections in one direction, in both families.
fn connections(counters: &[PodCounter], direction: Direction) -> String {
    let lines = Verdict::ALL.iter().filter_map(|verdict| {
        let counted =
            counters.iter().filter(|of| of.direction == direction.label() && of.verdict == verdict.label());
        let connections: u64 = counted.map(|counter| counter.connections).sum();
        (connections > 0).then(|| format!("{connections} {}", verdict.label()))
    });
    let lines: Vec<String> = lines.collect();
    if lines.is_empty() { "none".into() } else { lines.join("\n") }
}

/// A duration in human-readable units.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use redirect_protocol::pod::PodIdentity;
    use redirect_protocol::wire::{
        CounterReport, FeatureReport, MapReport, PodState, ProgramReport, ProxyReport,
    };

    fn status_of(proxies: Vec<ProxyReport>) -> Status {
        Status {
            version: "0.1.0".into(),
            pid: 7,
            uptime: 3723,
            kernel: "6.12.0".into(),
            cgroup: "/sys/fs/cgroup".into(),
            tcx: false,
            features: vec![
                FeatureReport { name: "TC".into(), found: "bpf_sk_assign, bpf_skc_lookup_tcp".into() },
                FeatureReport { name: "IPv6".into(), found: "on".into() },
            ],
            programs: vec![ProgramReport { name: "outbound_ipv6".into(), id: 42, links: 1 }],
            maps: vec![MapReport { name: "POD_IPV6".into(), entries: 3, capacity: 1024 }],
            proxies,
            counters: vec![CounterReport {
                family: "IPv6".into(),
                direction: "outbound".into(),
                verdict: "captured".into(),
                reason: "enrolled".into(),
                connections: 12,
            }],
            repairs: Vec::new(),
            flows: FlowStatus { listeners: 1, rate_limit: 5, ring_full: 0, slow_listener: 2 },
        }
    }

    #[test]
    fn status_is_readable() {
        let proxy = ProxyReport {
            pid: 9,
            cgroup: Some("/kubepods/pod1/c1".into()),
            synced: true,
            acknowledged: 2,
            refused: vec![("u3".into(), "port 15001 is taken".into())],
        };
        insta::assert_snapshot!("status", status_text(&status_of(vec![proxy])));
        insta::assert_snapshot!("status_without_proxy", status_text(&status_of(Vec::new())));
    }

    #[test]
    fn pods_are_readable() {
        let counters = |name: &str| {
            let one = |family: &str, direction: Direction, verdict: Verdict, connections| PodCounter {
                family: family.into(),
                direction: direction.label().into(),
                verdict: verdict.label().into(),
                connections,
            };
            let of_both = vec![
                one("IPv4", Direction::Outbound, Verdict::Captured, 12),
                one("IPv4", Direction::Outbound, Verdict::Dropped, 1),
                one("IPv6", Direction::Outbound, Verdict::Captured, 3),
                one("IPv6", Direction::Inbound, Verdict::Passed, 7),
            ];
            if name == "tcp-echo" { of_both } else { Vec::new() }
        };
        let report = |name: &str, addresses: &[&str], families: &[&str], proxy| PodReport {
            pod: PodIdentity { name: name.into(), namespace: "dual-stack".into(), ..PodIdentity::default() },
            attachments: Vec::new(),
            addresses: addresses.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect(),
            netns_cookie: 1,
            captured: families.iter().map(ToString::to_string).collect(),
            interfaces: vec!["eth0".into()],
            strayed: Vec::new(),
            unguarded: if name == "v6-only" { vec!["eth0".into()] } else { Vec::new() },
            state: if proxy == Ok(()) { PodState::Captured } else { PodState::Waiting },
            proxy,
            since: 90_061,
            counters: counters(name),
        };
        let pods = [
            report("tcp-echo", &["10.0.0.2", "fd00::2"], &["IPv4", "IPv6"], Ok(())),
            report("v6-only", &["fd00::3"], &["IPv6"], Err("no node proxy is connected".into())),
        ];
        insta::assert_snapshot!("pods", pods_table(&pods).to_string());
    }

    #[test]
    fn durations() {
        let all: Vec<String> = [0, 59, 60, 3599, 3600, 86_399, 86_400].into_iter().map(duration).collect();
        assert_eq!(all, ["0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d0h"]);
    }
}
