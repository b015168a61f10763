//! `cargo xtask test --vm <kernel>`: end-to-end tests on other kernels, in virtual machines.

mod apt;
mod boot;
mod kernels;
mod root;
pub(crate) mod smoke;
pub(crate) mod table;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::apt::Archive;
use self::boot::Machine;
use self::kernels::Kernel;
use self::root::Root;
use self::table::{BOOT, Boot, Outcome};
use crate::progress;
use crate::test::AGAIN;
use crate::workspace::Workspace;

/// The tests to run in virtual machines.
pub(crate) struct Suite {
    /// The end-to-end tests.
    pub(crate) e2e: PathBuf,
    /// The other tests, unless only some are wanted.
    pub(crate) others: Vec<PathBuf>,
    /// The programs that they find through environment variables, by variable.
    pub(crate) programs: Vec<(&'static str, PathBuf)>,
}

/// A kernel to boot, and the tests to run in it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// A series, `newest`, or an image.
    pub(crate) kernel: String,
    /// More arguments of the kernel.
    pub(crate) arguments: String,
    /// Groups of tests, or name prefixes; all tests if empty.
    pub(crate) only: Vec<String>,
    /// More environment of the tests.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// In MiB.
    pub(crate) memory: u32,
    /// Arguments of the test binaries.
    pub(crate) test_arguments: Vec<String>,
    /// The maximum duration.
    pub(crate) limit: Duration,
}

/// The number of machines that run at the same time.
const AT_ONCE: usize = 2;

/// The factor for deadlines, compared with this machine.
const PATIENCE: &str = "30";

/// The deadline of a machine. All tests take hours in an emulated one.
pub(crate) const LIMIT: Duration = Duration::from_secs(12 * 3600);

/// A machine's memory, in MiB.
pub(crate) const MEMORY: u32 = 2048;

/// The memory of one whose sockets alone take gigabytes.
pub(crate) const MUCH_MEMORY: u32 = 8192;

/// Runs the plans. If a kernel can't be booted because it is not available, that counts as a skipped test, never as passed.
pub(crate) fn run(workspace: &Workspace, suite: &Suite, plans: Vec<Plan>) -> Result<Vec<Boot>> {
    let asks = plans.iter().any(|plan| matches!(kernels::is_file(&plan.kernel), Ok(false)));
    let archive = asks.then(|| Archive::open(workspace));
    let mut queue: VecDeque<(usize, Plan, Result<Kernel, String>)> = VecDeque::new();
    for (number, plan) in plans.into_iter().enumerate() {
        let kernel = match (kernels::is_file(&plan.kernel)?, &archive) {
            (true, _) => Kernel::from_files(Path::new(&plan.kernel)),
            (false, Some(Ok(archive))) => Kernel::from_archive(workspace, archive, &plan.kernel),
            (false, Some(Err(error))) => Err(anyhow::anyhow!("Debian's archive can't be read: {error:#}")),
            (false, None) => Err(anyhow::anyhow!("Debian's archive was not asked")),
        };
        queue.push_back((number, plan, kernel.map_err(|error| format!("{error:#}"))));
    }
    let queue = Mutex::new(queue);
    let boots = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some((number, plan, kernel)) = next else { break };
                    let boot = boot(workspace, suite, &plan, number, kernel);
                    boots.lock().unwrap_or_else(PoisonError::into_inner).push((number, boot));
                }
            });
        }
    });
    let mut boots = boots.into_inner().unwrap_or_else(PoisonError::into_inner);
    boots.sort_by_key(|(number, _)| *number);
    let boots: Vec<Boot> = boots.into_iter().map(|(_, boot)| boot).collect();
    let report = workspace.target("vm/report.json");
    fs::create_dir_all(workspace.target("vm"))?;
    fs::write(&report, serde_json::to_vec_pretty(&boots)?)
        .with_context(|| format!("cannot write {}", report.display()))?;
    Ok(boots)
}

