//! A CNI chain, executed plugin by plugin as a container runtime does.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fmt, fs};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::faults::{Faults, Program};
use crate::netns::Netns;

/// The CNI specification's version of the chain.
pub const VERSION: &str = "1.0.0";

/// Our plugin's type.
pub const REDIRECT: &str = "redirect-cni";

/// The command for a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `ADD`.
    Add,
    /// `CHECK`.
    Check,
    /// `DEL`.
    Del,
    /// `GC`.
    Gc,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
        })
    }
}

/// A plugin's error.
#[derive(Clone, Debug, Deserialize)]
pub struct PluginError {
    /// The code, see the specification.
    pub code: u32,
    /// What happened.
    pub msg: String,
    /// More about it.
    #[serde(default)]
    pub details: String,
    /// The plugin and its command.
    #[serde(skip)]
    pub step: String,
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: code {}: {}: {}", self.step, self.code, self.msg, self.details)
    }
}

impl std::error::Error for PluginError {}

/// The environment that the runtime passes to every plugin of a chain.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`; `None` if the namespace is gone.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_ARGS`.
    pub arguments: String,
}

/// A network configuration list.
#[derive(Clone, Debug)]
pub struct Chain {
    name: String,
    plugins: Vec<Value>,
    search: Vec<PathBuf>,
    faults: Option<Faults>,
}

impl Chain {
    /// A chain of these plugins, whose binaries are in the directories `search`.
    #[must_use]
    pub fn new(name: &str, plugins: Vec<Value>, search: Vec<PathBuf>) -> Self {
        Self { name: name.to_owned(), plugins, search, faults: None }
    }

