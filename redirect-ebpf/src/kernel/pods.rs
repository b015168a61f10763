//! The maps of enrolled pods. The agent writes them.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use redirect_ebpf::family::{Ip, Ipv4, Ipv6, v4_mapped};
use redirect_ebpf::maps::{Pod, PodAddress, PodFlags};

// The agent sets the capacities when it loads the object (`--max-pods`).
#[map]
static PODS: HashMap<u64, Pod> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static POD_IPV4: HashMap<[u8; 4], PodAddress> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map]
static POD_IPV6: HashMap<[u8; 16], PodAddress> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// The host ends of the devices of enrolled pods, in placement `node`.
#[map]
static INTERFACES: HashMap<u32, PodAddress> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// The pod behind a device of the host: the cookie of its network namespace, and its flags.
#[inline(always)]
pub(super) fn behind(interface: u32) -> Option<(u64, PodFlags)> {
    // SAFETY: the entry is only read, and an aligned u64 is never seen half-written.
    let cookie = INTERFACES.get_ptr(interface).map(|owner| unsafe { (*owner).netns_cookie })?;
    Some((cookie, flags(cookie)?))
}

/// A family whose pod addresses are in a map.
pub(super) trait PodIp: Ip {
    /// Cookie of the network namespace of the pod that owns the address.
    fn owner(address: &Self::Address) -> Option<u64>;
    /// The first address of a pod, or the unspecified address.
    ///
    /// # Safety
    ///
    /// `pod` is an entry of [`PODS`].
    unsafe fn first(pod: *const Pod) -> Self::Address;
}

impl PodIp for Ipv4 {
    #[inline(always)]
    fn owner(address: &Self::Address) -> Option<u64> {
        // SAFETY: the entry is only read, and an aligned u64 is never seen half-written.
        POD_IPV4.get_ptr(address).map(|owner| unsafe { (*owner).netns_cookie })
    }

    #[inline(always)]
    unsafe fn first(pod: *const Pod) -> Self::Address {
        // SAFETY: the caller passes an entry, and an aligned word is never seen half-written.
        unsafe { (*pod).ipv4 }
    }
}

impl PodIp for Ipv6 {
    #[inline(always)]
    fn owner(address: &Self::Address) -> Option<u64> {
        // SAFETY: as above.
        POD_IPV6.get_ptr(address).map(|owner| unsafe { (*owner).netns_cookie })
    }

    #[inline(always)]
    unsafe fn first(pod: *const Pod) -> Self::Address {
        // SAFETY: the caller passes an entry. A read during an update returns at worst an address that the pod doesn't have,
        // to which no socket can be bound.
        unsafe { (*pod).ipv6 }
    }
}

/// Cookie of the network namespace of the pod that owns the address; IPv4 in v4-mapped form.
#[inline(always)]
pub(super) fn owner(address: &[u8; 16]) -> Option<u64> {
    match v4_mapped(*address) {
        Some(address) => Ipv4::owner(&address),
        None => Ipv6::owner(address),
    }
}

/// The flags of the pod whose network namespace has this cookie, if it is enrolled.
#[inline(always)]
pub(super) fn flags(netns_cookie: u64) -> Option<PodFlags> {
    // SAFETY: the entry is only read, and an aligned u32 is never seen half-written.
    PODS.get_ptr(netns_cookie).map(|pod| PodFlags(unsafe { (*pod).flags }))
}

/// The first address of the pod whose network namespace has this cookie, if it is enrolled and has one of the family.
#[inline(always)]
pub(super) fn first_address<I: PodIp>(netns_cookie: u64) -> Option<I::Address> {
    let pod = PODS.get_ptr(netns_cookie)?;
    // SAFETY: the pointer is to an entry.
    let address = unsafe { I::first(pod) };
    // The unspecified address counts as loopback.
    (!I::is_loopback(address)).then_some(address)
}
