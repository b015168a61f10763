//! Answers `redirect pods`, `redirect pod` and `redirect explain` from the kernel's state.

use std::net::SocketAddr;

use redirect_ebpf::Family;
use redirect_ebpf::decide::{Outbound, Protocol};

use super::pods::Pods;
use redirect_datapath::datapath::Finding;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_datapath::listeners::{self, Listener};
use redirect_protocol::placement::Placement;
use redirect_protocol::wire::{
    Error, ErrorKind, Expectation, Explanation, FactState, PodDetail, PodReport, Transport,
};

/// The connection to explain.
pub(super) struct Question {
    pub(super) from: String,
    pub(super) to: SocketAddr,
    pub(super) transport: Transport,
}

/// The kernel does not show this fault, and a proxy only logs it.
const NO_ACCOUNT: &str = "the node proxy was told of the pod without a service account; a ztunnel whose workload has \
     one resets the connection after 5 s (--service-account)";

/// Reports on all pods.
pub(super) async fn pods(
    pods: &Pods<Linux>,
    kernel: &DatapathHandle<Linux>,
) -> Result<Vec<PodReport>, Error> {
    let mut reports = pods.report().await;
    count(kernel, &mut reports).await?;
    Ok(reports)
}

/// Adds the kernel side's counters.
async fn count(kernel: &DatapathHandle<Linux>, reports: &mut [PodReport]) -> Result<(), Error> {
    let cookies: Vec<u64> = reports.iter().map(|report| report.netns_cookie).collect();
    let counted = kernel.run(move |linux| {
        cookies.into_iter().map(|cookie| linux.counters_of(cookie)).collect::<anyhow::Result<Vec<_>>>()
    });
    let counted = read(counted.await)?;
    reports.iter_mut().zip(counted).for_each(|(report, counters)| report.counters = counters);
    Ok(())
}

/// Unwraps a read from the kernel.
pub(super) fn read<T, E: std::fmt::Display>(outcome: Result<anyhow::Result<T>, E>) -> Result<T, Error> {
    outcome.map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?.map_err(|error| {
        Error::new(ErrorKind::Datapath, format!("cannot read the kernel's state: {error:#}"))
    })
}

/// A detailed report on the pod.
pub(super) async fn pod(
    pods: &Pods<Linux>,
    kernel: &DatapathHandle<Linux>,
    placement: Placement,
    name: &str,
) -> Result<PodDetail, Error> {
    let Examined { mut report, findings, listeners } = examine(pods, placement, name).await?;
    count(kernel, std::slice::from_mut(&mut report)).await?;
    let facts =
        findings.iter().map(|Finding { fact, state }| Expectation { what: fact.to_string(), state: *state });
    let listeners =
        listeners.iter().map(|(listener, state)| Expectation { what: listener.to_string(), state: *state });
    Ok(PodDetail { expectations: facts.chain(listeners).collect(), report })
}

/// The observed state of a pod.
struct Examined {
    report: PodReport,
    findings: Vec<Finding>,
    listeners: Vec<(Listener, FactState)>,
}

async fn examine(pods: &Pods<Linux>, placement: Placement, name: &str) -> Result<Examined, Error> {
    let mut found = pods.called(name).await;
    let report = match (found.pop(), found.is_empty()) {
        (Some(report), true) => report,
        (Some(report), false) => {
            found.push(report);
            let names: Vec<_> = found.iter().map(|report| report.pod.to_string()).collect();
            let message =
                format!("{name} is ambiguous ({}): use NAMESPACE/NAME or the UID", names.join(", "));
            return Err(Error::new(ErrorKind::Unknown, message));
        }
        (None, _) => {
            let message = format!(
                "pod {name} is not enrolled on this node, so its connections are left alone. Check that it \
                 runs on this node and that it or its namespace has the label \
                 istio.io/dataplane-mode=ambient, and look at its events"
            );
            return Err(Error::new(ErrorKind::Unknown, message));
        }
    };
    let (target, findings) = pods.inspect(&report.pod.uid).await?;
    let unread = |error: &dyn std::fmt::Display| {
        let message = format!("pod {}: cannot observe the node proxy's listeners: {error}", report.pod);
        Error::new(ErrorKind::Internal, message)
    };
    let looked = tokio::task::spawn_blocking(move || listeners::look(&target, placement)).await;
    let listeners = looked.map_err(|error| unread(&error))?.map_err(|error| unread(&error))?;
    Ok(Examined { report, findings, listeners })
}

/// The decision on a connection of the pod, and the first fault on its way.
pub(super) async fn explain(
    pods: &Pods<Linux>,
    kernel: &DatapathHandle<Linux>,
    placement: Placement,
    Question { from, to, transport }: Question,
) -> Result<Explanation, Error> {
    let Examined { report, findings, listeners } = examine(pods, placement, &from).await?;
    let protocol = match transport {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    };
    let cookie = report.netns_cookie;
    let decision = read(kernel.run(move |linux| linux.decide(cookie, to, protocol)).await)?;
    let family = if to.ip().to_canonical().is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    let mut wrong: Vec<String> = findings
        .iter()
        .filter(|finding| finding.fact.family().is_none_or(|of| of == family))
        .filter_map(Finding::complaint)
        .collect();
    let moved = |device: &String| {
        format!(
            "device {device} of the host: its other end was moved out of the pod, and what comes from there is dropped"
        )
    };
    wrong.extend(report.strayed.iter().map(moved));
    let outbound = decision.as_ref().map(|decision| decision.outbound);
    let captured = matches!(outbound, Some(Outbound::Capture | Outbound::Resolve));
    if captured && !report.captured.iter().any(|name| name == family.name()) {
        wrong.push(format!("the pod has no {family} address and cannot connect"));
    }
    match &report.proxy {
        Err(why) if captured => wrong.push(why.clone()),
        Ok(()) if captured => {
            let silent = listeners.iter().filter(|(listener, state)| {
                listener.family == family
                    && outbound.is_some_and(|decision| listener.serves(decision, transport))
                    && *state == FactState::Missing
            });
            wrong.extend(silent.map(|(listener, _)| format!("{listener} is missing")));
        }
        _ => {}
    }
    let verdict = match outbound {
        None => "not captured: the kernel side does not know the pod".into(),
        Some(Outbound::Capture) => "captured: goes to the node proxy".into(),
        Some(Outbound::Resolve) => "captured: goes to the node proxy's resolver".into(),
        Some(Outbound::Deliver) => "left alone: the proxy's own connection to the application".into(),
        Some(Outbound::Refuse(reason)) => format!("refused ({})", reason.label()),
        Some(Outbound::Pass(reason)) => format!("left alone ({})", reason.label()),
    };
    let unnamed =
        captured && wrong.is_empty() && placement == Placement::Pod && report.pod.service_account.is_empty();
    Ok(Explanation {
        notes: unnamed.then(|| NO_ACCOUNT.to_owned()).into_iter().collect(),
        pod: report.pod,
        to,
        transport,
        family: family.name().into(),
        steps: decision.map(|decision| decision.steps).unwrap_or_default(),
        captured,
        verdict,
        wrong,
    })
}
