//! The report in Markdown, the part of it in deploy/docs/benchmark.md, and the raw data as CSV.

use std::fmt::Write;

use super::run::Data;
use super::statistics::{Estimate, percentile};
use super::targets::{Rounds, SCENES, Target, Verdict, builds, errors, evaluate, is_valid, limits};
use super::traffic::{Case, Sample};
use super::world::Arm;
use crate::bench::load::Work;

/// A run writes the part of deploy/docs/benchmark.md between these lines.
pub const MARKERS: [&str; 2] = ["<!-- measured: begin -->", "<!-- measured: end -->"];

/// A table in Markdown.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let rule: Vec<String> = head.iter().map(|_| "---".to_owned()).collect();
    let mut text = line(&head) + &line(&rule).replace(" --- ", "---");
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// The targets as a table.
#[must_use]
pub fn targets(targets: &[Target]) -> String {
    let rows: Vec<Vec<String>> = targets
        .iter()
        .map(|target| {
            let met = match target.verdict {
                None => "–",
                Some(Verdict::Met) => "yes",
                Some(Verdict::Missed) => "no",
                Some(Verdict::Undecided) => "undecided",
            };
            vec![target.measure.clone(), target.wanted.clone(), target.measured.clone(), met.to_owned()]
        })
        .collect();
    table(&["measure", "target", "measured (95 % interval)", "met"], &rows)
}

/// The machine, and its other load.
fn circumstances(data: &Data) -> String {
    let machine = &data.machine;
    let mut text = format!(
        "Linux {} on {} × {}, {} MiB; {}; {}. Load average before: {:.2}; other processes took {:.0} % of the processors \
         during the measurements of connections. {} run. The proxy of the whole path: {}.\n",
        machine.kernel,
        machine.processors,
        machine.processor,
        machine.memory,
        machine.iptables,
        machine.nftables,
        machine.load_before,
        machine.disturbance * 100.0,
        if data.quick { "Quick" } else { "Full" },
        data.proxy,
    );
    if machine.is_noisy() {
        text += "\n**The machine was busy with other things: ratios of time are unreliable, those of CPU time less so.**\n";
    }
    if !is_valid(data) {
        text += "\n**Invalid: the floor differs from the floor (below), so that nothing can be said of anything else.**\n";
    }
    text
}

/// A sentence with ratios of one kind; empty if there are none.
fn list(what: &str, ratios: &[(Case, Estimate)]) -> String {
    if ratios.is_empty() {
        return String::new();
    }
    let list: Vec<String> =
        ratios.iter().map(|(case, estimate)| format!("{}, {case}: {estimate}", case.scene.label())).collect();
    format!("\n{what}: {}.\n", list.join("; "))
}

/// The error of the run, and the difference between this build and another one.
fn comparisons(data: &Data) -> String {
    list("The floor against itself", &errors(data)) + &list("This build against the other", &builds(data))
}

/// The part of deploy/docs/benchmark.md.
#[must_use]
pub fn documented(data: &Data) -> String {
    format!(
        "{}\nMedians of the ratios of blocks of 5 ms that follow each other in random order, with confidence intervals of 95 %; a \
         sink is a proxy that answers itself.\n\n{}{}{}",
        circumstances(data),
        targets(&evaluate(data)),
        bounds(data),
        comparisons(data),
    )
}

/// How much better than iptables a redirection can be at most on this machine.
fn bounds(data: &Data) -> String {
    list(
        "What iptables costs on this machine, iptables : floor (no redirection can be better than iptables by more)",
        &limits(data),
    )
}

/// Puts a text between the markers of another one. `None` if they are not there.
#[must_use]
pub fn replace(document: &str, text: &str) -> Option<String> {
    let [begin, end] = MARKERS;
    let (before, rest) = document.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{}\n{end}{after}", text.trim_end()))
}

/// The whole report.
#[must_use]
pub fn markdown(data: &Data) -> String {
    let rounds = Rounds::of(&data.samples);
    let mut text =
        format!("# Measurements\n\n{}\n## Targets\n\n{}", circumstances(data), targets(&evaluate(data)));
    text += &bounds(data);
    text += &comparisons(data);
    for scene in SCENES {
        let cases = rounds.cases(scene);
        if !cases.is_empty() {
            let _ = write!(text, "\n## Connections {}\n\n{}", scene.label(), costs(data, &rounds, &cases));
            let _ = write!(text, "\nTime and CPU time against other arms:\n\n{}", ratios(&rounds, &cases));
        }
    }
    text += &extras(data);
    text += &enrollment(data);
    text += &scale(data);
    text
}

