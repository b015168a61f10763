//! Metrics and probes report what happened.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::{dial, io_kind};
use redirect_tests::{Families, Node, NodeOptions, Stack, wait};

use crate::context::{Context, for_every_stack, skip, trial};
use crate::outbound;

const PORT: u16 = 15091;

/// The kubelet's port: on the node's IPv4 loopback address only.
const HEALTH_PORT: u16 = 15092;

/// The kubelet's default timeout.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = vec![
        trial(context, "metrics::are_what_prometheus_expects", lint),
        trial(context, "metrics::an_agent_without_a_proxy_is_healthy_but_not_ready", readiness),
        trial(context, "metrics::enrollments_are_measured", enrollments),
    ];
    trials.extend(for_every_stack(context, "metrics::connections_are_counted", connections));
    trials.extend(for_every_stack(context, "metrics::idle_clients_keep_nobody_waiting", idle_clients));
    trials
}

/// Status and body of a response, the same over IPv4 and IPv6.
pub(crate) fn get(node: &Node, path: &str) -> Result<(String, String)> {
    let connect = |address: IpAddr| move || Ok(TcpStream::connect(SocketAddr::new(address, PORT)).ok());
    let over = |address: IpAddr| {
        node.netns()
            .run(move || ask(wait::until("server of metrics", wait::SOON, connect(address))?, path))?
    };
    let (status, _) = over(Ipv6Addr::LOCALHOST.into())?;
    let (again, body) = over(Ipv4Addr::LOCALHOST.into())?;
    ensure!(status == again, "{path}: {status} over IPv6, {again} over IPv4");
    Ok((status, body))
}

fn ask(mut stream: TcpStream, path: &str) -> Result<(String, String)> {
    stream.set_read_timeout(Some(wait::SOON))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    Ok((head.split(' ').nth(1).unwrap_or_default().to_owned(), body.to_owned()))
}

pub(crate) fn scrape(node: &Node) -> Result<String> {
    let (status, body) = get(node, "/metrics")?;
    ensure!(status == "200", "{status}: {body}");
    Ok(body)
}

/// The value of a series; a missing one is zero.
pub(crate) fn value(text: &str, series: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.map_or(Ok(0.0), |value| Ok(value.parse()?))
}

