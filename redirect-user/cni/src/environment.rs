//! The environment variables that a runtime sets.

use std::fmt;
use std::path::PathBuf;

use super::error::Error;
use super::version::SpecVersion;
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::Attachment;

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Command {
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Status, Self::Gc, Self::Version];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }

    /// The version of the specification that introduced the command.
    pub(super) const fn since(self) -> SpecVersion {
        match self {
            Self::Add | Self::Del | Self::Version => SpecVersion::V0_3_0,
            Self::Check => SpecVersion::V0_4_0,
            Self::Status | Self::Gc => SpecVersion::V1_1_0,
        }
    }

    /// Whether the command is about one attachment of one pod.
    const fn has_attachment(self) -> bool {
        matches!(self, Self::Add | Self::Del | Self::Check)
    }

    /// Whether the namespace must exist. After a reboot, `DEL` comes without one.
    const fn needs_netns(self) -> bool {
        matches!(self, Self::Add | Self::Check)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The command, and the pod that it is for.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) command: Command,
    /// Empty strings for commands without an attachment.
    pub(super) attachment: Attachment,
    /// `CNI_NETNS`; empty only where the command does not need it.
    pub(super) netns: PathBuf,
    pub(super) pod: PodIdentity,
}

impl Invocation {
    pub(super) fn from_environment(lookup: super::Lookup<'_>) -> Result<Self, Error> {
        let mut variables = Variables { lookup, problems: Vec::new() };
        let command = variables.command();
        let (container_id, interface, netns) = match command {
            Some(command) if command.has_attachment() => (
                variables.checked("CNI_CONTAINERID", container_id_problem),
                variables.checked("CNI_IFNAME", interface_problem),
                variables.netns(command),
            ),
            _ => Default::default(),
        };
        match command {
            Some(command) if variables.problems.is_empty() => {
                let pod = identity(&variables.text("CNI_ARGS"), &container_id);
                Ok(Self { command, attachment: Attachment { container_id, interface }, netns, pod })
            }
            _ => Err(Error::Environment { problems: variables.problems.join(", ") }),
        }
    }

    /// The pod, for messages; `None` for commands without one.
    pub(super) fn pod_name(&self) -> Option<String> {
        self.command.has_attachment().then(|| self.pod.to_string())
    }
}

/// Collects problems, so that one error names every variable.
struct Variables<'a> {
    lookup: super::Lookup<'a>,
    problems: Vec<String>,
}

impl Variables<'_> {
    fn command(&mut self) -> Option<Command> {
        let text = self.text("CNI_COMMAND");
        let command = Command::ALL.into_iter().find(|command| command.name() == text);
        if command.is_none() {
            let problem = if text.is_empty() { "is not set".to_owned() } else { format!("is {text:?}") };
            self.problems.push(format!(
                "CNI_COMMAND {problem} (it must be one of {})",
                Command::ALL.map(Command::name).join(" ")
            ));
        }
        command
    }

    fn checked(&mut self, name: &str, problem: fn(&str) -> Option<&'static str>) -> String {
        let value = self.text(name);
        if let Some(problem) = problem(&value) {
            self.problems.push(format!("{name} {problem}"));
        }
        value
    }

    fn netns(&mut self, command: Command) -> PathBuf {
        let path = (self.lookup)("CNI_NETNS").unwrap_or_default();
        if path.is_empty() && command.needs_netns() {
            self.problems.push("CNI_NETNS is not set".to_owned());
        }
        path.into()
    }

    /// The specification's values are ASCII: a value that is not Unicode fails the checks like any other invalid character.
    fn text(&self, name: &str) -> String {
        (self.lookup)(name).unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn container_id_problem(id: &str) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if id.is_empty() {
        Some("is not set")
    } else if !id.starts_with(|c: char| c.is_ascii_alphanumeric()) || !id.chars().all(allowed) {
        Some("has a character that the specification does not allow")
    } else {
        None
    }
}

/// The kernel's rules for the name of an interface.
fn interface_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is not set")
    } else if name.len() > 15 {
        Some("is longer than 15 characters")
    } else if name == "."
        || name == ".."
        || name.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace())
    {
        Some("is no valid name of an interface")
    } else {
        None
    }
}

/// The pod of `CNI_ARGS` (`KEY=value;…`). Kubernetes runtimes pass no service account; the agent gets it from the API server.
/// Other keys are for other plugins and are ignored, with or without `IgnoreUnknown`. The sandbox's container ID replaces a
/// missing UID or name.
fn identity(args: &str, container_id: &str) -> PodIdentity {
    let argument = |key| {
        let pairs = args.split(';').filter_map(|pair| pair.split_once('='));
        pairs
            .filter(|(k, value)| *k == key && !value.is_empty())
            .map(|(_, value)| value.to_owned())
            .next_back()
    };
    PodIdentity {
        uid: argument("K8S_POD_UID").unwrap_or_else(|| container_id.to_owned()),
        namespace: argument("K8S_POD_NAMESPACE").unwrap_or_default(),
        name: argument("K8S_POD_NAME").unwrap_or_else(|| container_id.to_owned()),
        service_account: argument("K8S_POD_SERVICE_ACCOUNT").unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Invocation, String> {
        let lookup = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
        };
        Invocation::from_environment(&lookup).map_err(|error| error.to_string())
    }

    #[test]
    fn every_bad_variable_is_named() {
        let message = parse(&[("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth/0")]).unwrap_err();
        for name in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"] {
            assert!(message.contains(name), "{message}");
        }
        assert!(parse(&[]).unwrap_err().contains("CNI_COMMAND is not set"));
        assert!(parse(&[("CNI_COMMAND", "add")]).unwrap_err().contains(r#"CNI_COMMAND is "add""#));
    }

    #[test]
    fn a_deletion_needs_no_namespace_and_other_commands_no_container() {
        let del =
            parse(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")]).unwrap();
        assert_eq!(del.netns, PathBuf::new());
        for command in ["STATUS", "GC", "VERSION"] {
            assert_eq!(parse(&[("CNI_COMMAND", command)]).unwrap().pod_name(), None);
        }
    }

    #[test]
    fn interfaces_and_container_ids_follow_the_rules() {
        for name in ["eth0", "net1", "a-very-long.nam"] {
            assert_eq!(interface_problem(name), None, "{name}");
        }
        for name in ["", ".", "..", "a b", "a:b", "a/b", "sixteen-letters!"] {
            assert!(interface_problem(name).is_some(), "{name}");
        }
        for id in ["c", "0a-b_c.d"] {
            assert_eq!(container_id_problem(id), None, "{id}");
        }
        for id in ["", "-a", "../x", "a b", "ä"] {
            assert!(container_id_problem(id).is_some(), "{id}");
        }
    }

    #[test]
    fn the_pod_comes_from_the_arguments_or_is_the_container() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1";
        let pod = identity(args, "c1");
        assert_eq!((pod.uid.as_str(), pod.to_string().as_str()), ("u-1", "shop/cart"));
        assert_eq!(pod.service_account, "");
        assert_eq!(identity(&format!("{args};K8S_POD_SERVICE_ACCOUNT=till"), "c1").service_account, "till");

        for args in ["", ";;=;nonsense", "K8S_POD_UID=;OTHER=1"] {
            let pod = identity(args, "c1");
            let all = [pod.uid.as_str(), &pod.namespace, &pod.name];
            assert_eq!(all, ["c1", "", "c1"], "{args}");
        }
    }
}
