//! The project's targets, and the measurements for them.

use std::collections::BTreeMap;

use super::load::Work;
use super::run::Data;
use super::statistics::{Estimate, percentile};
use super::traffic::{Case, Sample, Scene};
use super::world::Arm;
use crate::Stack;

/// A target.
#[derive(Clone, Debug)]
pub struct Target {
    /// The measure.
    pub measure: String,
    /// The bound.
    pub wanted: String,
    /// The measurement, with its confidence interval.
    pub measured: String,
    /// Whether it is met; `None` if it was not measured.
    pub verdict: Option<Verdict>,
}

/// Whether a target is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole interval is on the right side.
    Met,
    /// The whole interval is on the wrong side.
    Missed,
    /// The target is within the interval.
    Undecided,
}

/// The samples of one case by arm, in the order of the rounds.
#[derive(Clone, Debug, Default)]
pub struct Rounds<'a>(BTreeMap<(Case, Arm), Vec<&'a Sample>>);

impl<'a> Rounds<'a> {
    /// Sorts samples.
    #[must_use]
    pub fn of(samples: &'a [Sample]) -> Self {
        let mut rounds = Self::default();
        for sample in samples {
            rounds.0.entry((sample.case, sample.arm)).or_default().push(sample);
        }
        rounds
    }

    /// The measured cases of a scene.
    #[must_use]
    pub fn cases(&self, scene: Scene) -> Vec<Case> {
        let cases = Case::of(scene).into_iter();
        cases.filter(|case| self.0.keys().any(|(known, _)| known == case)).collect()
    }

    /// The samples.
    #[must_use]
    pub fn samples(&self, case: Case, arm: Arm) -> &[&'a Sample] {
        self.0.get(&(case, arm)).map_or(&[], Vec::as_slice)
    }

    /// A value of every round.
    #[must_use]
    pub fn values(&self, case: Case, arm: Arm, value: impl Fn(&Sample) -> f64) -> Vec<f64> {
        self.samples(case, arm).iter().map(|sample| value(sample)).collect()
    }

    /// How much more one arm costs than another.
    #[must_use]
    pub fn ratio(
        &self,
        case: Case,
        arm: Arm,
        to: Arm,
        value: impl Fn(&Sample) -> f64 + Copy,
    ) -> Option<Estimate> {
        Estimate::ratio(&self.values(case, arm, value), &self.values(case, to, value))
    }
}

/// The wanted side of a bound.
#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn text(self, unit: &str) -> String {
        match self {
            Self::AtMost(bound) => format!("≤ {bound}{unit}"),
            Self::AtLeast(bound) => format!("≥ {bound}{unit}"),
        }
    }

    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }

    fn verdict(self, found: Estimate) -> Verdict {
        match (self.holds(found.low), self.holds(found.high)) {
            (true, true) => Verdict::Met,
            (false, false) => Verdict::Missed,
            _ => Verdict::Undecided,
        }
    }

    fn target(self, measure: String, unit: &str, estimate: Option<Estimate>) -> Target {
        Target {
            measure,
            wanted: self.text(unit),
            measured: estimate.map_or_else(|| "not measured".to_owned(), |found| format!("{found}{unit}")),
            verdict: estimate.map(|found| self.verdict(found)),
        }
    }
}

/// All of them, in the order of reports.
pub const SCENES: [Scene; 4] = [Scene::SinkOutbound, Scene::SinkInbound, Scene::Path, Scene::Tunnel];

const FAMILIES: [Stack; 2] = [Stack::V4, Stack::V6];

