//! The CNI commands.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use super::environment::{Command, Invocation};
use super::error::Error;
use super::netns::open_netns;
use super::{Config, Success, result};
use redirect_protocol::wire::client::{self, call, call_done};
use redirect_protocol::wire::{self, ErrorKind, Reply, Request, deletions};

/// How long pods of excluded namespaces wait for the agent.
const EXCLUDED_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn execute(invocation: &Invocation, config: &Config) -> Result<Success, Error> {
    let command = invocation.command;
    if config.version < command.since() {
        return Err(Error::CommandVersion {
            command: command.name(),
            since: command.since(),
            version: config.version,
        });
    }
    match command {
        Command::Add => add(invocation, config),
        Command::Del => del(invocation, config),
        Command::Check => check(invocation, config),
        Command::Status => status(config),
        Command::Gc => gc(config),
        // `dispatch` answers it without a configuration.
        Command::Version => Ok(Success::default()),
    }
}

fn add(invocation: &Invocation, config: &Config) -> Result<Success, Error> {
    let prev_result = config.prev_result.as_ref().ok_or(Error::NotChained)?;
    let addresses = result::addresses(prev_result)?.iter().collect();
    let netns = open_netns(&invocation.netns)?;
    let wait = Wait::of(invocation, config);
    // A note refers to an earlier attachment of this name.
    deletions::take_back(wait.socket, &invocation.attachment)
        .map_err(|source| Error::Note { socket: wait.socket.into(), source })?;
    let (attachment, pod) = (invocation.attachment.clone(), invocation.pod.clone());
    let netns_path = Some(invocation.netns.clone());
    let request = Request::Add { attachment, pod, addresses, netns_path };
    let note = match call(wait.socket, &request, Some(netns.as_fd()), wait.timeout) {
        Ok(replies) if matches!(*replies, [Reply::Added { .. }]) => None,
        Ok(_) => return Err(client::Error::Unexpected { socket: wait.socket.into() }.into()),
        Err(error) => Some(wait.tolerate(error, invocation)?),
    };
    Ok(Success { stdout: Some(result::pass_through(prev_result.clone(), config.version)), note })
}

/// The runtime repeats a failed deletion, and keeps the pod until one succeeds. So an absent agent is no failure: the next agent
/// reads a note. The same applies to an agent of another release, which only answers its own release's plugin.
fn del(invocation: &Invocation, config: &Config) -> Result<Success, Error> {
    let error = match ask_for_deletion(invocation, config) {
        Err(error) if error.is_unanswered() || is_version(&error) => error,
        outcome => return Ok(outcome.map(|()| Success::default())?),
    };
    let Invocation { pod, attachment, .. } = invocation;
    let noted = deletions::leave(&config.agent_socket, attachment);
    // An agent that has just bound its socket may have read the notes before this one.
    if matches!(error, client::Error::Unreachable { .. } | client::Error::Closed { .. })
        && ask_for_deletion(invocation, config).is_ok()
    {
        // If the note stays, another agent reads it, but does not know the pod.
        _ = deletions::take_back(&config.agent_socket, attachment);
        return Ok(Success::default());
    }
    let unnoted = noted.err().map(|error| format!("; no note of it is left for the next agent: {error}"));
    let note =
        format!("ambient-redirect: deleting pod {pod} all the same: {error}{}", unnoted.unwrap_or_default());
    Ok(Success { stdout: None, note: Some(note) })
}

fn ask_for_deletion(invocation: &Invocation, config: &Config) -> Result<(), client::Error> {
    let request = Request::Del { attachment: invocation.attachment.clone() };
    match call_done(&config.agent_socket, &request, None, config.timeout) {
        Err(client::Error::Refused(wire::Error { kind: ErrorKind::Unknown, .. })) => Ok(()),
        outcome => outcome,
    }
}

fn is_version(error: &client::Error) -> bool {
    matches!(
        error,
        client::Error::Version { .. } | client::Error::Refused(wire::Error { kind: ErrorKind::Version, .. })
    )
}

fn check(invocation: &Invocation, config: &Config) -> Result<Success, Error> {
    let prev_result = config.prev_result.as_ref().ok_or(Error::NotChained)?;
    let addresses = result::addresses(prev_result)?.iter().collect();
    let netns = open_netns(&invocation.netns)?;
    let request = Request::Check { attachment: invocation.attachment.clone(), addresses };

    let wait = Wait::of(invocation, config);
    match call_done(wait.socket, &request, Some(netns.as_fd()), wait.timeout) {
        Ok(()) => Ok(Success::default()),
        Err(error) => Ok(Success { stdout: None, note: Some(wait.tolerate(error, invocation)?) }),
    }
}

fn status(config: &Config) -> Result<Success, Error> {
    call_done(&config.agent_socket, &Request::Ready, None, config.timeout).map_err(Error::NotReady)?;
    Ok(Success::default())
}

fn gc(config: &Config) -> Result<Success, Error> {
    let request = Request::Gc { valid: config.require_valid_attachments()? };
    call_done(&config.agent_socket, &request, None, config.timeout)?;
    Ok(Success::default())
}

/// How long a pod waits for the agent, and whether it may start without.
struct Wait<'a> {
    socket: &'a Path,
    timeout: Duration,
    excluded: bool,
}

impl<'a> Wait<'a> {
    fn of(invocation: &Invocation, config: &'a Config) -> Self {
        let excluded = config.exclude_namespaces.contains(&invocation.pod.namespace);
        let timeout = if excluded { config.timeout.min(EXCLUDED_TIMEOUT) } else { config.timeout };
        Self { socket: &config.agent_socket, timeout, excluded }
    }

    /// Returns a remark instead of the error if no answer came and the pod's namespace is excluded. An answer counts in every
    /// namespace.
    fn tolerate(&self, error: client::Error, invocation: &Invocation) -> Result<String, Error> {
        if !self.excluded || !error.is_unanswered() {
            return Err(error.into());
        }
        let Invocation { command, pod, .. } = invocation;
        Ok(format!(
            "ambient-redirect: {command} of pod {pod} succeeds because its namespace is excluded: {error}"
        ))
    }
}
