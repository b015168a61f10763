//! Address families that the kernel supports.

use std::path::Path;

use super::{Check, Requirements};

pub(super) fn checks(_: &Requirements) -> Vec<Check> {
    // Missing with `ipv6.disable=1`, and in kernels built without IPv6.
    if Path::new("/proc/net/if_inet6").exists() {
        return vec![Check::ok("IPv6", "on")];
    }
    vec![Check::warn(
        "IPv6",
        "off in this kernel: pods have IPv4 only",
        "for IPv6, boot without ipv6.disable=1",
    )]
}
