//! A network configuration as container runtimes read it, with and without our entry.

use serde_json::{Map, Value};

use super::PLUGIN;

/// A configuration that a runtime accepts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chain {
    /// The list without `plugins`.
    head: Map<String, Value>,
    plugins: Vec<Map<String, Value>>,
}

impl Chain {
    /// Parses a file. The error is a runtime's objection.
    pub(super) fn parse(name: &str, bytes: &[u8]) -> Result<Self, String> {
        let document =
            serde_json::from_slice(bytes).map_err(|error| format!("is not a JSON object: {error}"))?;
        let chain = if is_list(name) { Self::of_list(document)? } else { Self::of_single(document) };
        if chain.head.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err("has no name".into());
        }
        if chain.plugins.iter().any(|plugin| kind(plugin).is_empty()) {
            return Err("has a plugin without a type".into());
        }
        if chain.plugins.iter().all(|plugin| kind(plugin) == PLUGIN) {
            return Err(format!("has no plugins but {PLUGIN}"));
        }
        Ok(chain)
    }

    fn of_list(mut head: Map<String, Value>) -> Result<Self, String> {
        let Some(Value::Array(plugins)) = head.remove("plugins") else { return Err("has no plugins".into()) };
        let object = |plugin| match plugin {
            Value::Object(plugin) => Ok(plugin),
            _ => Err("has a plugin that is no object".to_owned()),
        };
        Ok(Self { head, plugins: plugins.into_iter().map(object).collect::<Result<_, _>>()? })
    }

    /// The list with one plugin into which a runtime converts a single configuration.
    fn of_single(mut plugin: Map<String, Value>) -> Self {
        let keys = ["cniVersion", "cniVersions", "name"];
        let head = keys.iter().filter_map(|key| plugin.remove_entry(*key)).collect();
        Self { head, plugins: vec![plugin] }
    }

    /// Every version that a runtime may choose. libcni takes a missing one as 0.1.0.
    pub(super) fn versions(&self) -> Vec<&str> {
        let one = self.head.get("cniVersion").and_then(Value::as_str);
        let more = self.head.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
        let versions: Vec<_> = one.into_iter().chain(more.filter_map(Value::as_str)).collect();
        if versions.is_empty() { vec!["0.1.0"] } else { versions }
    }

    /// Whether it has a plugin of this type.
    pub(super) fn has(&self, wanted: &str) -> bool {
        self.plugins.iter().any(|plugin| kind(plugin) == wanted)
    }

    /// The same chain with our entry in the last place only.
    pub(super) fn with(&self, entry: &Map<String, Value>) -> Self {
        let mut chain = self.without();
        chain.plugins.push(entry.clone());
        chain
    }

    /// The same chain without our entry.
    pub(super) fn without(&self) -> Self {
        let plugins = self.plugins.iter().filter(|plugin| kind(plugin) != PLUGIN).cloned().collect();
        Self { head: self.head.clone(), plugins }
    }

    /// The contents of a `.conflist`.
    pub(super) fn document(&self) -> Value {
        let mut document = self.head.clone();
        document.insert("plugins".into(), self.plugins.iter().cloned().map(Value::Object).collect());
        Value::Object(document)
    }

    /// The same, pretty-printed.
    pub(super) fn text(&self) -> Vec<u8> {
        format!("{:#}\n", self.document()).into_bytes()
    }
}

/// Whether runtimes expect a list in a file with this name.
pub(super) fn is_list(name: &str) -> bool {
    name.ends_with(".conflist")
}

fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}