fn boot(
    workspace: &Workspace,
    suite: &Suite,
    plan: &Plan,
    number: usize,
    kernel: Result<Kernel, String>,
) -> Boot {
    let mut boot =
        Boot { name: format!("{} {}", plan.kernel, plan.arguments).trim().to_owned(), ..Boot::default() };
    let kernel = match kernel {
        Ok(kernel) => kernel,
        Err(reason) => {
            progress::say(&format!("skipped: vm::{}: {reason}", boot.name));
            boot.tests.insert(BOOT.into(), Outcome::Skipped(reason));
            return boot;
        }
    };
    boot.release = kernel.release.clone();
    run_plan(workspace, suite, plan, number, &kernel, &mut boot);
    // An emulated machine is even slower when others run: see `run_again` for the tests on this host.
    if (1..=AGAIN).contains(&boot.counts().failed) {
        let mut again = Boot { name: boot.name.clone(), ..Boot::default() };
        let failed = boot.failures();
        let only = if failed.iter().any(|test| test == BOOT) { plan.only.clone() } else { failed };
        progress::say(&format!("once more, in a new machine: {} on {}", only.join(", "), boot.name));
        run_plan(workspace, suite, &Plan { only, ..plan.clone() }, number, &kernel, &mut again);
        boot.run_again(again);
    }
    boot
}

fn run_plan(
    workspace: &Workspace,
    suite: &Suite,
    plan: &Plan,
    number: usize,
    kernel: &Kernel,
    boot: &mut Boot,
) {
    let started = Instant::now();
    let name = boot.name.clone();
    let result = in_machine(workspace, suite, plan, number, kernel, |line| {
        println!("{name} | {line}");
        boot.line(line);
    });
    boot.seconds = started.elapsed().as_secs_f32();
    let counts = boot.counts();
    match result {
        Ok(_) if counts.failed > 0 => {}
        Ok(0) if counts.passed > 0 => {}
        Ok(0) => drop(boot.tests.insert(BOOT.into(), Outcome::Skipped("no test ran".into()))),
        Ok(status) => boot.failed(&format!("the tests ended with status {status}")),
        Err(error) => boot.failed(&format!("{error:#}")),
    }
}

fn in_machine(
    workspace: &Workspace,
    suite: &Suite,
    plan: &Plan,
    number: usize,
    kernel: &Kernel,
    line: impl FnMut(&str),
) -> Result<i32> {
    let folder = format!("{number}-{}", kernel.release);
    let root = Root::new(workspace, &folder, kernel)?;
    let mut script = String::from("export REDIRECT_E2E=require\n");
    writeln!(script, "export REDIRECT_TEST_PATIENCE={PATIENCE}")?;
    if !plan.only.is_empty() {
        writeln!(script, "export REDIRECT_TESTS='{}'", plan.only.join(","))?;
    }
    for (variable, value) in &plan.environment {
        writeln!(script, "export {variable}='{value}'")?;
    }
    // The path where tests expect it that load another one.
    let object = workspace.target("bpf/redirect.o");
    root.put(&object, &object)?;
    for (variable, path) in &suite.programs {
        let place = Path::new("/vm/programs").join(path.file_name().unwrap_or_default());
        root.built(path, &place)?;
        writeln!(script, "export {variable}={}", place.display())?;
    }
    script.push_str("status=0\n");
    let others = suite.others.iter().filter(|_| plan.only.is_empty());
    for (index, path) in [&suite.e2e].into_iter().chain(others).enumerate() {
        let place = format!("/vm/tests/{index}");
        root.built(path, Path::new(&place))?;
        let arguments: Vec<String> =
            plan.test_arguments.iter().map(|argument| format!("'{argument}'")).collect();
        writeln!(script, "{place} {} || status=$?", arguments.join(" "))?;
    }
    script.push_str("exit $status\n");
    root.write("vm/run", &script)?;
    let machine = Machine {
        kernel,
        root: root.archive()?,
        arguments: &plan.arguments,
        memory: plan.memory,
        limit: plan.limit,
        console: workspace.target(format!("vm/{folder}/console.log")),
    };
    machine.run(workspace, line)
}
