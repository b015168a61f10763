//! Checks the sysctls that enrollment needs, and the relevant ones of the node.

use std::fs;
use std::path::Path;

use super::{Check, Requirements};
use redirect_datapath::facts::Sysctl;

pub(super) fn checks(_: &Requirements) -> Vec<Check> {
    vec![of_pods(), jit(), syn_cookies()]
}

/// Each namespace has its own: if this one has them, so do pods'.
fn of_pods() -> Check {
    let ipv6 = Path::new("/proc/net/if_inet6").exists();
    let wanted = Sysctl::ALL.into_iter().map(Sysctl::name).filter(|name| ipv6 || !name.contains("ipv6"));
    let (there, missing): (Vec<_>, Vec<_>) =
        wanted.partition(|name| Path::new("/proc/sys").join(name.replace('.', "/")).exists());
    if missing.is_empty() {
        return Check::ok("sysctls of pods", there.join(", "));
    }
    Check::broken(
        "sysctls of pods",
        format!("the kernel lacks {}: pods cannot be enrolled", missing.join(", ")),
        "Linux 5.14 has all of them; in a container, /proc/sys/net has to be the kernel's",
    )
}

fn jit() -> Check {
    match read("net/core/bpf_jit_enable") {
        Some(0) => Check::warn(
            "net.core.bpf_jit_enable",
            "0: the kernel interprets programs, which makes each packet several times as expensive",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(value) => Check::ok("net.core.bpf_jit_enable", value.to_string()),
        None => Check::ok("net.core.bpf_jit_enable", "absent: this kernel always compiles programs"),
    }
}

fn syn_cookies() -> Check {
    match read("net/ipv4/tcp_syncookies") {
        Some(0) => Check::warn(
            "net.ipv4.tcp_syncookies",
            "0: a SYN flood keeps clients out of pods whose namespaces have the same setting",
            "sysctl -w net.ipv4.tcp_syncookies=1",
        ),
        Some(value) => Check::ok("net.ipv4.tcp_syncookies", value.to_string()),
        None => Check::ok("net.ipv4.tcp_syncookies", "not there"),
    }
}

fn read(name: &str) -> Option<i64> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}
