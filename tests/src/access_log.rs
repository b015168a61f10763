//! The proxy's access log.

mod embedded;
mod ztunnel;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use redirect_ebpf::Family;
use redirect_protocol::pod::PodIdentity;
use serde::Deserialize;

use crate::proxy::ProxyKind;
use crate::wait;

pub(crate) use embedded::FILE as EMBEDDED;

/// The proxy's listener that a connection arrived at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod.
    Inbound,
}

/// The event of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// The proxy took a connection.
    Open,
    /// It ended.
    Close,
}

/// A line about a connection.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// What happened.
    pub event: Event,
    /// `namespace/name` of the connection's pod.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
    /// Which way.
    pub direction: Direction,
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// The client.
    pub source: SocketAddr,
    /// What the client dialled.
    pub original_destination: SocketAddr,
    /// The proxy's own end of its connection to the destination.
    #[serde(default)]
    pub upstream_local: Option<SocketAddr>,
    /// From the client.
    #[serde(default)]
    pub bytes_sent: Option<u64>,
    /// To the client.
    #[serde(default)]
    pub bytes_received: Option<u64>,
    /// How it ended.
    #[serde(default)]
    pub result: Option<String>,
    /// Whether it went through the mesh's tunnel, with mutual TLS.
    #[serde(default)]
    pub tunnelled: bool,
}

impl Entry {
    /// Whether the entry is of this family, in its name and in its addresses.
    #[must_use]
    pub fn is_of(&self, family: Family) -> bool {
        let v4 = family == Family::Ipv4;
        self.family == family.name()
            && self.source.is_ipv4() == v4
            && self.original_destination.is_ipv4() == v4
    }
}

/// A line about a DNS query. Optional fields are not in every proxy's log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DnsEntry {
    /// `namespace/name` of the pod that sent the query.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
    /// `IPv4` or `IPv6`, of the resolver's address.
    #[serde(default)]
    pub family: Option<String>,
    /// `udp` or `tcp`.
    #[serde(default)]
    pub transport: Option<String>,
    /// Who asked.
    #[serde(default)]
    pub source: Option<SocketAddr>,
    /// The name; `None` if the query could not be parsed.
    #[serde(default)]
    pub name: Option<String>,
    /// The type.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// The server that answered.
    #[serde(default)]
    pub upstream: Option<SocketAddr>,
    /// What it answered.
    #[serde(default)]
    pub rcode: Option<String>,
}

/// The access log of a node's running proxies.
#[derive(Clone, Debug)]
pub struct AccessLog {
    kind: ProxyKind,
    dir: PathBuf,
    pods: Arc<Register>,
}

impl AccessLog {
    pub(crate) fn new(kind: ProxyKind, dir: PathBuf, pods: Arc<Register>) -> Self {
        Self { kind, dir, pods }
    }

    /// The files, as a shell pattern.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        match self.kind {
            ProxyKind::Embedded => self.dir.join(EMBEDDED),
            ProxyKind::Ztunnel => self.dir.join("proxy-*.log"),
        }
    }

    /// Every entry about a connection so far.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        match self.kind {
            ProxyKind::Embedded => embedded::entries(&self.dir, &self.pods),
            ProxyKind::Ztunnel => ztunnel::entries(&self.dir, &self.pods),
        }
    }

    /// Every entry about a DNS question so far.
    pub fn questions(&self) -> Result<Vec<DnsEntry>> {
        match self.kind {
            ProxyKind::Embedded => embedded::questions(&self.dir, &self.pods),
            ProxyKind::Ztunnel => ztunnel::questions(&self.dir, &self.pods),
        }
    }

    /// The connections that match, one entry each, once there is at least one.
    pub fn connections(&self, what: &str, matches: impl Fn(&Entry) -> bool) -> Result<Vec<Entry>> {
        let found = wait::until(&format!("access log entry of {what}"), Duration::from_secs(3), || {
            let found = self.connections_so_far(&matches)?;
            Ok((!found.is_empty()).then_some(found))
        });
        found.with_context(|| format!("the last entries: {:#?}", self.entries().map(last)))
    }

    /// As [`AccessLog::connections`] without waiting.
    pub fn connections_so_far(&self, matches: impl Fn(&Entry) -> bool) -> Result<Vec<Entry>> {
        let opened = |entry: &Entry| entry.event == Event::Open && matches(entry);
        Ok(self.entries()?.into_iter().filter(opened).collect())
    }
}

fn last(entries: Vec<Entry>) -> Vec<Entry> {
    let surplus = entries.len().saturating_sub(5);
    entries.into_iter().skip(surplus).collect()
}

/// The pods of a node, for logs with less information about a pod than an [`Entry`].
#[derive(Debug, Default)]
pub(crate) struct Register {
    pods: Mutex<Vec<(PodIdentity, Vec<IpAddr>)>>,
}

impl Register {
    pub(crate) fn enter(&self, pod: &PodIdentity, addresses: &[IpAddr]) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push((pod.clone(), addresses.to_vec()));
    }

    /// The newest pod that matches.
    fn find(&self, is_so: impl Fn(&PodIdentity, &[IpAddr]) -> bool) -> Option<PodIdentity> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.iter().rev().find(|(pod, addresses)| is_so(pod, addresses)).map(|(pod, _)| pod.clone())
    }
}

/// The complete lines of a log: the last one may be half written.
fn complete(text: &str) -> impl Iterator<Item = &str> {
    text.rsplit_once('\n').map_or("", |(complete, _)| complete).lines()
}
