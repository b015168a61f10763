//! Logs dropped connections and lost events at debug level, as sums over an interval, never one by one.

use redirect_ebpf::Verdict;
use tracing::Level;

use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::{Linux, Report};
use redirect_protocol::wire::CounterReport;

/// The counts at the last report.
#[derive(Debug, Default)]
pub(super) struct DropLog {
    before: Option<Report>,
}

impl DropLog {
    /// Logs the changes since the last report, if the level is enabled.
    pub(super) async fn tell(&mut self, kernel: &DatapathHandle<Linux>) {
        if !tracing::enabled!(Level::DEBUG) {
            return;
        }
        let Ok(Ok(now)) = kernel.run(|linux| linux.report()).await else { return };
        if let Some(before) = &self.before {
            for CounterReport { family, direction, reason, connections, .. } in dropped(before, &now) {
                tracing::debug!(family, direction, reason, connections, "kernel dropped connections");
            }
            let limit = now.flows_limited.saturating_sub(before.flows_limited);
            let full = now.flows_full.saturating_sub(before.flows_full);
            if limit + full > 0 {
                tracing::debug!(limit, full, "connection events lost");
            }
        }
        self.before = Some(now);
    }
}

/// The growth of the counters of drops.
fn dropped(before: &Report, now: &Report) -> Vec<CounterReport> {
    let key =
        |counter: &CounterReport| (counter.family.clone(), counter.direction.clone(), counter.reason.clone());
    let grown = |counter: &CounterReport| {
        let is_same = |old: &&CounterReport| old.verdict == counter.verdict && key(old) == key(counter);
        let old = before.counters.iter().find(is_same).map_or(0, |old| old.connections);
        let connections = counter.connections.checked_sub(old).filter(|more| *more > 0)?;
        Some(CounterReport { connections, ..counter.clone() })
    };
    now.counters
        .iter()
        .filter(|counter| counter.verdict == Verdict::Dropped.label())
        .filter_map(grown)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_grown_is_told() {
        let counter = |family: &str, verdict: Verdict, connections| CounterReport {
            family: family.into(),
            direction: "inbound".into(),
            verdict: verdict.label().into(),
            reason: "malformed".into(),
            connections,
        };
        let report = |counters| Report {
            programs: Vec::new(),
            maps: Vec::new(),
            counters,
            tcx: false,
            flows_limited: 0,
            flows_full: 0,
        };
        let before = report(vec![counter("IPv4", Verdict::Dropped, 3), counter("IPv4", Verdict::Passed, 1)]);
        let now = report(vec![
            counter("IPv4", Verdict::Dropped, 3),
            counter("IPv4", Verdict::Passed, 5),
            counter("IPv6", Verdict::Dropped, 2),
        ]);
        assert_eq!(dropped(&before, &now), [counter("IPv6", Verdict::Dropped, 2)]);
        assert!(dropped(&now, &now).is_empty());
    }
}
