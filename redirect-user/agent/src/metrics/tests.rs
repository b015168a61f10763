use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use super::*;
use redirect_protocol::wire::{CounterReport, FlowStatus, MapReport, ProgramReport, Status};
use redirect_zds::server::Event;

/// A value of every metric, so that each one has a series.
fn text() -> String {
    let events = events::events();
    events.enrolled("kernel", Duration::from_millis(1));
    events.cni("add", "ok");
    events.zds(Event::Connected);
    events.zds(Event::Answered { acknowledged: true });
    events.zds(Event::Closed { reason: "timeout" });
    events.chain_repaired();
    events.watch_failed("pods");
    events.patch_failed();
    events.pod_refused("NoNamespace");
    events.service_begins("resync");
    let counter = CounterReport {
        family: "IPv6".into(),
        direction: "outbound".into(),
        verdict: "captured".into(),
        reason: "enrolled".into(),
        connections: 12,
    };
    let status = Status {
        version: "0.1.0".into(),
        pid: 1,
        uptime: 7,
        kernel: "6.12".into(),
        cgroup: "/".into(),
        tcx: false,
        features: Vec::new(),
        programs: vec![ProgramReport { name: "outbound_ipv6".into(), id: 1, links: 1 }],
        maps: vec![MapReport { name: "PODS".into(), entries: 1, capacity: 2 }],
        proxies: Vec::new(),
        counters: vec![counter],
        repairs: Vec::new(),
        flows: FlowStatus { slow_listener: 5, ..FlowStatus::default() },
    };
    let snapshot = Snapshot { status, pods: Vec::new(), repairs: vec![("route", 3)] };
    text::prometheus(&text::open_metrics(&registry(snapshot)).unwrap())
}

fn exported(text: &str) -> BTreeSet<&str> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split(['{', ' ']).next()).collect()
}

#[test]
fn the_kernel_s_counters_keep_their_labels() {
    let expected = r#"redirect_connections_total{ip_family="IPv6",direction="outbound",verdict="captured",reason="enrolled"} 12"#;
    assert!(text().lines().any(|line| line == expected), "{}", text());
    let lost = r#"redirect_flow_events_lost_total{reason="slow_listener"} 5"#;
    assert!(text().lines().any(|line| line == lost), "{}", text());
    assert!(text().lines().any(|line| line == r#"redirect_repairs_total{kind="route"} 3"#), "{}", text());
}

#[test]
fn what_gates_drop_counts_from_zero() {
    let text = text();
    for family in ["IPv4", "IPv6"] {
        for (direction, reason) in [
            ("outbound", "past_pod"),
            ("inbound", "past_pod"),
            ("inbound", "uncaptured"),
            ("inbound", "simultaneous_open"),
        ] {
            let expected = format!(
                r#"redirect_connections_total{{ip_family="{family}",direction="{direction}",verdict="dropped",reason="{reason}"}} 0"#
            );
            assert!(text.lines().any(|line| line == expected), "{expected} is not in {text}");
        }
    }
}

#[test]
fn dashboard_and_alerts_use_metrics_that_there_are() {
    let text = text();
    let exported = exported(&text);
    for file in ["dashboard.json", "alerts.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/chart/monitoring").join(file);
        let content = std::fs::read_to_string(&path).unwrap();
        let words = content.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let used: BTreeSet<&str> = words.filter(|word| word.starts_with("redirect_")).collect();
        assert!(used.len() > 8, "{file}: {used:?}");
        let unknown: Vec<_> = used.difference(&exported).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?} are not among {exported:#?}");
    }
}
