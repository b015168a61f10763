//! `redirect monitor`.

use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::time::Duration;

use super::{Output, Query};
use redirect_protocol::wire::{FlowFilter, FlowReport, Reply, Request, client};

const PATIENCE: Duration = Duration::from_secs(10);

/// Which connections are shown.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    filter: FlowFilter,
    /// Exit after this many connections
    #[arg(short, long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    query: Query,
}

/// Prints connections as the kernel side decides on them.
pub(super) fn run(Options { filter, count, query }: &Options) -> anyhow::Result<()> {
    let request = Request::Monitor { filter: filter.clone() };
    let mut left = count.unwrap_or(u64::MAX);
    let mut failure = None;
    let mut begun = false;
    client::follow(&query.socket, &request, PATIENCE, |reply| {
        let Reply::Flows { flows, lost } = reply else {
            failure = Some(anyhow::anyhow!("the agent ends"));
            return ControlFlow::Break(());
        };
        if !std::mem::replace(&mut begun, true) {
            eprintln!("redirect: monitoring the connections of this node's pods");
        }
        match print(&flows, lost, query.output, &mut left) {
            Ok(()) if left > 0 => ControlFlow::Continue(()),
            Ok(()) => ControlFlow::Break(()),
            // The reader has closed the pipe.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ControlFlow::Break(()),
            Err(error) => {
                failure = Some(error.into());
                ControlFlow::Break(())
            }
        }
    })?;
    failure.map_or(Ok(()), Err)
}

fn print(flows: &[FlowReport], lost: u64, output: Output, left: &mut u64) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for flow in flows {
        if *left == 0 {
            break;
        }
        *left -= 1;
        match output {
            Output::Table => writeln!(out, "{}", line(flow))?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(flow)?)?,
        }
    }
    if lost > 0 {
        // On stderr, because programs expect only connections on stdout.
        eprintln!("redirect: {lost} events lost: they came faster than this terminal reads them");
    }
    out.flush()
}

/// The columns fit names of usual length.
fn line(flow: &FlowReport) -> String {
    let end = |end: Option<std::net::SocketAddr>| end.map_or_else(|| "-".into(), |end| end.to_string());
    let pod = flow.pod.as_ref().map_or_else(|| "-".into(), ToString::to_string);
    let cookie = flow.socket_cookie.map_or_else(|| "-".into(), |cookie| cookie.to_string());
    format!(
        "{:.3} {pod:<24} {:<4} {:<8} {:<7} {:<14} {} > {} socket {cookie}",
        flow.time,
        flow.family,
        flow.direction,
        flow.verdict,
        flow.reason,
        end(flow.source),
        end(flow.destination),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use redirect_protocol::pod::PodIdentity;

    #[test]
    fn connections_are_readable() {
        let flow = FlowReport {
            time: "2025-06-01T12:00:00.123456Z".parse().unwrap(),
            pod: Some(PodIdentity {
                namespace: "dual-stack".into(),
                name: "tcp-echo".into(),
                ..PodIdentity::default()
            }),
            family: "IPv6".into(),
            direction: "outbound".into(),
            source: Some("[fd00::2]:40000".parse().unwrap()),
            destination: Some("[2001:db8::1]:80".parse().unwrap()),
            verdict: "captured".into(),
            reason: "enrolled".into(),
            socket_cookie: Some(4711),
        };
        let inbound = FlowReport {
            pod: None,
            family: "IPv4".into(),
            direction: "inbound".into(),
            source: Some("192.0.2.7:1024".parse().unwrap()),
            destination: Some("10.0.0.2:8080".parse().unwrap()),
            verdict: "dropped".into(),
            reason: "no_listener".into(),
            socket_cookie: None,
            ..flow.clone()
        };
        let passed =
            FlowReport { source: None, verdict: "passed".into(), reason: "excluded".into(), ..flow.clone() };
        let lines: Vec<String> = [flow, inbound, passed].iter().map(line).collect();
        insta::assert_snapshot!("monitor", lines.join("\n"));
    }
}
