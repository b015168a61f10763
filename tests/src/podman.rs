//! Containers by podman, whose network is the chain of a configuration directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::cgroup::PREFIX;
use crate::node::Node;

/// The image of applications: only busybox.
pub const BUSYBOX: &str = "localhost/busybox:test";

/// Options for every container: a limit on its lifetime, in case its test is killed, and resource limits, because
/// podman's defaults may exceed those of this machine.
pub const FIXED: [&str; 4] =
    ["--pull=never", "--timeout=600", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"];

/// A podman with storage of its own. Its containers end with this value.
#[derive(Debug)]
pub struct Podman {
    directory: TempDir,
    node: Arc<Node>,
}

impl Podman {
    /// On this node, with these directories of CNI configurations and plugins.
    pub fn new(node: &Arc<Node>, configurations: &Path, plugins: &Path) -> Result<Self> {
        // Podman needs short paths, so it is not below the session's directory.
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir()?;
        let configuration = format!(
            "[network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = {configurations:?}\ncni_plugin_dirs = [{plugins:?}]\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nruntime = \"runc\"\nevents_logger = \"none\"\n"
        );
        fs::write(directory.path().join("containers.conf"), configuration)?;
        Ok(Self { directory, node: node.clone() })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let path = |name: &str| self.directory.path().join(name);
        let mut command = Command::new("podman");
        command.env("CONTAINERS_CONF", path("containers.conf"));
        command.arg("--root").arg(path("storage")).arg("--runroot").arg(path("run"));
        command.args(["--storage-driver", "vfs"]).args(arguments);
        command
    }

    /// Runs podman in the node's namespace.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.node.netns().output(self.command(arguments), b"")?;
        Ok(String::from_utf8(output)?.trim().to_owned())
    }

    /// Loads an image archive; returns its name.
    pub fn load(&self, archive: &Path) -> Result<String> {
        let archive = archive.to_str().context("a path in UTF-8")?;
        let said = self.run(&["load", "--quiet", "--input", archive])?;
        said.split_whitespace().last().map(str::to_owned).with_context(|| format!("podman load: {said}"))
    }

    /// Creates the image of applications.
    pub fn make_busybox(&self) -> Result<()> {
        let root = self.directory.path().join("root");
        fs::create_dir_all(root.join("bin"))?;
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
        let busybox = busybox.into_iter().find(|path| path.exists()).context("busybox-static")?;
        fs::copy(busybox, root.join("bin/busybox"))?;
        let archive = self.directory.path().join("busybox.tar");
        let tar = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".").status()?;
        anyhow::ensure!(tar.success(), "tar: {tar}");
        self.run(&["import", "--quiet", archive.to_str().context("a path in UTF-8")?, BUSYBOX]).map(drop)
    }

    /// Starts a container.
    pub fn start(&self, name: &str, options: &[&str], image: &str, arguments: &[&str]) -> Result<()> {
        self.run(&[&["run", "--detach", "--name", name], &FIXED[..], options, &[image], arguments].concat())
            .map(drop)
    }

    /// Runs busybox in a container.
    pub fn busybox(&self, name: &str, arguments: &[&str]) -> Result<String> {
        self.run(&[&["exec", name, "/bin/busybox"], arguments].concat())
    }

    /// The output of a container.
    pub fn logs(&self, name: &str) -> String {
        let output = self.node.netns().execute(self.command(&["logs", name]), b"");
        output.map_or_else(
            |error| format!("{error:#}"),
            |output| String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        )
    }

    /// Stops a container as Kubernetes does.
    pub fn stop(&self, name: &str) -> Result<()> {
        self.run(&["stop", "--time", "20", name]).map(drop)
    }

    /// A container's addresses in a network.
    pub fn addresses(&self, name: &str, network: &str) -> Result<[std::net::IpAddr; 2]> {
        let inspected: Value = serde_json::from_str(&self.run(&["inspect", name])?)?;
        let network = &inspected[0]["NetworkSettings"]["Networks"][network];
        let address = |key: &str| -> Result<std::net::IpAddr> {
            let text = network[key].as_str().with_context(|| format!("{name} has no {key}: {network}"))?;
            Ok(text.parse()?)
        };
        Ok([address("IPAddress")?, address("GlobalIPv6Address")?])
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        if let Err(error) = self.run(&["rm", "--all", "--force", "--time", "2"]) {
            eprintln!("containers are left behind: {error:#}");
        }
    }
}

