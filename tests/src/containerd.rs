//! Containers by containerd and `ctr run --cni`, whose network is the chain of a configuration directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::cgroup::{Cgroup, PREFIX};
use crate::node::Node;
use crate::process::Process;
use crate::wait::{self, SOON};

/// `ctr` has fixed paths for configurations and plugins, and containerd keeps sockets in `/run/containerd`: a mount
/// namespace gives both their own directories there.
const PLACES: &str = "set -e; mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /etc; mount -t tmpfs tmpfs /opt; \
                      mkdir -p /etc/cni/net.d /opt/cni/bin; mount --bind \"$1\" /etc/cni/net.d; \
                      mount --bind \"$2\" /opt/cni/bin; exec containerd --config \"$3\"";

/// A containerd with directories, mounts and a cgroup of its own. Its containers end with this value.
#[derive(Debug)]
pub struct Containerd {
    node: Arc<Node>,
    // Fields are dropped in this order.
    daemon: Process,
    cgroup: Cgroup,
    directory: TempDir,
}

impl Containerd {
    /// On this node, with these directories of CNI configurations and plugins.
    pub fn start(node: &Arc<Node>, configurations: &Path, plugins: &Path) -> Result<Self> {
        // The paths of its sockets must be short, so that it is not below the session's directory.
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir()?;
        let path = |name: &str| directory.path().join(name);
        let configuration = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            path("root"),
            path("state"),
            path("sock")
        );
        fs::write(path("config.toml"), configuration)?;
        make_root(&path("busybox"))?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", PLACES, "sh"]);
        command.args([configurations, plugins, &path("config.toml")]);
        let cgroup = node.session().cgroup().child("containerd")?;
        let daemon = Process::spawn("containerd", command, node.netns(), &cgroup, &path("log"))?;
        let mut containerd = Self { node: node.clone(), daemon, cgroup, directory };
        wait::until_true("containerd", SOON, || {
            containerd.daemon.must_run()?;
            Ok(containerd.directory.path().join("sock").exists() && containerd.ctr(&["version"]).is_ok())
        })?;
        Ok(containerd)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `ctr` among containerd's mounts.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.daemon.pid())).args(["ctr", "--address"]);
        command.arg(self.path("sock")).args(arguments);
        command
    }

    /// Runs `ctr` in the node's network namespace.
    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        Ok(String::from_utf8(self.node.netns().output(self.command(arguments), b"")?)?)
    }

    /// Starts a container that contains only busybox. Returns the process of `ctr run`, which calls the chain's DEL
    /// when the container has ended; it would not if it ran detached (`--detach`).
    pub fn run(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let root = self.path("busybox");
        let root = root.to_str().context("a path in UTF-8")?;
        // Its cgroup is below the root, by this name.
        let name = id(name);
        let options = ["run", "--rm", "--null-io", "--cni", "--cgroup", "", "--rootfs", root, &name];
        let command = self.command(&[&options, arguments].concat());
        let log = self.path(&format!("{name}.log"));
        let mut run = Process::spawn(&name, command, self.node.netns(), &self.cgroup, &log)?;
        run.wait_until("container", || Ok(self.ctr(&["task", "ls"])?.contains("RUNNING")))?;
        Ok(run)
    }

    /// Runs busybox in a container. `ctr` may lose the output of a process that ends at once, but not its
    /// exit status.
    pub fn busybox(&self, name: &str, arguments: &[&str]) -> Result<()> {
        // `ctr` does not forward the end of its own input.
        let shell = ["/bin/busybox", "sh", "-c", "exec /bin/busybox \"$@\" </dev/null", "sh"];
        let id = id(name);
        let exec = [&["task", "exec", "--exec-id", "client", &id][..], &shell].concat();
        self.ctr(&[&exec, arguments].concat()).map(drop)
    }

    /// Kills a container, and waits until `ctr run` has cleaned up.
    pub fn end(&self, name: &str, mut run: Process) -> Result<()> {
        self.ctr(&["task", "kill", "--signal", "SIGKILL", &id(name)])?;
        wait::until_true("end of ctr run", SOON, || Ok(run.must_run().is_err()))
    }

    /// What containerd printed.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.log()
    }
}

/// No other test has a container of this ID.
fn id(name: &str) -> String {
    format!("{PREFIX}{}-{name}", std::process::id())
}

fn make_root(root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "proc", "sys", "etc", "tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    let busybox = busybox.into_iter().find(|path| path.exists()).context("busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    Ok(())
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let containers = self.ctr(&["container", "ls", "--quiet"]).unwrap_or_default();
        for id in containers.lines() {
            let removed = self.ctr(&["task", "rm", "--force", id]).and(self.ctr(&["container", "rm", id]));
            if let Err(error) = removed {
                eprintln!("left behind: container {id}: {error:#}");
            }
        }
        // No shim may stay, whatever happened.
        if let Err(error) = self.cgroup.kill() {
            eprintln!("shims may be left behind: {error:#}");
        }
    }
}