/// The targets with their measurements.
#[must_use]
pub fn evaluate(data: &Data) -> Vec<Target> {
    let rounds = Rounds::of(&data.samples);
    let mut targets = Vec::new();
    for stack in FAMILIES {
        let case = |scene, work, clients| Case { scene, work, clients, stack };
        let connection = case(Scene::SinkOutbound, Work::Connections, 1);
        let ping_pong = case(Scene::SinkOutbound, Work::PingPong, 1);
        let bulk = case(Scene::SinkOutbound, Work::Bulk, 1);
        let path = case(Scene::Path, Work::Connections, 16);
        let tunnel = case(Scene::Tunnel, Work::Connections, 16);
        let of = |case, arm, to| rounds.ratio(case, arm, to, Sample::cost);
        let plan = [
            ("connection (sink), ebpf : floor", Bound::AtMost(1.04), of(connection, Arm::Ebpf, Arm::Floor)),
            (
                "connection (sink), iptables : ebpf",
                Bound::AtLeast(1.4),
                of(connection, Arm::Iptables, Arm::Ebpf),
            ),
            (
                "ping-pong (sink), iptables : ebpf",
                Bound::AtLeast(1.4),
                of(ping_pong, Arm::Iptables, Arm::Ebpf),
            ),
            ("ping-pong (sink), ebpf : floor", Bound::AtMost(1.005), of(ping_pong, Arm::Ebpf, Arm::Floor)),
            ("bulk (sink), iptables : ebpf", Bound::AtLeast(1.6), of(bulk, Arm::Iptables, Arm::Ebpf)),
            ("bulk (sink), ebpf : floor", Bound::AtMost(1.01), of(bulk, Arm::Ebpf, Arm::Floor)),
            (
                "connections by the whole path, 16 clients, ebpf : iptables",
                Bound::AtLeast(1.25),
                of(path, Arm::Iptables, Arm::Ebpf),
            ),
            (
                "connections through a tunnel, 16 clients, ebpf : iptables",
                Bound::AtLeast(1.15),
                of(tunnel, Arm::Iptables, Arm::Ebpf),
            ),
        ];
        targets.extend(plan.map(|(what, bound, found)| bound.target(format!("{what}, {stack}"), "", found)));
        let inbound = [(Work::Connections, 1.04), (Work::PingPong, 1.005), (Work::Bulk, 1.01)];
        targets.extend(inbound.map(|(work, bound)| {
            let case = case(Scene::SinkInbound, work, 1);
            Bound::AtMost(bound).target(
                format!("inbound {case} (sink), ebpf : floor"),
                "",
                of(case, Arm::Ebpf, Arm::Floor),
            )
        }));
    }
    targets.extend(turns(data));
    targets.extend(families(&rounds));
    targets.extend(enrollment(data));
    targets.extend(scale(data));
    targets
}

/// The ratio of the second floor to the first. They are the same, so any difference is the run's error.
#[must_use]
pub fn errors(data: &Data) -> Vec<(Case, Estimate)> {
    against(data, Arm::Again, Arm::Floor)
}

/// The cost of this build relative to the other.
#[must_use]
pub fn builds(data: &Data) -> Vec<(Case, Estimate)> {
    against(data, Arm::Ebpf, Arm::Against)
}

/// Whether both floors cost the same, within the wanted or the reached precision.
#[must_use]
pub fn is_valid(data: &Data) -> bool {
    let holds = |found: &Estimate| {
        (found.low..=found.high).contains(&1.0) || (found.value - 1.0).abs() <= data.precision
    };
    errors(data).iter().all(|(_, found)| holds(found))
}

fn against(data: &Data, arm: Arm, to: Arm) -> Vec<(Case, Estimate)> {
    let rounds = Rounds::of(&data.samples);
    let cases = SCENES.into_iter().flat_map(|scene| rounds.cases(scene));
    cases.filter_map(|case| Some((case, rounds.ratio(case, arm, to, Sample::cost)?))).collect()
}

/// The cost of iptables relative to the floor: a redirection without any cost would be better than iptables by this ratio,
/// and none can be better.
#[must_use]
pub fn limits(data: &Data) -> Vec<(Case, Estimate)> {
    let rounds = Rounds::of(&data.samples);
    let cases = rounds.cases(Scene::SinkOutbound).into_iter();
    cases
        .filter_map(|case| {
            rounds.ratio(case, Arm::Iptables, Arm::Floor, Sample::cost).map(|estimate| (case, estimate))
        })
        .collect()
}

fn turns(data: &Data) -> Vec<Target> {
    let ours = data.turns.iter().filter(|turns| turns.arm == Arm::Ebpf);
    ours.flat_map(|turns| {
        let stack = turns.stack;
        [
            Bound::AtMost(0.0).target(
                format!("two destinations in turn, ebpf: SYNs sent again and failures, {stack}"),
                "",
                Some(Estimate::exact((turns.retransmits + turns.errors) as f64)),
            ),
            Bound::AtLeast(0.9).target(
                format!("two destinations in turn, ebpf: rate, two : one, {stack}"),
                "",
                Some(Estimate::exact(turns.two / turns.one)),
            ),
        ]
    })
    .collect()
}

