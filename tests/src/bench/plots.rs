//! Plots as SVG, with the viewer's fonts.

use std::error::Error;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::run::Data;
use super::statistics::{Estimate, percentile};
use super::targets::Rounds;
use super::traffic::{Sample, Scene};
use super::world::Arm;
use crate::Stack;

const SIZE: (u32, u32) = (1100, 520);

/// A bar, or a gap between groups.
struct Bar {
    label: String,
    color: RGBColor,
    estimate: Estimate,
}

/// Plots all measurements into a directory.
pub fn draw(data: &Data, directory: &Path) -> Result<()> {
    let rounds = Rounds::of(&data.samples);
    for (scene, name, base) in [
        (Scene::SinkOutbound, "outbound", Arm::Floor),
        (Scene::SinkInbound, "inbound", Arm::Floor),
        (Scene::Path, "path", Arm::Ebpf),
        (Scene::Tunnel, "tunnel", Arm::Ebpf),
    ] {
        let mut bars = Vec::new();
        for case in rounds.cases(scene).into_iter().filter(|case| case.stack != Stack::Mapped) {
            for arm in case.arms().into_iter().filter(|&arm| arm != Arm::None) {
                if let Some(estimate) = rounds.ratio(case, arm, base, Sample::cost) {
                    bars.push(Bar { label: format!("{case}, {}", arm.label()), color: color(arm), estimate });
                }
            }
        }
        if !bars.is_empty() {
            let title = format!("{}: time of an operation, {} = 1", scene.label(), base.label());
            plot(directory, name, &title, &bars)?;
        }
    }
    if let Some(times) = &data.enrollment {
        let bar = |label: &str, color, values: &[f64]| {
            let at = |share| percentile(values, share).unwrap_or_default() / 1000.0;
            Bar {
                label: label.to_owned(),
                color,
                estimate: Estimate { value: at(0.5), low: at(0.05), high: at(0.95) },
            }
        };
        let bars = [
            bar("ebpf, our share", color(Arm::Ebpf), &times.ours()),
            bar("iptables", color(Arm::Iptables), &times.iptables),
            bar("nft", color(Arm::Nft), &times.nft),
            bar("un-enrollment, ebpf", color(Arm::Ebpf), &times.release_ours()),
            bar("removal, iptables", color(Arm::Iptables), &times.iptables_release),
            bar("removal, nft", color(Arm::Nft), &times.nft_release),
        ];
        plot(directory, "enrollment", "enrollment of one pod: median, 5 % and 95 %, in ms", &bars)?;
    }
    Ok(())
}

fn color(arm: Arm) -> RGBColor {
    match arm {
        Arm::Floor | Arm::Again => RGBColor(150, 150, 150),
        Arm::Against => RGBColor(86, 180, 233),
        Arm::None => RGBColor(210, 210, 210),
        Arm::Ebpf => RGBColor(0, 114, 178),
        Arm::Iptables => RGBColor(213, 94, 0),
        Arm::Nft => RGBColor(230, 159, 0),
    }
}

fn plot(directory: &Path, name: &str, title: &str, bars: &[Bar]) -> Result<()> {
    let failed = |error: Box<dyn Error + '_>| anyhow!("plot {name}: {error}");
    let svg = directory.join(format!("{name}.svg"));
    chart(&SVGBackend::new(&svg, SIZE).into_drawing_area(), title, bars).map_err(failed)
}

/// Horizontal bars from top to bottom, each with its name on the left and its interval.
fn chart<'a, B: DrawingBackend + 'a>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    bars: &[Bar],
) -> Result<(), Box<dyn Error + 'a>>
where
    B::ErrorType: 'static,
{
    let most = bars.iter().map(|bar| bar.estimate.value).fold(1.0, f64::max) * 1.15;
    let count = bars.len() as f64;
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(250)
        .build_cartesian_2d(0.0..most, 0.0..count)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_label_style(("sans-serif", 13)).draw()?;
    let size = (380.0 / count).clamp(7.0, 14.0);
    for (place, bar) in bars.iter().enumerate() {
        let bottom = count - place as f64 - 1.0;
        let Estimate { value, low, high } = bar.estimate;
        chart.draw_series([Rectangle::new(
            [(0.0, bottom + 0.12), (value, bottom + 0.88)],
            bar.color.filled(),
        )])?;
        if low.is_finite() && high.is_finite() {
            let ends = vec![(low.max(0.0), bottom + 0.5), (high.min(most), bottom + 0.5)];
            chart.draw_series([PathElement::new(ends, BLACK.stroke_width(2))])?;
        }
        let (_, y) = chart.backend_coord(&(0.0, bottom + 0.8));
        area.draw(&Text::new(bar.label.clone(), (12, y), ("sans-serif", size)))?;
        let (x, _) =
            chart.backend_coord(&(value.max(if high.is_finite() { high.min(most) } else { value }), bottom));
        area.draw(&Text::new(format!("{value:.2}"), (x + 6, y), ("sans-serif", size)))?;
    }
    area.present()?;
    Ok(())
}
