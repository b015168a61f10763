//! The exposition formats: OpenMetrics, or the older Prometheus format for clients that don't ask for OpenMetrics.

use prometheus_client::registry::Registry;

pub(super) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
pub(super) const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics in the OpenMetrics format.
pub(super) fn open_metrics(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

/// The same in the Prometheus format, in which comments contain a counter's suffix as well.
pub(super) fn prometheus(open_metrics: &str) -> String {
    let lines: Vec<&str> = open_metrics.lines().collect();
    let counters: Vec<&str> =
        lines.iter().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::new();
    for line in lines {
        let comment =
            ["# HELP ", "# TYPE "].into_iter().find_map(|start| Some((start, line.strip_prefix(start)?)));
        match comment.and_then(|(start, rest)| Some((start, rest.split_once(' ')?))) {
            Some((start, (name, rest))) if counters.contains(&name) => {
                text.extend([start, name, "_total ", rest]);
            }
            Some(_) => text.push_str(line),
            None if line.starts_with('#') => continue,
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_their_ending_in_the_comments_too() {
        let text = "# HELP a_b Help.\n# TYPE a_b counter\na_b_total{c=\"d e\"} 1\n# HELP g G.\n# TYPE g gauge\n# UNIT g s\ng 2\n# EOF\n";
        let expected = "# HELP a_b_total Help.\n# TYPE a_b_total counter\na_b_total{c=\"d e\"} 1\n# HELP g G.\n# TYPE g gauge\ng 2\n";
        assert_eq!(prometheus(text), expected);
    }
}
