//! The embedded proxy's access log: one file per node, one line of JSON per event.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{DnsEntry, Entry, complete};

/// Its name.
pub(crate) const FILE: &str = "access.log";

pub(super) fn entries(dir: &Path) -> Result<Vec<Entry>> {
    lines(dir, |event| event != "dns")
}

pub(super) fn questions(dir: &Path) -> Result<Vec<DnsEntry>> {
    lines(dir, |event| event == "dns")
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
