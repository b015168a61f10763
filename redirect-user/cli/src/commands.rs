//! The subcommands of `redirect`.

mod doctor;
mod inspect;
mod monitor;
mod reference;
mod show;
mod top;
mod uninstall;
mod validate;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use redirect_agent as agent;
use redirect_agent::install;
use redirect_linux::bpffs;
use redirect_linux::probe::Refusal;
use redirect_protocol::wire;
use redirect_proxy as proxy;

/// eBPF traffic redirection to the node proxy of an ambient mesh, in IPv4 and IPv6 alike
#[derive(Debug, Parser)]
#[command(name = "redirect", version)]
struct Cli {
    /// Log level, or levels by module as in `info,redirect_zds=debug`. With `redirect_ebpf=debug` the agent also logs drops
    /// that should not occur, one by one
    #[arg(long, global = true, default_value = "info", env = "REDIRECT_LOG", value_name = "FILTER")]
    log: String,
    /// Log format
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node's agent
    Agent(Box<agent::Options>),
    /// Add the CNI plugin to this node's chain
    Install(install::Install),
    /// Run the embedded node proxy
    Proxy(proxy::Options),
    /// Show the state of this node's agent: programs, maps, node proxies, counters
    Status(Query),
    /// Show the enrolled pods of this node, and their connections since enrollment
    Pods(Query),
    /// Check whether this node can run the data path. Exit code 0: yes, 1: with limits, 2: no
    Doctor(doctor::Options),
    /// Show what must be in the kernel for a pod, and whether it is. Exit code 1 if anything is missing
    Pod(inspect::PodQuery),
    /// Show how the kernel decides on a connection, and the first fault on its way. Exit code 1 if there is one
    Explain(inspect::ExplainQuery),
    /// Print connections of pods as the kernel decides on them
    Monitor(monitor::Options),
    /// Show live connection rates of the node and of each pod
    Top(top::Options),
    /// Run in a pod: check that its connections are captured. Exit code 1 if those of a family are not
    Validate(validate::Options),
    /// Print a shell completion script
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages to a directory
    #[command(hide = true)]
    Man {
        /// Directory
        directory: PathBuf,
    },
    /// Print the option reference
    #[command(hide = true)]
    Reference,
    /// Mount a bpffs on /sys/fs/bpf if there is none, for nodes where nothing else does
    MountBpffs,
    /// Remove everything that ambient-redirect created on this node. Needs no agent. Exit code 3: an agent runs
    Uninstall(Uninstall),
}

#[derive(Debug, clap::Args)]
struct Uninstall {
    #[command(flatten)]
    options: agent::uninstall::Options,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    // Must stay last: its heading would apply to the options after it.
    #[command(flatten)]
    chain: install::Directories,
}

#[derive(Debug, clap::Args)]
struct Query {
    /// The agent's UNIX socket
    #[arg(long, default_value = wire::DEFAULT_SOCKET, env = "REDIRECT_SOCKET", value_name = "FILE")]
    socket: PathBuf,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

/// Runs the command that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = log(&cli) {
        eprintln!("redirect: {error:#}");
        return ExitCode::from(2);
    }
    let result = match cli.command {
        Command::Agent(options) => agent::run(*options),
        Command::Install(install) => install::run(install),
        Command::Proxy(options) => proxy::run(options),
        Command::Status(query) => show::status(&query),
        Command::Pods(query) => show::pods(&query),
        Command::Doctor(options) => return doctor::doctor(&options).unwrap_or_else(|error| failure(&error)),
        Command::Pod(query) => return code(inspect::pod(&query)),
        Command::Explain(query) => return code(inspect::explain(&query)),
        Command::Monitor(options) => monitor::run(&options),
        Command::Top(options) => top::run(&options),
        Command::Validate(options) => return code(validate::run(&options)),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "redirect", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { directory } => manual(&directory),
        Command::Reference => {
            print!("{}", reference::markdown(Cli::command()));
            Ok(())
        }
        Command::MountBpffs => bpffs::ensure_bpffs(),
        Command::Uninstall(command) => return uninstall::run(&command),
    };
    exit(result)
}

/// Writes one page for the program, and one for each command.
fn manual(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)?;
    Ok(clap_mangen::generate_to(Cli::command(), directory)?)
}

/// Exit code 2 on an error, for commands whose exit code 1 reports a problem.
fn code(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("redirect: {error:#}");
        ExitCode::from(2)
    })
}

fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure(&error),
    }
}

fn failure(error: &anyhow::Error) -> ExitCode {
    eprintln!("redirect: {error:#}");
    error.downcast_ref::<Refusal>().map_or(ExitCode::FAILURE, Refusal::exit_code)
}

fn log(cli: &Cli) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let filter = EnvFilter::builder().parse(&cli.log).with_context(|| format!("--log {}", cli.log))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
