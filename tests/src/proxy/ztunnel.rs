//! A ztunnel without a control plane: it reads its pods from a file once, when it starts.

use std::fs;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::{Setup, Tunnelled};
use crate::agent;

/// How many pods of a node it knows by name.
const KNOWN: u32 = 2048;

/// Pods with names of their own, by namespace and name.
const OTHERS: [(&str, &str); 4] =
    [("default", "sleep"), ("dual-stack", "tcp-echo"), ("ipv4", "tcp-echo"), ("ipv6", "tcp-echo")];

/// A name that it knows.
pub(super) fn pod_name(number: u32) -> String {
    format!("pod-{number}")
}

pub(super) fn command(binary: &Path, setup: &Setup<'_>) -> Result<Command> {
    let file = |name: &str| setup.dir.join(format!("proxy-{:03}.{name}", setup.number));
    let (workloads, resolv_conf) = (file("workloads.yaml"), file("resolv.conf"));
    write(&workloads, &workloads_file(setup.tunnelled).to_string())?;
    let servers = setup.dns_servers.iter().map(|server| format!("nameserver {}\n", server.ip()));
    write(&resolv_conf, &servers.collect::<String>())?;

    let mut command = Command::new(binary);
    command.env_clear();
    command.env("INPOD_UDS", agent::zds_socket(setup.dir)).env("LOCAL_XDS_PATH", workloads);
    command.envs([
        ("PROXY_MODE", "shared"),
        ("NODE_NAME", NODE),
        ("CLUSTER_ID", CLUSTER),
        ("XDS_ADDRESS", ""),
        ("CA_ADDRESS", ""),
        ("FAKE_CA", "true"),
        ("LOG_FORMAT", "json"),
        // Opened connections are logged at this level only.
        ("RUST_LOG", "info,access=debug,dns=debug"),
    ]);
    command.env("CONNECTION_TERMINATION_DEADLINE", format!("{}s", setup.drain));
    command.envs(setup.environment.iter().map(|(name, value)| (name, value)));
    // It queries the servers of the node's resolv.conf, from the pods.
    let resolv_conf = std::ffi::CString::new(resolv_conf.as_os_str().as_encoded_bytes())?;
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe {
        command.pre_exec(move || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let nothing = None::<&str>;
            mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
            mount(Some(resolv_conf.as_c_str()), c"/etc/resolv.conf", nothing, MsFlags::MS_BIND, nothing)?;
            Ok(())
        })
    };
    Ok(command)
}

const NODE: &str = "node";
const CLUSTER: &str = "test";

/// Pods without a tunnel have no addresses here, so ztunnel passes their connections through.
fn workloads_file(tunnelled: &[Tunnelled]) -> Value {
    let plain = (0..KNOWN).map(pod_name).filter(|name| tunnelled.iter().all(|pod| pod.name != *name));
    let workloads: Vec<Value> = plain
        .map(|name| workload(("default", &name), "TCP", &[]))
        .chain(OTHERS.iter().map(|name| workload(*name, "TCP", &[])))
        .chain(tunnelled.iter().map(|pod| workload(("default", &pod.name), "HBONE", &pod.addresses)))
        .collect();
    // JSON is valid YAML.
    json!({"workloads": workloads, "policies": [], "services": []})
}

fn workload((namespace, name): (&str, &str), protocol: &str, addresses: &[IpAddr]) -> Value {
    json!({
        "uid": format!("{CLUSTER}//Pod/{namespace}/{name}"),
        "name": name, "namespace": namespace, "serviceAccount": "", "node": NODE, "network": "",
        "workloadIps": addresses, "protocol": protocol, "services": {},
    })
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
