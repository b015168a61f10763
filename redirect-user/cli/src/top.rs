//! The screen of `redirect top`: connections per second.
//!
//! The node's rates come from the kernel's counters and are exact. Rates of pods come from events
//! ([`redirect_protocol::wire::Request::Monitor`]), some of which may be lost.

use std::collections::BTreeMap;
use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Style;
use ratatui::widgets::{Block, Paragraph, Row, Table};

use redirect_protocol::wire::{FlowReport, Status};

/// Pod, family, direction, verdict, reason.
type Key = [String; 5];

/// Rates since the last update, and totals.
#[derive(Debug, Default)]
pub struct Board {
    head: String,
    node: BTreeMap<Key, Rate>,
    pods: BTreeMap<Key, Rate>,
    /// Events that this client missed; `lost` also counts the kernel side's losses.
    missed: u64,
    lost: u64,
    /// The kernel side's losses at the first update.
    lost_before: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    per_second: f64,
    total: u64,
}

impl Rate {
    fn grow(&mut self, more: u64, seconds: f64) {
        self.total += more;
        self.per_second = more as f64 / seconds;
    }
}

impl Board {
    /// Adds the agent's status, and the events and losses since the last update, `elapsed` ago.
    pub fn update(&mut self, status: &Status, flows: &[FlowReport], lost: u64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64().max(f64::EPSILON);
        self.head = format!(
            "agent {} (pid {}), Linux {}, node proxies: {}",
            status.version,
            status.pid,
            status.kernel,
            status.proxies.len()
        );
        for counter in &status.counters {
            let key = [&counter.family, &counter.direction, &counter.verdict, &counter.reason];
            let [family, direction, verdict, reason] = key.map(Clone::clone);
            let rate = self.node.entry([String::new(), family, direction, verdict, reason]).or_default();
            let more = counter.connections.saturating_sub(rate.total);
            rate.grow(more, seconds);
            if self.lost_before.is_none() {
                rate.per_second = 0.0;
            }
        }
        // Losses in the kernel appear in the agent's status only.
        let lost_in_kernel = status.flows.rate_limit + status.flows.ring_full;
        let lost_before = *self.lost_before.get_or_insert(lost_in_kernel);
        let mut counted: BTreeMap<Key, u64> = BTreeMap::new();
        for flow in flows {
            let pod = flow.pod.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
            let rest = [&flow.family, &flow.direction, &flow.verdict, &flow.reason];
            let [family, direction, verdict, reason] = rest.map(Clone::clone);
            *counted.entry([pod, family, direction, verdict, reason]).or_default() += 1;
        }
        for key in counted.keys() {
            self.pods.entry(key.clone()).or_default();
        }
        for (key, rate) in &mut self.pods {
            rate.grow(counted.get(key).copied().unwrap_or_default(), seconds);
        }
        self.missed += lost;
        self.lost = self.missed + lost_in_kernel.saturating_sub(lost_before);
    }

    /// Draws as much as fits, the highest rates first.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let node = u16::try_from(self.node.len()).unwrap_or(u16::MAX).saturating_add(3);
        let [head, above, below] =
            Layout::vertical([Constraint::Length(1), Constraint::Length(node), Constraint::Min(3)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head.as_str()), head);
        table(frame, above, " connections of this node ".into(), &self.node, false);
        let lost = match self.lost {
            0 => String::new(),
            lost => format!("({lost} events lost: figures are too low) "),
        };
        table(frame, below, format!(" by pod {lost}"), &self.pods, true);
    }
}

fn table(frame: &mut Frame<'_>, area: Rect, title: String, rates: &BTreeMap<Key, Rate>, by_pod: bool) {
    let from = usize::from(!by_pod);
    let mut sorted: Vec<_> = rates.iter().collect();
    sorted.sort_by(|(_, a), (_, b)| b.per_second.total_cmp(&a.per_second));
    let rows = sorted.into_iter().map(|(key, rate)| {
        let figures = [format!("{:>9.1}", rate.per_second), format!("{:>10}", rate.total)];
        Row::new(key.iter().skip(from).cloned().chain(figures))
    });
    let header = ["POD", "FAMILY", "DIRECTION", "VERDICT", "REASON", "   PER S.", "     TOTAL"];
    let widths = [24, 6, 9, 8, 14, 9, 10].map(Constraint::Length);
    let shown = Table::new(rows, widths.into_iter().skip(from))
        .header(Row::new(header.into_iter().skip(from)).style(Style::new().bold()))
        .block(Block::bordered().title(title));
    frame.render_widget(shown, area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use redirect_protocol::pod::PodIdentity;
    use redirect_protocol::wire::{CounterReport, FlowStatus};

    fn status(connections: u64) -> Status {
        let counter = |family: &str, connections| CounterReport {
            family: family.into(),
            direction: "outbound".into(),
            verdict: "captured".into(),
            reason: "enrolled".into(),
            connections,
        };
        Status {
            version: "0.1.0".into(),
            pid: 7,
            uptime: 1,
            kernel: "6.12.0".into(),
            cgroup: "/sys/fs/cgroup".into(),
            tcx: false,
            features: Vec::new(),
            programs: Vec::new(),
            maps: Vec::new(),
            proxies: Vec::new(),
            counters: vec![counter("IPv4", 100), counter("IPv6", connections)],
            repairs: Vec::new(),
            flows: FlowStatus::default(),
        }
    }

    fn flow(name: &str) -> FlowReport {
        FlowReport {
            time: jiff::Timestamp::UNIX_EPOCH,
            pod: Some(PodIdentity { namespace: "shop".into(), name: name.into(), ..PodIdentity::default() }),
            family: "IPv6".into(),
            direction: "outbound".into(),
            source: None,
            destination: None,
            verdict: "captured".into(),
            reason: "enrolled".into(),
            socket_cookie: None,
        }
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let mut board = Board::default();
        board.update(&status(1000), &[], 0, Duration::from_secs(1));
        board.update(&status(1007), &[flow("web"), flow("web"), flow("db")], 4, Duration::from_secs(2));
        let mut terminal = Terminal::new(TestBackend::new(90, 14)).unwrap();
        terminal.draw(|frame| board.draw(frame)).unwrap();
        insta::assert_snapshot!("top", terminal.backend());
        // No change since.
        board.update(&status(1007), &[], 0, Duration::from_secs(2));
        assert!(board.node.values().chain(board.pods.values()).all(|rate| rate.per_second == 0.0));
    }
}