    /// The chain that a runtime reads from a configuration directory: that of the first file in lexical
    /// order.
    pub fn of_directory(directory: &Path, search: Vec<PathBuf>) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct List {
            cni_version: String,
            name: String,
            plugins: Vec<Value>,
        }
        let mut files: Vec<PathBuf> =
            fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        files.retain(|path| path.extension().is_some_and(|extension| extension == "conflist"));
        files.sort();
        let file = files.first().with_context(|| format!("no chain in {}", directory.display()))?;
        let List { cni_version, name, plugins } =
            serde_json::from_slice(&fs::read(file)?).with_context(|| file.display().to_string())?;
        ensure!(cni_version == VERSION, "{} has cniVersion {cni_version}", file.display());
        Ok(Self { name, plugins, search, faults: None })
    }

    /// As it stands in a `.conflist`.
    #[must_use]
    pub fn list(&self) -> Value {
        json!({"cniVersion": VERSION, "name": self.name, "plugins": self.plugins})
    }

    /// The types of its plugins.
    #[must_use]
    pub fn types(&self) -> Vec<&str> {
        self.plugins.iter().filter_map(|plugin| plugin["type"].as_str()).collect()
    }

    /// The same chain, with binaries of this directory in the first place.
    #[must_use]
    pub fn searching_first(mut self, directory: &Path) -> Self {
        self.search.insert(0, directory.to_owned());
        self
    }

    /// The same chain, with faults in our plugin.
    #[must_use]
    pub(crate) fn with_faults(self, faults: Option<Faults>) -> Self {
        Self { faults, ..self }
    }

    /// The plugins of this type alone.
    #[must_use]
    pub fn only(&self, kind: &str) -> Self {
        self.filtered(|plugin| plugin["type"] == kind)
    }

    /// All but the plugins of this type.
    #[must_use]
    pub fn without(&self, kind: &str) -> Self {
        self.filtered(|plugin| plugin["type"] != kind)
    }

    fn filtered(&self, keep: impl Fn(&Value) -> bool) -> Self {
        let plugins = self.plugins.iter().filter(|plugin| keep(plugin)).cloned().collect();
        Self { plugins, ..self.clone() }
    }

    /// `ADD`: each plugin gets the result of the one before, the first one gets `previous`. If one fails, the chain is
    /// deleted, as the specification requires.
    pub fn add(&self, node: &Netns, sandbox: &Sandbox, previous: Option<&Value>) -> Result<Value> {
        self.add_alone(node, sandbox, previous).inspect_err(|_| {
            if let Err(second) = self.del(node, sandbox, previous) {
                eprintln!("DEL after failed ADD: {second:#}");
            }
        })
    }

    /// As [`Chain::add`], without the deletion after a failure.
    pub fn add_alone(&self, node: &Netns, sandbox: &Sandbox, previous: Option<&Value>) -> Result<Value> {
        let mut result = previous.cloned();
        for plugin in &self.plugins {
            result = Some(self.run(Verb::Add, plugin, node, sandbox, result.as_ref())?);
        }
        result.context("an empty chain has no result")
    }

    /// `CHECK`, in the order of `ADD`.
    pub fn check(&self, node: &Netns, sandbox: &Sandbox, result: &Value) -> Result<()> {
        for plugin in &self.plugins {
            self.run(Verb::Check, plugin, node, sandbox, Some(result))?;
        }
        Ok(())
    }

    /// `DEL`, in reverse order. Every plugin is called; the first error is returned.
    pub fn del(&self, node: &Netns, sandbox: &Sandbox, result: Option<&Value>) -> Result<()> {
        let mut outcome = Ok(());
        for plugin in self.plugins.iter().rev() {
            outcome = outcome.and(self.run(Verb::Del, plugin, node, sandbox, result).map(drop));
        }
        outcome
    }

    /// `GC` of the plugins of this type: these attachments, containers with interfaces, are valid.
    pub fn gc(&self, kind: &str, node: &Netns, valid: &[(&str, &str)]) -> Result<()> {
        /// The first version that has `GC`.
        const SINCE: &str = "1.1.0";
        for plugin in self.only(kind).plugins {
            let mut config = plugin.clone();
            config["cniVersion"] = json!(SINCE);
            config["name"] = json!(self.name);
            let attachment = |(id, interface): &(&str, &str)| json!({"containerID": id, "ifname": interface});
            config["cni.dev/valid-attachments"] = valid.iter().map(attachment).collect();
            self.execute(Verb::Gc, kind, node, self.command(Verb::Gc, kind)?, &config)?;
        }
        Ok(())
    }

    fn run(
        &self,
        verb: Verb,
        plugin: &Value,
        node: &Netns,
        sandbox: &Sandbox,
        previous: Option<&Value>,
    ) -> Result<Value> {
        let kind = plugin["type"].as_str().context("a plugin has a type")?;
        let mut config = plugin.clone();
        config["cniVersion"] = json!(VERSION);
        config["name"] = json!(self.name);
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        let mut command = self.command(verb, kind)?;
        command.env("CNI_CONTAINERID", &sandbox.container_id);
        command.env("CNI_IFNAME", &sandbox.interface);
        command.env("CNI_ARGS", &sandbox.arguments);
        command.env("CNI_NETNS", sandbox.netns.as_deref().unwrap_or(Path::new("")));
        self.execute(verb, kind, node, command, &config)
    }

    fn command(&self, verb: Verb, kind: &str) -> Result<Command> {
        let mut command = Command::new(self.find(kind)?);
        command.env("CNI_COMMAND", verb.to_string());
        command.env("CNI_PATH", std::env::join_paths(&self.search)?);
        Ok(command)
    }

    fn execute(
        &self,
        verb: Verb,
        kind: &str,
        node: &Netns,
        mut command: Command,
        config: &Value,
    ) -> Result<Value> {
        let step = format!("{kind} {verb}");
        if kind == REDIRECT
            && let Some(faults) = &self.faults
        {
            faults.inject_into(&mut command, Program::Plugin)?;
        }
        let output = node.execute(command, &serde_json::to_vec(config)?).context(step.clone())?;
        if !output.status.success() {
            return Err(match serde_json::from_slice::<PluginError>(&output.stdout) {
                Ok(error) => anyhow!(PluginError { step, ..error }),
                Err(_) => anyhow!(
                    "{step}: {}, without an error of the specification's form: {}{}",
                    output.status,
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                ),
            });
        }
        if verb == Verb::Add {
            serde_json::from_slice(&output.stdout).with_context(|| format!("{step}: result"))
        } else {
            Ok(Value::Null)
        }
    }

    fn find(&self, kind: &str) -> Result<PathBuf> {
        let found =
            self.search.iter().map(|dir| dir.join(kind)).find(|path| fs::exists(path).unwrap_or(false));
        found.with_context(|| format!("no CNI plugin {kind} in {:?}", self.search))
    }
}