fn costs(data: &Data, rounds: &Rounds<'_>, cases: &[Case]) -> String {
    let mut rows = Vec::new();
    for &case in cases {
        for arm in case.arms() {
            let samples = rounds.samples(case, arm);
            if samples.is_empty() {
                continue;
            }
            let middle = |value: &dyn Fn(&Sample) -> f64| {
                Estimate::of(&samples.iter().map(|sample| value(sample)).collect::<Vec<_>>())
                    .map_or(f64::NAN, |estimate| estimate.value)
            };
            let latency = data.latencies.iter().find(|known| (known.case, known.arm) == (case, arm));
            let [p50, p99, p999] =
                latency.map_or([0; 3], |known| known.latency).map(|time| time as f64 / 1000.0);
            let errors: u64 = samples.iter().map(|sample| sample.outcome.errors).sum();
            let (cost, cpu) = (middle(&Sample::cost), middle(&Sample::cpu));
            let (rate, cpu, latencies) = match case.work {
                // A byte per nanosecond is a gigabyte per second.
                Work::Bulk => (format!("{:.2} GB/s", 1.0 / cost), format!("{cpu:.3} s/GB"), "–".to_owned()),
                Work::Connections | Work::PingPong => (
                    format!("{:.0}/s", 1e9 / cost),
                    format!("{:.1} µs", cpu / 1000.0),
                    format!("{p50:.1} / {p99:.1} / {p999:.1}"),
                ),
            };
            rows.push(vec![
                case.to_string(),
                arm.label().to_owned(),
                rate,
                latencies,
                cpu,
                errors.to_string(),
                samples.len().to_string(),
                samples.iter().filter(|sample| sample.stolen > 0).count().to_string(),
            ]);
        }
    }
    let head = [
        "measure",
        "arm",
        "rate",
        "p50 / p99 / p99.9 in µs",
        "CPU time each",
        "failed",
        "blocks",
        "with steal",
    ];
    table(&head, &rows)
}

fn ratios(rounds: &Rounds<'_>, cases: &[Case]) -> String {
    let show =
        |estimate: Option<Estimate>| estimate.map_or_else(|| "–".to_owned(), |found| found.to_string());
    let pairs = [(Arm::Ebpf, Arm::Floor), (Arm::Iptables, Arm::Ebpf), (Arm::Nft, Arm::Ebpf)];
    let rows: Vec<Vec<String>> = cases
        .iter()
        .map(|&case| {
            let time = pairs.map(|(arm, to)| show(rounds.ratio(case, arm, to, Sample::cost)));
            let cpu = pairs.map(|(arm, to)| show(rounds.ratio(case, arm, to, Sample::cpu)));
            [case.to_string()].into_iter().chain(time).chain(cpu).collect()
        })
        .collect();
    let head = [
        "measure",
        "ebpf : floor",
        "iptables : ebpf",
        "nft : ebpf",
        "CPU, ebpf : floor",
        "CPU, iptables : ebpf",
        "CPU, nft : ebpf",
    ];
    table(&head, &rows)
}

fn extras(data: &Data) -> String {
    let mut text = String::new();
    if !data.turns.is_empty() {
        let rows: Vec<Vec<String>> = data
            .turns
            .iter()
            .map(|turns| {
                vec![
                    turns.stack.to_string(),
                    turns.arm.label().to_owned(),
                    format!("{:.0}", turns.one),
                    format!("{:.0}", turns.two),
                    turns.retransmits.to_string(),
                    turns.errors.to_string(),
                ]
            })
            .collect();
        let head = ["", "arm", "one destination, 1/s", "two in turn, 1/s", "SYNs sent again", "failed"];
        let _ = write!(text, "\n## One pod, two destinations in turn, 16 clients\n\n{}", table(&head, &rows));
    }
    if !data.hooks.is_empty() {
        let rows: Vec<Vec<String>> = data
            .hooks
            .iter()
            .map(|hook| {
                vec![
                    format!("{}, {}", hook.during.scene.label(), hook.during),
                    hook.program.clone(),
                    format!("{:.2}", hook.runs),
                    format!("{:.0}", hook.nanoseconds),
                ]
            })
            .collect();
        let head = ["during", "program", "runs each", "ns a run"];
        let _ = write!(
            text,
            "\n## Run time of programs (with what measuring it takes)\n\n{}\n### Where it goes: ebpf less floor, in ns each\n\n{}",
            table(&head, &rows),
            shares(data)
        );
    }
    text
}

/// The overhead of an operation over the floor, and the programs' own share of it.
fn shares(data: &Data) -> String {
    let rounds = Rounds::of(&data.samples);
    let mut cases: Vec<Case> = data.hooks.iter().map(|hook| hook.during).collect();
    cases.dedup();
    let rows: Vec<Vec<String>> = cases
        .into_iter()
        .map(|case| {
            let of = data.hooks.iter().filter(|hook| hook.during == case);
            let programs: f64 = of.map(|hook| hook.runs * hook.nanoseconds).sum();
            let cost = |arm| rounds.values(case, arm, Sample::cost);
            let differences =
                cost(Arm::Ebpf).into_iter().zip(cost(Arm::Floor)).map(|(ours, floor)| ours - floor);
            let all = percentile(&differences.collect::<Vec<_>>(), 0.5);
            let show =
                |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.0}"));
            vec![
                format!("{}, {case}", case.scene.label()),
                show(all),
                show(Some(programs)),
                show(all.map(|all| all - programs)),
            ]
        })
        .collect();
    table(&["", "all", "programs", "the kernel around them"], &rows)
}