/// The podman options that run a DaemonSet's container as the kubelet would: its security context, namespaces, mounts,
/// environment and arguments. Fails if a part of the security context has no translation. `profiles` is the kubelet's
/// directory of seccomp profiles.
pub fn options_of(daemonset: &Value, profiles: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let pod = &daemonset["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let mut options = Vec::new();
    if pod["hostNetwork"] == true {
        options.push("--network=host".to_owned());
    }
    if pod["hostPID"] == true {
        options.push("--pid=host".to_owned());
    }
    security(&container["securityContext"], profiles, &mut options)?;
    for volume in list(&pod["volumes"]) {
        options.push(mount(volume, container)?);
    }
    for variable in list(&container["env"]) {
        let name = variable["name"].as_str().context("a name")?;
        let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            Some("spec.nodeName") => "node",
            Some("metadata.namespace") => "ambient-redirect",
            Some(field) => bail!("unknown field {field}"),
            None => variable["value"].as_str().context("a value")?,
        };
        options.push(format!("--env={name}={value}"));
    }
    if let Some(limit) = container["resources"]["limits"]["memory"].as_str() {
        options.push(format!("--memory={}", limit.replace("Mi", "m")));
    }
    let arguments =
        list(&container["args"]).iter().filter_map(|argument| argument.as_str().map(str::to_owned));
    Ok((options, arguments.collect()))
}

fn security(context: &Value, profiles: &Path, options: &mut Vec<String>) -> Result<()> {
    for (key, value) in context.as_object().context("a security context")? {
        match (key.as_str(), value) {
            ("privileged", Value::Bool(false)) | ("runAsNonRoot", Value::Bool(false)) => {}
            ("allowPrivilegeEscalation", Value::Bool(false)) => {
                options.push("--security-opt=no-new-privileges".to_owned());
            }
            ("readOnlyRootFilesystem", Value::Bool(true)) => {
                options.extend(["--read-only".to_owned(), "--read-only-tmpfs=false".to_owned()]);
            }
            ("runAsUser", Value::Number(user)) => {
                options.push(format!("--user={user}:{}", context["runAsGroup"]));
            }
            ("runAsGroup", _) => {}
            ("capabilities", capabilities) => {
                for (verb, flag) in [("drop", "--cap-drop"), ("add", "--cap-add")] {
                    let names = list(&capabilities[verb]).iter().filter_map(Value::as_str);
                    options.extend(names.map(|name| format!("{flag}={name}")));
                }
            }
            // Podman's default, as in other runtimes: it allows what the capabilities allow.
            ("seccompProfile", profile) if profile["type"] == "RuntimeDefault" => {}
            ("seccompProfile", profile) if profile["type"] == "Localhost" => {
                let name = profile["localhostProfile"].as_str().context("the profile's name")?;
                options.push(seccomp(&profiles.join(name)));
            }
            ("appArmorProfile", profile) if profile["type"] == "Unconfined" => {
                options.push("--security-opt=apparmor=unconfined".to_owned());
            }
            _ => bail!("{key}: {value} can't be translated"),
        }
    }
    Ok(())
}

/// The option that applies this seccomp profile.
#[must_use]
pub fn seccomp(profile: &Path) -> String {
    format!("--security-opt=seccomp={}", profile.display())
}

fn mount(volume: &Value, container: &Value) -> Result<String> {
    let name = &volume["name"];
    let source =
        volume["hostPath"]["path"].as_str().with_context(|| format!("volume {name} is no hostPath"))?;
    if volume["hostPath"]["type"] == "DirectoryOrCreate" {
        fs::create_dir_all(source)?;
    }
    let mounts = list(&container["volumeMounts"]);
    let mount = mounts
        .iter()
        .find(|mount| mount["name"] == *name)
        .with_context(|| format!("{name} is not mounted"))?;
    let target = mount["mountPath"].as_str().context("a path")?;
    let access = if mount["readOnly"] == true { "ro" } else { "rw" };
    let propagation = match mount["mountPropagation"].as_str() {
        None => "rprivate",
        Some("HostToContainer") => "rslave",
        Some(other) => bail!("{other} can't be translated"),
    };
    Ok(format!("--volume={source}:{target}:{access},rbind,{propagation}"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
