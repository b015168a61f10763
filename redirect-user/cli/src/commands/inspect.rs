//! `redirect pod` and `redirect explain`.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use super::show::{json, pods_table, table};
use super::{Output, Query};
use redirect_protocol::wire::{
    Explanation, FactState, PodCounter, PodDetail, Reply, Request, Transport, client,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Which pod.
#[derive(Debug, clap::Args)]
pub(super) struct PodQuery {
    /// NAMESPACE/NAME, name or UID of an enrolled pod
    name: String,
    #[command(flatten)]
    query: Query,
}

/// Which connection.
#[derive(Debug, clap::Args)]
pub(super) struct ExplainQuery {
    /// Pod that connects: NAMESPACE/NAME, name or UID
    #[arg(long, value_name = "POD")]
    from: String,
    /// Destination, such as 192.0.2.1:80 or [2001:db8::1]:80
    #[arg(long, value_name = "ADDRESS:PORT")]
    to: SocketAddr,
    /// Protocol of the connection
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    #[command(flatten)]
    query: Query,
}

/// Exits with 1 if anything is wrong with the pod.
pub(super) fn pod(PodQuery { name, query }: &PodQuery) -> anyhow::Result<ExitCode> {
    let detail = match ask(query, &Request::Pod { name: name.clone() })? {
        Reply::Pod(detail) => detail,
        other => anyhow::bail!("unexpected answer from the agent: {other:?}"),
    };
    match query.output {
        Output::Json => json(&detail)?,
        Output::Table => print!("{}", pod_text(&detail)),
    }
    let good = detail.report.proxy.is_ok()
        && detail.report.strayed.is_empty()
        && detail
            .expectations
            .iter()
            .all(|expectation| matches!(expectation.state, FactState::Present | FactState::Unused));
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Exits with 1 if there is a fault on the connection's way.
pub(super) fn explain(asked: &ExplainQuery) -> anyhow::Result<ExitCode> {
    let ExplainQuery { from, to, transport, query } = asked;
    let request = Request::Explain { from: from.clone(), to: *to, transport: *transport };
    let explanation = match ask(query, &request)? {
        Reply::Explained(explanation) => explanation,
        other => anyhow::bail!("unexpected answer from the agent: {other:?}"),
    };
    match query.output {
        Output::Json => json(&explanation)?,
        Output::Table => print!("{}", explanation_text(&explanation)),
    }
    Ok(if explanation.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ask(query: &Query, request: &Request) -> anyhow::Result<Reply> {
    let reply = client::call(&query.socket, request, None, PATIENCE)?.pop();
    reply.ok_or_else(|| anyhow::anyhow!("the agent at {} did not answer", query.socket.display()))
}

fn pod_text(detail: &PodDetail) -> String {
    let mut expectations = table(&["", "in the kernel"]);
    for expectation in &detail.expectations {
        let (sign, remark) = match expectation.state {
            FactState::Present => ("✓", ""),
            FactState::Missing => ("✗", ": missing"),
            FactState::Damaged => ("✗", ": damaged"),
            FactState::Surplus => ("✗", ": should not be there"),
            FactState::Unused => ("-", ": it has none"),
        };
        expectations.add_row([sign.to_owned(), format!("{}{remark}", expectation.what)]);
    }
    for device in &detail.report.strayed {
        let gone = format!("device {device} of the host: its other end was moved out of the pod");
        expectations.add_row(["✗".to_owned(), gone]);
    }
    for interface in &detail.report.unguarded {
        let unguarded = format!("no gate on the host for {interface}, which has no veth end there");
        expectations.add_row(["!".to_owned(), unguarded]);
    }
    let (sign, proxy) = match &detail.report.proxy {
        Ok(()) => ("✓", "the node proxy has acknowledged the pod".to_owned()),
        Err(why) => ("✗", why.clone()),
    };
    expectations.add_row([sign.to_owned(), proxy]);
    let pods = pods_table(std::slice::from_ref(&detail.report));
    let mut counters = table(&["family", "direction", "verdict", "connections"]);
    for PodCounter { family, direction, verdict, connections } in &detail.report.counters {
        counters.add_row([family.clone(), direction.clone(), verdict.clone(), connections.to_string()]);
    }
    let counters = match detail.report.counters.is_empty() {
        true => "no connections so far".into(),
        false => counters.to_string(),
    };
    format!("{pods}\n\n{expectations}\n\n{counters}\n")
}

fn explanation_text(explanation: &Explanation) -> String {
    let Explanation { pod, to, transport, family, steps, verdict, wrong, notes, .. } = explanation;
    let transport = match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
    };
    let mut text = format!("{pod} → {to}, {transport} in {family}\n\n");
    for step in steps {
        text += &format!("  {} {}\n", if step.answer { "yes" } else { "no " }, step.question);
    }
    text += &format!("\n⇒ {verdict}\n");
    match wrong.split_first() {
        None => text += "no fault found on its way\n",
        Some((first, others)) => {
            text += &format!("fault: {first}\n");
            others.iter().for_each(|other| text += &format!("also:  {other}\n"));
        }
    }
    notes.iter().for_each(|note| text += &format!("note:  {note}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use redirect_protocol::pod::PodIdentity;
    use redirect_protocol::wire::{Expectation, PodReport, PodState, Step};

    fn identity() -> PodIdentity {
        PodIdentity { name: "tcp-echo".into(), namespace: "dual-stack".into(), ..PodIdentity::default() }
    }

    #[test]
    fn what_is_expected_has_a_check_mark() {
        let expectation = |what: &str, state| Expectation { what: what.into(), state };
        let counter = |family: &str, connections| PodCounter {
            family: family.into(),
            direction: "outbound".into(),
            verdict: "captured".into(),
            connections,
        };
        let detail = PodDetail {
            report: PodReport {
                pod: identity(),
                attachments: Vec::new(),
                addresses: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
                netns_cookie: 1,
                captured: vec!["IPv4".into(), "IPv6".into()],
                interfaces: vec!["eth0".into(), "net1".into()],
                strayed: vec!["veth7".into()],
                unguarded: vec!["net1".into()],
                state: PodState::Captured,
                proxy: Ok(()),
                since: 7,
                counters: vec![counter("IPv4", 12), counter("IPv6", 3)],
            },
            expectations: vec![
                expectation("interface lo up", FactState::Present),
                expectation("IPv6 rule for captured connections", FactState::Missing),
                expectation("program noted_listener on the network namespace", FactState::Damaged),
                expectation("exclusion of outbound port 80", FactState::Surplus),
                expectation("listener of the node proxy, TCP port 15001, IPv6", FactState::Missing),
                expectation("listener of the node proxy, TCP port 15008, IPv6", FactState::Unused),
            ],
        };
        insta::assert_snapshot!("pod", pod_text(&detail));
    }

    #[test]
    fn the_first_fault_comes_first() {
        let explanation = Explanation {
            pod: identity(),
            to: "[2001:db8::1]:80".parse().unwrap(),
            transport: Transport::Tcp,
            family: "IPv6".into(),
            steps: vec![
                Step { question: "the pod is in the kernel's map of pods".into(), answer: true },
                Step { question: "the destination is 127.0.0.1 or ::1".into(), answer: false },
            ],
            captured: true,
            verdict: "captured: goes to the node proxy".into(),
            wrong: vec![
                "IPv6 rule for captured connections is missing".into(),
                "no node proxy is connected".into(),
            ],
            notes: vec!["there is something to know".into()],
        };
        insta::assert_snapshot!("explanation", explanation_text(&explanation));
    }
}
