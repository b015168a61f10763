//! Metrics that are read for each scrape.

use std::collections::BTreeMap;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use redirect_ebpf::count::{Direction, OF_GATES, Reason, Verdict};
use redirect_ebpf::family::Family;

use redirect_protocol::wire::{CounterReport, PodReport, Status};

/// The state of the agent at one time.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) status: Status,
    pub(crate) pods: Vec<PodReport>,
    /// Every kind of repair, including those that never occurred.
    pub(crate) repairs: Vec<(&'static str, u64)>,
}

type Labels<const N: usize> = [(&'static str, String); N];

fn encode<const N: usize, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<&Unit>),
    series: impl IntoIterator<Item = (Labels<N>, M)>,
) -> std::fmt::Result {
    let series: Vec<_> = series.into_iter().collect();
    let Some((_, first)) = series.first() else { return Ok(()) };
    if N == 0 {
        return first.encode(encoder.encode_descriptor(name, help, unit, first.metric_type())?);
    }
    let mut metric = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
    series.iter().try_for_each(|(labels, value)| value.encode(metric.encode_family(labels)?))
}

fn of_gates() -> impl Iterator<Item = [String; 4]> {
    let labels = |(direction, reason): (Direction, Reason), family: Family| {
        [family.name(), direction.label(), Verdict::Dropped.label(), reason.label()].map(str::to_owned)
    };
    Family::ALL.into_iter().flat_map(move |family| OF_GATES.map(|what| labels(what, family)))
}

impl Collector for Snapshot {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> std::fmt::Result {
        let Self { status, pods, repairs } = self;
        let to = &mut to;
        encode(
            to,
            ("build_info", "The agent's version and the kernel that it runs on", None),
            [(
                [("version", status.version.clone()), ("kernel", status.kernel.clone())],
                ConstGauge::new(1i64),
            )],
        )?;
        encode(
            to,
            ("uptime", "Time since the agent started", Some(&Unit::Seconds)),
            [([], ConstGauge::new(status.uptime))],
        )?;
        let counted = status.counters.iter().map(|counter| {
            let CounterReport { family, direction, verdict, reason, connections } = counter;
            ([family, direction, verdict, reason].map(String::clone), *connections)
        });
        // The gates' counters exist from zero on: Prometheus ignores the first value of a series.
        let mut connections: BTreeMap<_, _> = of_gates().map(|labels| (labels, 0)).collect();
        connections.extend(counted);
        let connections =
            connections.into_iter().map(|([family, direction, verdict, reason], connections)| {
                let labels = [
                    ("ip_family", family),
                    ("direction", direction),
                    ("verdict", verdict),
                    ("reason", reason),
                ];
                (labels, ConstCounter::new(connections))
            });
        encode(to, ("connections", "Connections decided on by the kernel side", None), connections)?;
        let map = |name: &str| [("map", name.to_owned())];
        let entries = status.maps.iter().map(|of| (map(&of.name), ConstGauge::new(of.entries as u64)));
        encode(to, ("map_entries", "Entries of eBPF maps in use", None), entries)?;
        let capacity = status.maps.iter().map(|of| (map(&of.name), ConstGauge::new(of.capacity)));
        encode(to, ("map_capacity_entries", "Entries that eBPF maps can hold", None), capacity)?;
        let attached = status
            .programs
            .iter()
            .map(|program| ([("program", program.name.clone())], ConstGauge::new(program.links as u64)));
        encode(to, ("program_attachments", "Attachments of an eBPF program", None), attached)?;
        encode(
            to,
            ("proxies_connected", "Connected node proxies", None),
            [([], ConstGauge::new(status.proxies.len() as u64))],
        )?;
        let refused = status.proxies.first().map_or(0, |proxy| proxy.refused.len() as u64);
        encode(
            to,
            ("proxy_refused_pods", "Pods that the newest node proxy rejected", None),
            [([], ConstGauge::new(refused))],
        )?;
        let captured = Family::ALL.map(|family| {
            let captured = pods.iter().filter(|pod| pod.captured.iter().any(|name| name == family.name()));
            ([("ip_family", family.name().to_owned())], ConstGauge::new(captured.count() as u64))
        });
        encode(to, ("pods_enrolled", "Enrolled pods with addresses of a family", None), captured)?;
        let unserved = pods.iter().filter(|pod| pod.proxy.is_err()).count() as u64;
        encode(
            to,
            ("pods_unacknowledged", "Enrolled pods that the newest node proxy has not acknowledged", None),
            [([], ConstGauge::new(unserved))],
        )?;
        let lost = [
            ("rate_limit", status.flows.rate_limit),
            ("ring_full", status.flows.ring_full),
            ("slow_listener", status.flows.slow_listener),
        ];
        let lost = lost.map(|(reason, lost)| ([("reason", reason.to_owned())], ConstCounter::new(lost)));
        encode(to, ("flow_events_lost", "Connection events lost before they reached a monitor", None), lost)?;
        encode(
            to,
            ("flow_listeners", "Attached monitors", None),
            [([], ConstGauge::new(status.flows.listeners as u64))],
        )?;
        let repairs =
            repairs.iter().map(|(kind, count)| ([("kind", (*kind).to_owned())], ConstCounter::new(*count)));
        encode(to, ("repairs", "Repairs of changes made by other software", None), repairs)
    }
}
