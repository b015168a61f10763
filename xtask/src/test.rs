//! `cargo xtask test`: unit tests and end-to-end tests, summarized in the last line.
//!
//! The programs under test are the shipped ones, and the tests are built from the same artifacts, unless `--dev` is
//! given.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, PipeReader, Write};
use std::path::{self, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::progress::{self, Budget, Watch, say_cost};
use crate::tally::Tally;
use crate::userspace::{Artifacts, Programs};
use crate::vm::table::table;
use crate::vm::{self, Plan, Suite, smoke};
use crate::workspace::Workspace;
use crate::{deb, host, image, setup, userspace};

/// The kernels and tests that show most in a short time.
const SMOKE: &str = "smoke";

/// How many failed end-to-end tests are repeated.
pub(crate) const AGAIN: usize = 3;

/// How long to wait for output after cargo has ended: a process that a test left behind may hold the pipe
/// forever.
const GRACE: Duration = Duration::from_secs(1);

/// Which tests, and against which proxy.
#[derive(Args)]
pub(crate) struct Selection {
    /// Runs only tests whose name contains this.
    filter: Option<String>,
    /// Runs the end-to-end tests with this node proxy, such as a ztunnel, instead of the embedded one.
    #[arg(long, value_name = "PATH")]
    proxy: Option<PathBuf>,
    /// Runs the end-to-end tests on this kernel in a virtual machine, and none on this host: a series of Debian's
    /// archive, such as 6.1, or `newest`, each with `-rt` behind it for `PREEMPT_RT`, or an image `vmlinuz-<release>` beside
    /// lib/modules. Can be repeated. `smoke`
    /// runs a few tests on several kernels.
    #[arg(long, value_name = "KERNEL", conflicts_with = "proxy")]
    vm: Vec<String>,
    /// Runs the tests on this host as well, before.
    #[arg(long, requires = "vm")]
    host: bool,
    /// More arguments of that kernel, such as `ipv6.disable=1`.
    #[arg(long, value_name = "ARGUMENTS", default_value = "", requires = "vm")]
    vm_args: String,
    /// Tests a build for development there, which is ready sooner than the one that is shipped.
    #[arg(long, requires = "vm")]
    dev: bool,
    /// Gives the load tests (`load::`) numbers as on a large node: 1,000 pods, 50,000 open connections. They take minutes, in
    /// a virtual machine an hour.
    #[arg(long)]
    load: bool,
    /// Has pods come and go, and proxies and agents be killed, for so many minutes (`soak::`) instead of seconds.
    #[arg(long, value_name = "MINUTES")]
    soak: Option<f64>,
    /// What kind of proxy that is, where its name does not begin with it.
    #[arg(long, value_name = "KIND", requires = "proxy")]
    proxy_kind: Option<ProxyKind>,
    /// Arguments of the test binaries, after `--`.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// The proxies that the tests know how to start, and whose logs they can read.
#[derive(Clone, Copy, ValueEnum)]
enum ProxyKind {
    /// `redirect proxy`.
    Embedded,
    /// An unmodified ztunnel.
    Ztunnel,
}

pub(crate) fn test(workspace: &Workspace, selection: &Selection) -> Result<ExitCode> {
    host::check()?;
    let proxy = selection.proxy.as_ref().map(absolute).transpose()?;
    let kernel_side = setup::tests(workspace, !selection.vm.is_empty())?;
    let programs = if selection.dev {
        userspace::build_for_development(workspace, &kernel_side)?
    } else {
        userspace::build(workspace, &kernel_side, &[])?
    };
    // Tests on this host run it; those in virtual machines do not.
    if selection.is_on_host() {
        image::write(workspace, &programs, &image::default_name())?;
        deb::write(workspace, &programs)?;
    }

    let mut build = selection.artifacts().cargo(workspace, "test");
    build.args(["--workspace", "--no-run"]);
    progress::watch(workspace, "building the tests", "build-tests", &mut build, Watch::Cargo)?;
    say_cost(Budget::Tests);

    let started = Instant::now();
    let mut tally = Tally::default();
    if selection.is_on_host() {
        let mut run = test_command(workspace, &programs, selection);
        if let Some(proxy) = proxy {
            run.env("REDIRECT_PROXY_BIN", proxy);
        }
        if let Some(kind) = selection.proxy_kind.and_then(|kind| kind.to_possible_value()) {
            run.env("REDIRECT_PROXY_KIND", kind.get_name());
        }
        tally = stream(&mut run)?;
        run_again(workspace, selection.artifacts(), &run, &mut tally)?;
    }
    let plans = selection.boots();
    if !plans.is_empty() {
        let boots = vm::run(workspace, &suite(workspace, selection.artifacts(), &programs)?, plans)?;
        boots.iter().for_each(|boot| tally.boot(boot));
        println!("\n{}\n", table(&boots));
    }
    Ok(report(&tally, started.elapsed()))
}

impl Selection {
    fn artifacts(&self) -> Artifacts {
        if self.dev { Artifacts::Development } else { Artifacts::Shipped }
    }

    fn is_on_host(&self) -> bool {
        self.host || self.vm.is_empty()
    }

    /// Arguments of the test binaries. Load tests run one after the other, because they share the machine and
    /// its limits.
    fn test_arguments(&self) -> impl Iterator<Item = OsString> {
        self.arguments.iter().cloned().chain(self.load.then(|| "--test-threads=1".into()))
    }

    /// More environment of the tests.
    fn environment(&self) -> impl Iterator<Item = (&'static str, String)> {
        let load = self.load.then(|| ("REDIRECT_LOAD", "full".to_owned()));
        load.into_iter().chain(self.soak.map(|minutes| ("REDIRECT_SOAK", minutes.to_string())))
    }

    /// The kernels to boot.
    fn boots(&self) -> Vec<Plan> {
        let text = |argument: OsString| argument.to_string_lossy().into_owned();
        let plan = |kernel: &String| Plan {
            kernel: kernel.clone(),
            arguments: self.vm_args.clone(),
            // As on this host.
            only: env::var("REDIRECT_TESTS")
                .iter()
                .flat_map(|list| list.split(','))
                .map(str::to_owned)
                .collect(),
            environment: self.environment().collect(),
            memory: if self.load { vm::MUCH_MEMORY } else { vm::MEMORY },
            test_arguments: self.filter.iter().cloned().chain(self.test_arguments().map(text)).collect(),
            limit: vm::LIMIT,
        };
        self.vm
            .iter()
            .flat_map(|kernel| if kernel == SMOKE { smoke::plans() } else { vec![plan(kernel)] })
            .collect()
    }
}

/// The tests and programs for virtual machines.
fn suite(workspace: &Workspace, artifacts: Artifacts, programs: &Programs) -> Result<Suite> {
    let binary = |name| test_binary(artifacts.cargo(workspace, "test"), name);
    Ok(Suite {
        e2e: binary("e2e")?,
        others: vec![binary("programs")?],
        programs: vec![
            ("REDIRECT_BIN", programs.redirect.clone()),
            ("REDIRECT_CNI_BIN", programs.plugin.clone()),
            ("REDIRECT_TESTBED_BIN", artifacts.folder(workspace).join("testbed")),
        ],
    })
}

/// A test binary that has already been built.
fn test_binary(mut cargo: Command, name: &str) -> Result<PathBuf> {
    cargo.args(["--workspace", "--no-run", "--message-format", "json", "--quiet"]).stderr(Stdio::null());
    let output = cargo.output().context("cannot run cargo")?;
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no test {name}"))
}

/// Resolves a program's path relative to the caller's directory, before cargo changes it.
fn absolute(program: &PathBuf) -> Result<PathBuf> {
    let absolute = path::absolute(program)?;
    if !absolute.is_file() {
        bail!("there is no proxy at {}", absolute.display());
    }
    Ok(absolute)
}

fn test_command(workspace: &Workspace, programs: &Programs, selection: &Selection) -> Command {
    let mut cargo = selection.artifacts().cargo(workspace, "test");
    cargo.args(["--workspace", "--no-fail-fast"]).args(&selection.filter);
    cargo.arg("--").args(selection.test_arguments());
    cargo.env("REDIRECT_BIN", &programs.redirect).env("REDIRECT_CNI_BIN", &programs.plugin);
    cargo.envs(selection.environment());
    if io::stdout().is_terminal() && env::var_os("CARGO_TERM_COLOR").is_none() {
        cargo.env("CARGO_TERM_COLOR", "always");
    }
    cargo
}

/// Repeats failed end-to-end tests once, each alone. They have deadlines, and so many run at a time that a slow machine can
/// fail them; if more than a few fail, the machine is not the reason.
fn run_again(workspace: &Workspace, artifacts: Artifacts, run: &Command, tally: &mut Tally) -> Result<()> {
    if tally.end_to_end.len() > AGAIN {
        return Ok(());
    }
    for name in tally.end_to_end.clone() {
        progress::say(&format!("once more, alone: {name}"));
        let mut alone = artifacts.cargo(workspace, "test");
        alone.args(["--workspace", "--test", "e2e", "--", "--exact", &name]);
        alone.envs(run.get_envs().filter_map(|(key, value)| Some((key, value?))));
        let result = stream(&mut alone)?;
        // The test, and the one that checks for leftovers.
        if result.is_success() && result.passed == 2 {
            tally.passed_alone(&name);
        }
    }
    Ok(())
}

/// Runs cargo, forwards its output and that of the tests, and adds it up. Both streams share a pipe, so that
/// cargo's headings (stderr) stay ahead of the results (stdout) that they belong to.
fn stream(cargo: &mut Command) -> Result<Tally> {
    let (reader, writer) = io::pipe()?;
    cargo.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = cargo.spawn().context("cannot run cargo")?;
    // The command holds the write ends; the pipe would never end while they are open here.
    cargo.stdout(Stdio::null()).stderr(Stdio::null());

    let mut tally = Tally::default();
    let lines = read_lines(reader);
    let mut stdout = io::stdout().lock();
    let mut ended = None;
    loop {
        match lines.recv_timeout(GRACE) {
            Ok(line) => {
                tally.line(&line);
                writeln!(stdout, "{line}")?;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if ended.is_some() => {
                progress::say("a test left a process behind, which still holds the tests' output");
                break;
            }
            Err(RecvTimeoutError::Timeout) => ended = child.try_wait()?,
        }
    }
    let status = child.wait()?;
    tally.finish(status.success());
    Ok(tally)
}

fn read_lines(reader: PipeReader) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        // Tests may print invalid UTF-8.
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    lines
}

fn report(tally: &Tally, took: Duration) -> ExitCode {
    for (name, reason) in &tally.skips {
        println!("skipped: {name}: {reason}");
    }
    for line in &tally.details {
        println!("{line}");
    }
    for name in &tally.unstable {
        println!("unstable, failed among the others and passed alone: {name}");
    }
    for name in &tally.failures {
        println!("failed: {name}");
    }
    if tally.passed + tally.failed == 0 {
        println!("no test ran: all were skipped or filtered out");
    }
    println!("tests took {:.1} s", took.as_secs_f32());
    println!("{tally}");
    if tally.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