/// The cost of IPv6 relative to IPv4 in our arm, compared with the floor's; the worst case of a scene.
fn families(rounds: &Rounds<'_>) -> Vec<Target> {
    let scenes = [Scene::SinkOutbound, Scene::SinkInbound];
    let worst = |scene| {
        let cases = rounds.cases(scene).into_iter().filter(|case| case.stack == Stack::V6);
        let found = cases.filter_map(|ipv6| {
            let ipv4 = Case { stack: Stack::V4, ..ipv6 };
            let against_floor = |case| rounds.ratio(case, Arm::Ebpf, Arm::Floor, Sample::cost);
            Some((ipv6, against_floor(ipv6)?.over(against_floor(ipv4)?)))
        });
        found.max_by(|(_, a), (_, b)| a.value.total_cmp(&b.value))
    };
    scenes
        .into_iter()
        .map(|scene| {
            let worst = worst(scene);
            let name = worst.map_or(String::new(), |(case, _)| format!(" (worst: {case})"));
            let measure = format!("IPv6 : IPv4, ebpf against floor, {}{name}", scene.label());
            Bound::AtMost(1.05).target(measure, "", worst.map(|(_, estimate)| estimate))
        })
        .collect()
}

fn enrollment(data: &Data) -> Vec<Target> {
    let Some(times) = &data.enrollment else { return Vec::new() };
    let at = |values: &[f64], share| percentile(values, share).map(|value| Estimate::exact(value / 1000.0));
    [
        ("enrollment of a pod, both families, our share, p50", 0.7, at(&times.ours(), 0.5)),
        ("enrollment of a pod, both families, our share, p99", 2.0, at(&times.ours(), 0.99)),
        ("un-enrollment, our share, p50", 0.5, at(&times.release_ours(), 0.5)),
        ("plugin process, without the agent's work, p50", 1.0, at(&times.plugin_alone(), 0.5)),
    ]
    .into_iter()
    .map(|(what, bound, found)| Bound::AtMost(bound).target(what.to_owned(), " ms", found))
    .collect()
}

fn scale(data: &Data) -> Vec<Target> {
    let mut targets = Vec::new();
    if let Some(scale) = &data.scale {
        let [taken, returned] = scale.kernel_per_pod;
        let between = Estimate {
            value: (taken + returned) / 2048.0,
            low: taken.min(returned) / 1024.0,
            high: taken.max(returned) / 1024.0,
        };
        targets.push(Bound::AtMost(14.0).target("kernel memory of a pod".to_owned(), " KiB", Some(between)));
        for (pods, bound) in [(250, 16.0), (1000, 25.0)] {
            let level = scale.levels.iter().find(|level| level.pods == pods);
            let found = level.map(|level| Estimate::exact(level.agent as f64 / 1048576.0));
            targets.push(Bound::AtMost(bound).target(
                format!("memory of the agent at {pods} pods"),
                " MiB",
                found,
            ));
        }
    }
    for many in &data.many {
        let (few, crowded) = (Rounds::of(&many.few), Rounds::of(&many.many));
        for stack in FAMILIES {
            let case = Case { scene: Scene::SinkOutbound, work: Work::Connections, clients: 1, stack };
            let against_floor = |rounds: &Rounds<'_>| rounds.ratio(case, Arm::Ebpf, Arm::Floor, Sample::cost);
            let found = against_floor(&crowded).zip(against_floor(&few));
            let found = found.map(|(crowded, few)| crowded.over(few));
            let measure = format!("connection with {} : without, ebpf against floor, {stack}", many.what);
            targets.push(Bound::AtMost(1.05).target(measure, "", found));
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_needs_all_of_the_interval() {
        let between = |low, high| Some(Estimate { value: (low + high) / 2.0, low, high });
        let cases = [
            (Bound::AtMost(1.05), between(1.0, 1.05), Verdict::Met, "≤ 1.05"),
            (Bound::AtMost(1.05), between(1.04, 1.06), Verdict::Undecided, "≤ 1.05"),
            (Bound::AtMost(1.05), between(1.06, 1.07), Verdict::Missed, "≤ 1.05"),
            (Bound::AtLeast(1.4), between(1.4, 1.5), Verdict::Met, "≥ 1.4"),
            (Bound::AtLeast(1.4), between(1.3, 1.5), Verdict::Undecided, "≥ 1.4"),
        ];
        for (bound, estimate, verdict, wanted) in cases {
            let target = bound.target("measure".into(), "", estimate);
            assert_eq!((target.verdict, target.wanted.as_str()), (Some(verdict), wanted));
        }
        assert_eq!(Bound::AtMost(1.0).target("measure".into(), "", None).verdict, None);
    }
}
