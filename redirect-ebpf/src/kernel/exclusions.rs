//! Peers and ports that are excluded from capture, for every pod of the node or for one.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use aya_ebpf::maps::lpm_trie::{Key, LpmTrie};
use redirect_ebpf::count::Direction;
use redirect_ebpf::family::{Ip, Ipv4, Ipv6};
use redirect_ebpf::maps::{ConfigFlags, ExcludedAddress, ExcludedPort, PodFlags, Scope};

use super::config;

// The agent sets the capacities.
#[map]
static EXCLUDED_IPV4: LpmTrie<ExcludedAddress<[u8; 4]>, u8> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static EXCLUDED_IPV6: LpmTrie<ExcludedAddress<[u8; 16]>, u8> =
    LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static EXCLUDED_PORTS: HashMap<ExcludedPort, u8> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// A family whose excluded addresses are in a trie.
pub(super) trait ExcludedIp: Ip {
    fn contains(scope: Scope, address: Self::Address) -> bool;
}

impl ExcludedIp for Ipv4 {
    #[inline(always)]
    fn contains(scope: Scope, address: [u8; 4]) -> bool {
        EXCLUDED_IPV4.get(Key::new(Scope::BITS + 32, ExcludedAddress { scope, address })).is_some()
    }
}

impl ExcludedIp for Ipv6 {
    #[inline(always)]
    fn contains(scope: Scope, address: [u8; 16]) -> bool {
        EXCLUDED_IPV6.get(Key::new(Scope::BITS + 128, ExcludedAddress { scope, address })).is_some()
    }
}

/// Whether an exclusion covers a connection of the pod with `peer`, to `port` (network order).
#[inline(always)]
pub(super) fn excluded<I: ExcludedIp>(
    netns_cookie: u64,
    flags: PodFlags,
    direction: Direction,
    peer: I::Address,
    port: [u8; 2],
) -> bool {
    let holds = |cookie| {
        let scope = Scope::new(cookie, direction);
        EXCLUDED_PORTS.get_ptr(ExcludedPort { scope, port }).is_some() || I::contains(scope, peer)
    };
    (config::flags().contains(ConfigFlags::EXCLUSIONS) && holds(0))
        || (flags.contains(PodFlags::EXCLUSIONS) && holds(netns_cookie))
}