fn lint(context: &Context) -> Result<()> {
    let node = context.node()?;
    let _pod = node.enrolled("pod", Families::Dual)?;
    let text = scrape(&node)?;
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    let output = match node.netns().execute(promtool, text.as_bytes()) {
        Err(error) if io_kind(&error) == Some(ErrorKind::NotFound) => {
            return Err(skip("needs promtool (package prometheus)"));
        }
        output => output?,
    };
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && complaints.is_empty(), "{complaints}\n{text}");
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/chart/monitoring/alerts.yaml");
    let output = Command::new("promtool").args(["check", "rules", rules]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn readiness(context: &Context) -> Result<()> {
    let options = NodeOptions { proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let (status, body) = get(&node, "/healthz")?;
    ensure!(status == "200" && body.contains("[+] datapath"), "{status}: {body}");
    let examined = || Ok(get(&node, "/readyz")?.1.contains("[+] chain"));
    wait::until_true("first examination of the chain", wait::SOON, examined)?;
    let (status, body) = get(&node, "/readyz")?;
    ensure!(status == "503" && body.contains("[-] proxy: no node proxy is connected"), "{status}: {body}");
    let (status, body) = get(&node, "/readyz?exclude=proxy")?;
    ensure!(status == "200" && body.contains("[ ] proxy, excluded: no node proxy"), "{status}: {body}");
    ensure!(get(&node, "/elsewhere")?.0 == "404");
    node.start_proxy()?;
    wait::until_true("ready agent", wait::SOON, || Ok(get(&node, "/readyz")?.0 == "200"))?;
    ensure!(value(&scrape(&node)?, "redirect_proxies_connected")? == 1.0);
    node.kill_proxy()?;
    wait::until_true("agent that is not ready", wait::SOON, || Ok(get(&node, "/readyz")?.0 == "503"))?;
    ensure!(get(&node, "/healthz")?.0 == "200");
    Ok(())
}

/// Any client that reaches the node can connect to the metrics and send nothing. That delays neither the kubelet nor
/// Prometheus.
fn idle_clients(context: &Context, stack: Stack) -> Result<()> {
    const IDLE: usize = 200;
    let node = Node::start(&context.session()?)?;
    let pod = node.plain("pod", Families::Dual)?;
    let to = SocketAddr::new(node.gateway(stack.family()), PORT);
    ensure!(get(&node, "/healthz")?.0 == "200");
    let idle: Vec<_> = (0..IDLE)
        .map(|_| pod.netns().run(|| dial(stack, to, wait::SOON))?.context("idle client"))
        .collect::<Result<_>>()?;
    let loopback = |port| {
        node.netns().run(move || -> Result<_> {
            let started = Instant::now();
            let path = if port == PORT { "/metrics" } else { "/healthz" };
            let (status, body) = ask(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?, path)?;
            ensure!(status == "200", "{path}: {status}: {body}");
            Ok(started.elapsed())
        })?
    };
    for port in [HEALTH_PORT, PORT] {
        let took = loopback(port)?;
        ensure!(took < wait::patient(PROBE_TIMEOUT), "port {port} answered after {took:?}");
    }
    // Silent clients are disconnected after a timeout.
    for mut stream in idle {
        let end = stream.read(&mut [0]);
        ensure!(
            matches!(&end, Ok(0))
                || end.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "an idle client is still connected: {end:?}"
        );
    }
    // An endless request is cut off.
    let mut stream = pod.netns().run(|| dial(stack, to, wait::SOON))?.context("client")?;
    let endless =
        std::iter::repeat_n(b"X-Header: value\r\n", 1 << 16).try_for_each(|line| stream.write_all(line));
    let cut = endless.and_then(|()| stream.read_to_string(&mut String::new()));
    ensure!(cut.is_err() || cut.is_ok_and(|length| length < 1024), "1 MiB of headers is taken");
    // The network reaches metrics only.
    let to = SocketAddr::new(node.gateway(stack.family()), HEALTH_PORT);
    let refused = pod.netns().run(|| dial(stack, to, wait::SOON))?;
    ensure!(refused.is_err(), "the port of the probes answers to pods");
    Ok(())
}

fn enrollments(context: &Context) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let _pods = [node.enrolled("one", Families::Dual)?, node.enrolled("two", Families::V6Only)?];
    let text = scrape(&node)?;
    for (series, expected) in [
        (r#"redirect_enrollment_duration_seconds_count{phase="kernel"}"#, 2.0),
        (r#"redirect_enrollment_duration_seconds_count{phase="proxy"}"#, 2.0),
        (r#"redirect_cni_requests_total{command="add",result="ok"}"#, 2.0),
        (r#"redirect_pods_enrolled{ip_family="IPv4"}"#, 1.0),
        (r#"redirect_pods_enrolled{ip_family="IPv6"}"#, 2.0),
        ("redirect_pods_unacknowledged", 0.0),
        ("redirect_zds_connections_total", 1.0),
        // The end of the snapshot, and two pods.
        (r#"redirect_zds_answers_total{answer="ack"}"#, 3.0),
    ] {
        let found = value(&text, series)?;
        ensure!(found == expected, "{series} is {found} instead of {expected}:\n{text}");
    }
    Ok(())
}

fn connections(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let series = format!(
        r#"redirect_connections_total{{ip_family="{}",direction="outbound",verdict="captured",reason="enrolled"}}"#,
        stack.family().name()
    );
    let before = value(&scrape(&node)?, &series)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    // A scrape may be as old as the agent's cache allows.
    let counted = || Ok(value(&scrape(&node)?, &series)? == before + 1.0);
    wait::until_true(&format!("{series} of {}", before + 1.0), wait::SOON, counted)
}
