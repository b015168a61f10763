//! The CNI plugin: the last plugin of the chain, which reports pods to the agent.
//!
//! The plugin changes nothing in the kernel. `ADD` passes the pod's network namespace and the addresses that the previous plugins
//! reported to the agent. It returns when both families are captured, and prints the previous result unchanged. The plugin is
//! synchronous, without threads or a logger, because it runs for every pod and must start in milliseconds.
//!
//! | command | what happens |
//! |---|---|
//! | `ADD` | the agent enrolls the pod; an unreachable agent is an error, except in `excludeNamespaces` |
//! | `DEL` | the agent un-enrolls the pod; an unreachable agent is no error: the next agent reads a note |
//! | `CHECK` (≥ 0.4.0) | the agent compares the kernel with what `ADD` set up |
//! | `STATUS` (≥ 1.1.0) | whether `ADD` would succeed |
//! | `GC` (≥ 1.1.0) | the agent forgets attachments that the runtime no longer has |
//! | `VERSION` | the supported versions of the specification: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0 |
//!
//! The keys of its configuration are documented at [`Config`], its error codes at [`Error`].

mod command;
mod config;
mod environment;
mod error;
mod netns;
mod result;
#[cfg(test)]
mod tests;
mod version;

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use serde_json::{Value, json};

pub use config::Config;
pub use error::Error;
pub use result::addresses;
pub use version::SpecVersion;

use environment::{Command, Invocation};
use error::Failure;

/// The size limit of the configuration. Runtimes send a few kilobytes, and with GC a hundred bytes for each attachment of the
/// node.
const MAX_STDIN: u64 = 16 * 1024 * 1024;

/// The plugin's `main`.
pub fn main() -> ExitCode {
    let environment = |name: &str| env::var_os(name);
    let outcome = run(&environment, io::stdin().lock());
    if let Some(note) = &outcome.note {
        remark(note);
    }
    let printed = outcome.stdout.as_ref().map_or(Ok(()), print);
    if let Err(error) = &printed {
        let pod =
            Invocation::from_environment(&environment).ok().and_then(|invocation| invocation.pod_name());
        let pod = pod.map(|pod| format!("pod {pod}: ")).unwrap_or_default();
        remark(&format!("ambient-redirect: {pod}cannot print the result: {error}"));
    }
    if outcome.failed || printed.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Prints the whole text or nothing. A buffer would still print its rest at exit, and runtimes take the output of a failed plugin
/// for the error.
fn print(value: &Value) -> io::Result<()> {
    let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    stdout.write_all(format!("{value}\n").as_bytes())
}

/// Prints a message for people. A failure to print it does not fail a completed command.
fn remark(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// The plugin's output to the runtime.
#[derive(Debug, PartialEq)]
struct Outcome {
    stdout: Option<Value>,
    failed: bool,
    /// A message for people, on stderr, about a tolerated error.
    note: Option<String>,
}

/// The output of a successful command.
#[derive(Debug, Default)]
struct Success {
    stdout: Option<Value>,
    note: Option<String>,
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn run(environment: Lookup<'_>, stdin: impl Read) -> Outcome {
    let stdin = read(stdin);
    // Errors are in the runtime's version, even if the environment is invalid.
    let version = stdin.as_deref().ok().and_then(version::peek);
    match dispatch(environment, stdin, version) {
        Ok(Success { stdout, note }) => Outcome { stdout, failed: false, note },
        Err(failure) => {
            let report = failure.report(version.unwrap_or(SpecVersion::LATEST));
            Outcome { stdout: Some(report), failed: true, note: None }
        }
    }
}

fn dispatch(
    environment: Lookup<'_>,
    stdin: Result<Vec<u8>, Error>,
    version: Option<SpecVersion>,
) -> Result<Success, Failure> {
    let invocation = Invocation::from_environment(environment)?;
    let in_pod = |error| Failure::of_pod(invocation.pod_name(), error);
    if invocation.command == Command::Version {
        // Runtimes ask this before they choose a version, so neither an empty nor an unknown configuration is an error.
        let stdout = Some(version_report(version.unwrap_or(SpecVersion::LATEST)));
        return Ok(Success { stdout, note: None });
    }
    let config = stdin.and_then(|bytes| Config::parse(&bytes)).map_err(in_pod)?;
    command::execute(&invocation, &config).map_err(in_pod)
}

fn read(stdin: impl Read) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    stdin.take(MAX_STDIN + 1).read_to_end(&mut bytes).map_err(Error::Stdin)?;
    if bytes.len() as u64 > MAX_STDIN { Err(Error::StdinTooLarge) } else { Ok(bytes) }
}

fn version_report(version: SpecVersion) -> Value {
    let supported: Vec<_> = SpecVersion::ALL.iter().map(|version| version.as_str()).collect();
    json!({ "cniVersion": version.as_str(), "supportedVersions": supported })
}
