//! Settings of the node. The agent writes them.

use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use redirect_ebpf::maps::{Config, ConfigFlags};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

#[inline(always)]
pub(super) fn flags() -> ConfigFlags {
    // SAFETY: the entry is only read, and an aligned u64 is never seen half-written.
    CONFIG.get_ptr(0).map_or(ConfigFlags(0), |config| ConfigFlags(unsafe { (*config).flags } as u32))
}

/// Placement `node`: the ingress device, through which packets reach the proxy.
#[inline(always)]
pub(super) fn ingress_device() -> u32 {
    // SAFETY: as above.
    CONFIG.get_ptr(0).map_or(0, |config| unsafe { (*config).ingress_device } as u32)
}

/// Cookie of the host's network namespace.
#[inline(always)]
pub(super) fn host_cookie() -> Option<u64> {
    // SAFETY: as above.
    CONFIG.get_ptr(0).map(|config| unsafe { (*config).host_cookie })
}
