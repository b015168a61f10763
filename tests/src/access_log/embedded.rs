//! The embedded proxy's access log: one file per node, one line of JSON per event.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{DnsEntry, Entry, Register, complete};

/// Its name.
pub(crate) const FILE: &str = "access.log";

pub(super) fn entries(dir: &Path, pods: &Register) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = lines(dir, |event| event != "dns")?;
    entries.iter_mut().for_each(|entry| name(&mut entry.pod, &mut entry.uid, pods));
    Ok(entries)
}

pub(super) fn questions(dir: &Path, pods: &Register) -> Result<Vec<DnsEntry>> {
    let mut questions: Vec<DnsEntry> = lines(dir, |event| event == "dns")?;
    questions.iter_mut().for_each(|question| name(&mut question.pod, &mut question.uid, pods));
    Ok(questions)
}

/// In placement `node` the proxy identifies a pod by the address that it saw.
fn name(pod: &mut String, uid: &mut String, pods: &Register) {
    let Ok(address) = pod.parse::<IpAddr>() else { return };
    if let Some(found) = pods.find(|_, addresses| addresses.contains(&address)) {
        *pod = found.to_string();
        *uid = found.uid;
    }
}

fn lines<T: DeserializeOwned>(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<T>> {
    let text = fs::read_to_string(dir.join(FILE)).unwrap_or_default();
    let mut found = Vec::new();
    for line in complete(&text) {
        let unreadable = || format!("access log: {line}");
        let value: Value = serde_json::from_str(line).with_context(unreadable)?;
        if wanted(value["event"].as_str().unwrap_or_default()) {
            found.push(serde_json::from_value(value).with_context(unreadable)?);
        }
    }
    Ok(found)
}
