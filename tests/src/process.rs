//! A long-running child process in a network namespace and a cgroup.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::{signals, wait};

const PATIENCE: Duration = Duration::from_secs(30);

/// A child process; dropping it sends SIGTERM, and SIGKILL if it does not end.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a command, with its output in the file `log`.
    pub fn spawn(
        name: &str,
        mut command: Command,
        netns: &Netns,
        cgroup: &Cgroup,
        log: &Path,
    ) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let entrance = cgroup.entrance()?;
        // A group of its own, so that Ctrl-C on the terminal does not reach it: its guard ends it in order.
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        // SAFETY: the closure runs between fork and exec and makes system calls only.
        unsafe {
            command.pre_exec(move || {
                signals::reset_mask()?;
                nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
                (&entrance).write_all(b"0")
            })
        };
        let namespace = netns.descriptor().try_clone()?;
        let child = on_spawner(move || {
            let home = File::open("/proc/thread-self/ns/net")?;
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            let child = command.spawn();
            // The thread must not hold the namespace, which would then outlive its last process.
            setns(&home, CloneFlags::CLONE_NEWNET)?;
            child
        })?;
        let child = child.with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Fails with the end of its log if it is no longer running.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}\n{}", self.name, self.last_lines()),
        }
    }

    /// The last lines of its log.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Sends SIGTERM and waits for the end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        if wait::for_cleanup(PATIENCE, || {
            status = self.child.try_wait().transpose();
            status.is_some()
        }) && let Some(status) = status
        {
            return Ok(status?);
        }
        bail!("{} did not end within {PATIENCE:?}\n{}", self.name, self.last_lines())
    }

    /// Waits until a condition holds, or until the process ends.
    pub fn wait_until(&mut self, what: &str, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
        let waited = wait::until_true(what, PATIENCE, || {
            self.must_run()?;
            ready()
        });
        waited.map_err(|error| anyhow!("{error:#}\nlog of {}:\n{}", self.name, self.last_lines()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        if let Err(error) = self.terminate() {
            eprintln!("{error:#}");
            if let Err(error) = self.kill() {
                eprintln!("left behind: process {} ({}): {error:#}", self.pid(), self.name);
            }
        }
    }
}

/// The same file as a process's descriptor.
pub fn descriptor_of(process: i32, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes integers only.
    let process = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    // SAFETY: the call takes integers only.
    descriptor(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just created the descriptor, and we alone own it.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Runs code on the one thread that starts children: the "parent death signal" refers to the parent's thread, and test
/// threads are short-lived.
fn on_spawner<T: Send + 'static>(code: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        Mutex::new(sender)
    });
    let (reply, answer) = mpsc::channel();
    let job = Box::new(move || drop(reply.send(code())));
    spawner
        .lock()
        .map_err(|_| anyhow!("spawner is gone"))?
        .send(job)
        .map_err(|_| anyhow!("spawner is gone"))?;
    answer.recv().context("spawner is gone")
}
