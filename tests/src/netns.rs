//! A network namespace, and code that runs in it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::{panic, thread};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use redirect_ebpf::Family;

/// A network namespace, held by a descriptor: it ends with its last process and this value.
#[derive(Debug)]
pub struct Netns {
    name: String,
    descriptor: OwnedFd,
}

impl Netns {
    /// Creates a namespace with `lo` up and duplicate address detection off, so that IPv6 addresses are usable
    /// at once.
    pub fn new(name: &str) -> Result<Self> {
        let descriptor = thread::scope(|scope| {
            let made = scope.spawn(|| -> Result<OwnedFd> {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Ok(File::open("/proc/thread-self/ns/net")?.into())
            });
            made.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        });
        let netns = Self {
            name: name.to_owned(),
            descriptor: descriptor.with_context(|| format!("make network namespace {name}"))?,
        };
        for scope in ["all", "default"] {
            netns.set_sysctl_if_any(&format!("net.ipv6.conf.{scope}.accept_dad"), "0")?;
        }
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// A name for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor.
    #[must_use]
    pub fn descriptor(&self) -> &OwnedFd {
        &self.descriptor
    }

    /// A path that a CNI plugin can open: what a container runtime passes as `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd()))
    }

    /// Runs code on a thread inside the namespace. Sockets created there stay in the namespace.
    pub fn run<T: Send>(&self, code: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let entered = scope.spawn(|| -> nix::Result<T> {
                setns(&self.descriptor, CloneFlags::CLONE_NEWNET)?;
                Ok(code())
            });
            entered.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
        .with_context(|| format!("enter network namespace {}", self.name))
    }

    /// Moves the calling thread there until the visit ends.
    pub fn visit(&self) -> Result<Visit> {
        let home = File::open("/proc/thread-self/ns/net")?.into();
        setns(&self.descriptor, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))?;
        Ok(Visit { home })
    }

    /// Runs a short command inside the namespace to its end.
    pub fn execute(&self, mut command: Command, input: &[u8]) -> Result<Output> {
        let what = format!("{command:?} in {}", self.name);
        let output = self.run(move || -> std::io::Result<Output> {
            let mut child =
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // A command that ends without reading reports the reason by its status.
                let _ = stdin.write_all(input);
            }
            child.wait_with_output()
        })?;
        output.context(what)
    }

    /// As [`Netns::execute`]; the standard output of a command that must succeed.
    pub fn output(&self, command: Command, input: &[u8]) -> Result<Vec<u8>> {
        let what = format!("{command:?} in {}", self.name);
        let output = self.execute(command, input)?;
        ensure!(
            output.status.success(),
            "{what}: {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(output.stdout)
    }

    /// Runs `ip` with arguments that are separated by blanks.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(arguments.split_whitespace());
        Ok(String::from_utf8(self.output(command, b"")?)?)
    }

    /// Runs `ip -batch` with one command a line.
    pub fn ip_batch(&self, lines: &[String]) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]);
        self.output(command, lines.join("\n").as_bytes())?;
        Ok(())
    }

    /// The output of a command that prints JSON; nothing printed counts as an empty list.
    pub fn json(&self, command: &str) -> Result<serde_json::Value> {
        let mut words = command.split_whitespace();
        let mut process = Command::new(words.next().context("empty command")?);
        process.args(words);
        let output = self.output(process, b"")?;
        if output.trim_ascii().is_empty() {
            return Ok(serde_json::Value::Array(Vec::new()));
        }
        serde_json::from_slice(&output).with_context(|| format!("{command}: not JSON"))
    }

    /// Removes the filters of a device whose programs are of a family, by their names.
    pub fn delete_filters(&self, device: &str, side: &str, family: Family) -> Result<()> {
        let of_family = format!("_{}", family.to_string().to_lowercase());
        let filters = self.json(&format!("tc -j filter show dev {device} {side}"))?;
        let handles = filters.as_array().into_iter().flatten().filter_map(|filter| {
            let options = &filter["options"];
            options["bpf_name"].as_str()?.contains(&of_family).then(|| options["handle"].as_str())?
        });
        for handle in handles {
            self.json(&format!("tc filter del dev {device} {side} pref 1 handle {handle} bpf"))?;
        }
        Ok(())
    }

    /// Sets a sysctl, `.` between the parts of its name.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = sysctl_path(name);
        self.run(|| fs::write(&path, value))?.with_context(|| format!("{}: {name}={value}", self.name))
    }

    /// As [`Netns::set_sysctl`], if the kernel has it: IPv6 may be off, and modules may not be loaded.
    pub fn set_sysctl_if_any(&self, name: &str, value: &str) -> Result<()> {
        if self.has_sysctl(name)? { self.set_sysctl(name, value) } else { Ok(()) }
    }

    /// Reads a sysctl. The kernel returns a list in the first read only, up to the buffer's size.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        let path = sysctl_path(name);
        let mut value = vec![0; 1 << 18];
        let length = self.run(|| fs::File::open(&path)?.read(&mut value))?;
        let length = length.with_context(|| format!("{}: {name}", self.name))?;
        Ok(String::from_utf8(value[..length].to_vec())?.trim().to_owned())
    }

    /// Whether the kernel has a sysctl.
    pub fn has_sysctl(&self, name: &str) -> Result<bool> {
        let path = sysctl_path(name);
        self.run(|| fs::exists(&path))?.with_context(|| format!("{}: {name}", self.name))
    }

    /// A number that the kernel keeps in a file of `/proc/net` (`snmp`, `netstat`), by its group and name.
    pub fn statistic(&self, file: &str, group: &str, name: &str) -> Result<u64> {
        let path = format!("/proc/thread-self/net/{file}");
        let text = self.run(|| fs::read_to_string(&path))?.with_context(|| path.clone())?;
        // Each group has a line of names and a line of numbers.
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
        let (names, numbers) = lines.next().zip(lines.next()).context("a group of statistics")?;
        let place = names.split(' ').position(|known| known == name);
        let number = place.and_then(|place| numbers.split(' ').nth(place));
        Ok(number.with_context(|| format!("{name} in {group} of {path}"))?.parse()?)
    }

    /// A number of `/proc/net/snmp6`, by its name.
    pub fn statistic_ipv6(&self, name: &str) -> Result<u64> {
        let text = self.run(|| fs::read_to_string("/proc/thread-self/net/snmp6"))??;
        let number = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(number.with_context(|| format!("{name} in snmp6"))?.trim().parse()?)
    }

    /// The cookie by which BPF programs know the namespace (`SO_NETNS_COOKIE`).
    pub fn cookie(&self) -> Result<u64> {
        let cookie = self.run(redirect_linux::netns::current_cookie)?;
        cookie.with_context(|| format!("cookie of {}", self.name))
    }
}

/// The calling thread is in another namespace while this value lives.
#[derive(Debug)]
pub struct Visit {
    home: OwnedFd,
}

impl Drop for Visit {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            // Any code that runs on this thread from here on would run in the wrong namespace.
            panic!("the thread can't return to its network namespace: {error}");
        }
    }
}

fn sysctl_path(name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/{}", name.replace('.', "/")))
}
