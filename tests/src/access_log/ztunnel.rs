//! The output of ztunnels as JSON; each process has a file. Lines of the scopes `access` and `dns` are the access
//! log.
//!
//! A ztunnel identifies a pod by its workload. A connection that it denies before it knows the workload is
//! identified by its addresses only.

use std::net::SocketAddr;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, Result};
use redirect_ebpf::Family;
use redirect_protocol::pod::PodIdentity;
use serde_json::Value;

use super::{Direction, DnsEntry, Entry, Event, Register, complete};
use crate::stack::canonical;

pub(super) fn entries(dir: &Path, pods: &Register) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for line in lines(dir, "access")? {
        entries.extend(of_line(&line, pods).with_context(|| format!("access log: {line}"))?);
    }
    Ok(entries)
}

pub(super) fn questions(dir: &Path, pods: &Register) -> Result<Vec<DnsEntry>> {
    let questions = lines(dir, "dns")?.into_iter().map(|line| {
        let pod = named(&line, "src", pods);
        DnsEntry {
            pod: pod.to_string(),
            uid: pod.uid,
            family: None,
            transport: None,
            source: None,
            name: text(&line, "domain").map(str::to_owned),
            kind: text(&line, "query").map(str::to_owned),
            upstream: None,
            rcode: None,
        }
    });
    Ok(questions.collect())
}

/// Of all proxies of the node, the oldest first.
fn lines(dir: &Path, scope: &str) -> Result<Vec<Value>> {
    let mut files: Vec<_> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("proxy-")))
        .collect();
    files.sort();
    let mut found = Vec::new();
    let wanted = format!("\"scope\":\"{scope}\"");
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        for line in complete(&text).filter(|line| line.contains(&wanted)) {
            found.push(serde_json::from_str(line).with_context(|| format!("access log: {line}"))?);
        }
    }
    Ok(found)
}

fn of_line(line: &Value, pods: &Register) -> Result<Vec<Entry>> {
    let events: &[Event] = match text(line, "message").unwrap_or_default() {
        "connection opened" => &[Event::Open],
        "connection complete" => &[Event::Close],
        // Denied at once.
        "connection failed" => &[Event::Open, Event::Close],
        _ => &[],
    };
    let (direction, side) = match text(line, "direction") {
        Some("outbound") => (Direction::Outbound, "src"),
        _ => (Direction::Inbound, "dst"),
    };
    let source = canonical(address(line, "src.addr")?);
    // Identities are logged for mutual TLS only.
    let mutual_tls = ["src.identity", "dst.identity"].iter().all(|key| text(line, key).is_some());
    let hbone = text(line, "dst.hbone_addr").is_some();
    let destination = if hbone { "dst.hbone_addr" } else { "dst.addr" };
    let original_destination = canonical(address(line, destination)?);
    let pod = match text(line, &format!("{side}.workload")) {
        Some(_) => named(line, side, pods),
        None => {
            let own = if side == "src" { source } else { original_destination };
            pods.find(|_, addresses| addresses.contains(&own.ip())).unwrap_or_default()
        }
    };
    let entry = Entry {
        event: Event::Open,
        pod: pod.to_string(),
        uid: pod.uid,
        direction,
        family: if source.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }.name().to_owned(),
        source,
        original_destination,
        upstream_local: None,
        bytes_sent: number(line, "bytes_sent"),
        bytes_received: number(line, "bytes_recv"),
        result: text(line, "error").map(str::to_owned),
        tunnelled: hbone && mutual_tls,
    };
    Ok(events.iter().map(|&event| Entry { event, ..entry.clone() }).collect())
}

/// The pod of a workload, with its UID if there is such a pod.
fn named(line: &Value, side: &str, pods: &Register) -> PodIdentity {
    let part = |what: &str| text(line, &format!("{side}.{what}")).unwrap_or_default().to_owned();
    let (namespace, name) = (part("namespace"), part("workload"));
    let known = pods.find(|pod, _| pod.namespace == namespace && pod.name == name);
    known.unwrap_or_else(|| PodIdentity { namespace, name, ..PodIdentity::default() })
}

fn address(line: &Value, key: &str) -> Result<SocketAddr> {
    let text = text(line, key).with_context(|| format!("no {key}"))?;
    text.parse().with_context(|| format!("{key} is {text}"))
}

fn number(line: &Value, key: &str) -> Option<u64> {
    line[key].as_u64().or_else(|| text(line, key)?.parse().ok())
}

fn text<'a>(line: &'a Value, key: &str) -> Option<&'a str> {
    line[key].as_str()
}
