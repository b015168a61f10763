//! The embedded proxy's command line.

use std::path::Path;
use std::process::Command;

use super::Setup;
use crate::access_log::EMBEDDED;
use crate::agent;

pub(super) fn command(binary: &Path, setup: &Setup<'_>, placement: &str) -> Command {
    let mut command = Command::new(binary);
    let servers: Vec<_> = setup.dns_servers.iter().map(ToString::to_string).collect();
    command.arg("proxy").arg("--dns-upstream").arg(servers.join(","));
    command.args(["--placement", placement]);
    command.arg("--zds-socket").arg(agent::zds_socket(setup.dir));
    command.arg("--access-log").arg(setup.dir.join(EMBEDDED));
    command.arg("--drain").arg(setup.drain.to_string());
    command.envs(setup.environment.iter().map(|(name, value)| (name, value)));
    command
}
