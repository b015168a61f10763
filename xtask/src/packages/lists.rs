//! The packages that each task needs.

use super::{Evidence, Package};

/// Pods in network namespaces, with the node's CNI chain.
pub(crate) fn for_pods() -> Vec<Package> {
    const PLUGINS: &[&str] = &["/usr/lib/cni/bridge", "/opt/cni/bin/bridge", "/usr/libexec/cni/bridge"];
    vec![
        Package::new("iproute2", Evidence::Program("ip"), "network namespaces, routes and rules of the pods"),
        Package::new(
            "containernetworking-plugins",
            Evidence::File(PLUGINS),
            "the chain of CNI plugins that makes the pods' networks",
        )
        .in_place(),
    ]
}

/// The additional packages of the benchmark.
pub(crate) fn for_bench() -> Vec<Package> {
    vec![iptables(), nftables()]
}

/// The additional packages of tests.
pub(crate) fn for_tests() -> Vec<Package> {
    const BUSYBOX: &[&str] = &["/bin/busybox", "/usr/bin/busybox"];
    let program = |name: &str, program, reason| Package::new(name, Evidence::Program(program), reason);
    vec![
        iptables(),
        nftables(),
        program("bpftool", "bpftool", "tests list programs, links and maps with it"),
        program("prometheus", "promtool", "tests check metrics and alerts with promtool"),
        program("bind9-dnsutils", "dig", "tests ask DNS servers with dig"),
        program("ldnsutils", "drill", "tests ask DNS servers with drill"),
        program("haproxy", "haproxy", "the node proxy of some tests"),
        // It has fixed paths for its settings and helpers.
        program("podman", "podman", "the DaemonSet's pod is run as a container").in_place(),
        program("runc", "runc", "podman and containerd run containers with it"),
        program("containerd", "containerd", "tests run containers with its ctr"),
        Package::new("busybox-static", Evidence::File(BUSYBOX), "the content of the tests' containers")
            .in_place(),
        program("systemd", "systemd-analyze", "tests have it verify units").in_place(),
        // A script with a fixed path of its settings.
        program(
            "musl-tools",
            "musl-gcc",
            "tests ask DNS servers with musl's resolver, in a program that they compile",
        )
        .in_place(),
    ]
}

/// The packages for tests on other kernels.
pub(crate) fn for_machines() -> Vec<Package> {
    const AUTHORITIES: &[&str] = &["/etc/ssl/certs/ca-certificates.crt"];
    const REASON: &str = "tests boot other kernels with it";
    let program = |name: &str, program| Package::new(name, Evidence::Program(program), REASON);
    vec![
        program("qemu-system-x86", "qemu-system-x86_64"),
        program("cpio", "cpio"),
        program("kmod", "modprobe"),
        program("xz-utils", "xz"),
        program("zstd", "zstd"),
        program("binutils", "strip"),
        Package::new("ca-certificates", Evidence::File(AUTHORITIES), REASON).in_place(),
    ]
}

/// The packages that check this repository's scripts.
pub(crate) fn for_scripts() -> Vec<Package> {
    vec![Package::new("shellcheck", Evidence::Program("shellcheck"), "lints the scripts of this repository")]
}

/// The names of its programs are created at installation, and it opens files at a fixed path.
fn iptables() -> Package {
    Package::new(
        "iptables",
        Evidence::Program("iptables-restore"),
        "rules that others have, and what we are compared with",
    )
    .in_place()
}

fn nftables() -> Package {
    Package::new(
        "nftables",
        Evidence::Program("nft"),
        "rules that others have, and what we are compared with",
    )
}
