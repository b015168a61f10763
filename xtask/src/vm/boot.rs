//! A virtual machine: qemu with software emulation, so that it runs wherever CI does.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::kernels::Kernel;
use super::root::Image;
use crate::packages::Private;
use crate::workspace::Workspace;

const QEMU: &str = "qemu-system-x86_64";

/// The parameters of a boot.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) root: Image,
    /// More arguments of the kernel.
    pub(super) arguments: &'a str,
    /// In MiB.
    pub(super) memory: u32,
    pub(super) limit: Duration,
    /// The log of the kernel's messages.
    pub(super) console: PathBuf,
}

/// Ends when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It has already ended if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine<'_> {
    /// Boots, forwards its program's output, and returns the program's exit status.
    pub(super) fn run(&self, workspace: &Workspace, mut line: impl FnMut(&str)) -> Result<i32> {
        let program =
            workspace.which(QEMU).with_context(|| format!("{QEMU} is not there: cargo xtask setup"))?;
        File::create(&self.console).with_context(|| format!("cannot write {}", self.console.display()))?;
        // It ends with the thread that waits for it, even if this process is killed.
        let mut qemu = workspace.command("setpriv");
        qemu.args(["--pdeathsig", "KILL"]).arg(program);
        // The path of its firmware, if it was not installed.
        let private = Private::new(workspace);
        for firmware in ["/usr/share/qemu", "/usr/share/seabios"].iter().filter_map(|path| private.file(path))
        {
            qemu.arg("-L").arg(firmware);
        }
        qemu.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max", "-smp", "2"]);
        qemu.arg("-m").arg(self.memory.to_string());
        qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        qemu.arg("-serial").arg(format!("file:{}", self.console.display()));
        qemu.args(["-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output"]);
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(&self.root.0);
        let fixed = "console=ttyS0 panic=-1 loglevel=4 mitigations=off";
        qemu.arg("-append").arg(format!("{fixed} {}", self.arguments));
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut qemu = Qemu(qemu.spawn().context("cannot run qemu")?);
        let stdout = qemu.0.stdout.take().context("qemu has no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()).is_err() {
                    break;
                }
            }
        });
        let started = Instant::now();
        loop {
            match lines.recv_timeout(self.limit.saturating_sub(started.elapsed())) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no end after {:?}\n{}", self.limit, self.last_messages())
                }
            }
        }
        qemu.0.wait()?;
        self.status().with_context(|| format!("the machine ended without a word\n{}", self.last_messages()))
    }

    fn status(&self) -> Option<i32> {
        let console = String::from_utf8_lossy(&fs::read(&self.console).ok()?).into_owned();
        console.lines().rev().find_map(|line| line.trim().strip_prefix("vm-status: ")?.parse().ok())
    }

    fn last_messages(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}