fn enrollment(data: &Data) -> String {
    let Some(times) = &data.enrollment else { return String::new() };
    let row = |what: &str, values: &[f64]| {
        let at = |share| {
            percentile(values, share).map_or("–".to_owned(), |value| format!("{:.2}", value / 1000.0))
        };
        vec![what.to_owned(), at(0.5), at(0.99)]
    };
    let (ours, release, plugin) = (times.ours(), times.release_ours(), times.plugin_alone());
    let rows = [
        row("request to answer", &times.request),
        row("– reading what is in the kernel", &times.read),
        row("– the steps", &times.write),
        row("– the proxy", &times.proxy),
        row("our share", &ours),
        row("un-enrollment, our share", &release),
        row("plugin, start to exit", &times.plugin),
        row("plugin, without the agent", &plugin),
        row("iptables-restore × 2, rules, routes", &times.iptables),
        row("– removal", &times.iptables_release),
        row("nft, rules, routes", &times.nft),
        row("– removal", &times.nft_release),
    ];
    let mut text =
        format!("\n## Enrollment of one pod, both families, in ms\n\n{}", table(&["", "p50", "p99"], &rows));
    let rows: Vec<Vec<String>> = times
        .crowds
        .iter()
        .map(|crowd| {
            let middle = |values: &[f64]| {
                percentile(values, 0.5).map_or("–".to_owned(), |value| format!("{:.1}", value / 1000.0))
            };
            vec![crowd.pods.to_string(), middle(&crowd.ebpf), middle(&crowd.iptables), middle(&crowd.nft)]
        })
        .collect();
    if let Some([request, release]) = &times.against {
        for (what, ours, theirs) in
            [("Enrollment", &times.request, request), ("Un-enrollment", &times.release, release)]
        {
            if let Some(found) = Estimate::ratio(ours, theirs) {
                let _ = write!(text, "\n{what}, request to answer, this build against the other: {found}.\n");
            }
        }
    }
    let head = ["pods at once", "ebpf, by the plugin", "iptables", "nft"];
    let _ = write!(text, "\n### Until the last of several is captured, in ms\n\n{}", table(&head, &rows));
    text
}

fn scale(data: &Data) -> String {
    let Some(scale) = &data.scale else { return String::new() };
    let mebibytes = |bytes: u64| format!("{:.2}", bytes as f64 / 1048576.0);
    let rows: Vec<Vec<String>> = scale
        .levels
        .iter()
        .map(|level| {
            vec![
                level.pods.to_string(),
                mebibytes(level.agent),
                mebibytes(level.bpf),
                level.links.to_string(),
                format!("{:.2} %", level.idle * 100.0),
            ]
        })
        .collect();
    let head = ["pods", "agent, MiB", "maps and programs, MiB", "attachments", "idle agent, of a processor"];
    let kibibytes = |[taken, returned]: [f64; 2]| format!("{:.1} / {:.1}", taken / 1024.0, returned / 1024.0);
    format!(
        "\n## Memory\n\n{}\nKernel memory of a pod in KiB, taken / given back (slabs and memory for each processor, of the whole \
         machine): ebpf {}, iptables {}, nft {}.\n",
        table(&head, &rows),
        kibibytes(scale.kernel_per_pod),
        kibibytes(scale.iptables_per_pod),
        kibibytes(scale.nft_per_pod),
    )
}

/// Every sample of connections as a line.
#[must_use]
pub fn csv(data: &Data) -> String {
    let mut text =
        "scene,work,clients,stack,arm,round,nanoseconds,count,all,client_cpu,served_cpu,errors,stolen\n"
            .to_owned();
    for sample in &data.samples {
        let (case, outcome) = (sample.case, &sample.outcome);
        let _ = writeln!(
            text,
            "{:?},{:?},{},{:?},{},{},{},{},{},{},{},{},{}",
            case.scene,
            case.work,
            case.clients,
            case.stack,
            sample.arm.label(),
            sample.round,
            outcome.nanoseconds,
            outcome.count,
            outcome.all,
            outcome.cpu,
            sample.served_cpu,
            outcome.errors,
            sample.stolen
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let [begin, end] = MARKERS;
        let document = format!("before\n{begin}\nold\n{end}\nafter\n");
        let expected = format!("before\n{begin}\nnew\n{end}\nafter\n");
        assert_eq!(replace(&document, "new\n"), Some(expected.clone()));
        assert_eq!(replace(&expected, "new"), Some(expected));
        assert_eq!(replace("no markers", "new"), None);
    }

    #[test]
    fn the_documentation_has_the_markers() {
        assert!(replace(include_str!("../../../deploy/docs/benchmark.md"), "new").is_some());
    }

    #[test]
    fn tables_are_markdown() {
        let text = table(&["a", "b"], &[vec!["1".into(), "2".into()]]);
        assert_eq!(text, "| a | b |\n|---|---|\n| 1 | 2 |\n");
    }
}
