//! The proxy's access log: who got the connections.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use redirect_ebpf::Family;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::wait;

/// Which listener of the proxy a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod.
    Inbound,
}

/// What an entry tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// The proxy took a connection.
    Open,
    /// It ended.
    Close,
}

/// A line of the access log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Entry {
    /// What happened.
    pub event: Event,
    /// `namespace/name` of the pod whose connection it is.
    pub pod: String,
    /// The pod's UID.
    #[serde(default)]
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

/// A line about a DNS question.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DnsEntry {
    /// `namespace/name` of the pod whose question it is.
    pub pod: String,
    /// The pod's UID.
    pub uid: String,
    /// `IPv4` or `IPv6`, of the resolver's address.
    pub family: String,
    /// `udp` or `tcp`.
    pub transport: String,
    /// Who asked.
    pub source: SocketAddr,
    /// The name; none if the question was not understood.
    #[serde(default)]
    pub name: Option<String>,
    /// The type.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// The server that answered.
    #[serde(default)]
    pub upstream: Option<SocketAddr>,
    /// What it answered.
    pub rcode: String,
}

/// An access log that is being written.
#[derive(Clone, Debug)]
pub struct AccessLog {
    path: PathBuf,
}

impl AccessLog {
    /// A log in this file, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every entry about a connection so far.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        self.lines(|event| event != "dns")
    }

    /// Every entry about a DNS question so far.
    pub fn questions(&self) -> Result<Vec<DnsEntry>> {
        self.lines(|event| event == "dns")
    }

    fn lines<T: DeserializeOwned>(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<T>> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        // The last line may be half written.
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let mut found = Vec::new();
        for line in complete.lines() {
            let unreadable = || format!("access log: {line}");
            let value: Value = serde_json::from_str(line).with_context(unreadable)?;
            if wanted(value["event"].as_str().unwrap_or_default()) {
                found.push(serde_json::from_value(value).with_context(unreadable)?);
            }
        }
        Ok(found)
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
