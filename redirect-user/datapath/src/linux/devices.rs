//! Finds the host's devices that lead to a pod. Each end of a veth pair names the index and the namespace of the
//! other one, so the names that CNI plugins give them do not matter.

use std::io;

use crate::facts::{Devices, LOOPBACK_INDEX};
use redirect_linux::netlink::{Device, Netlink};
use redirect_linux::netns::NetNs;

/// How a pod's interface is linked.
enum Linked {
    /// To the end of a veth pair with this index, in the host's namespace.
    Host(u32),
    /// To nothing outside the pod.
    Inside,
    /// To something outside the pod that is not ours to capture at.
    Elsewhere,
}

/// The devices of a pod. `netlink` is a socket in the host's namespace, where the calling thread is.
pub(super) fn of(pod: &NetNs, host: &NetNs, netlink: &mut Netlink) -> io::Result<Devices> {
    let (devices, host_id) = pod.run(|| {
        let mut pod = Netlink::open()?;
        io::Result::Ok((pod.devices()?, pod.namespace_id(host)?))
    })??;
    lead_to(&devices, host_id, &[], netlink)
}

/// Where the devices of a pod lead. `host_id` is the ID of the host's namespace in the pod's, `known` are the indices of the host's
/// ends that were the pod's so far; `netlink` is a socket in the host's namespace.
pub(super) fn lead_to(
    devices: &[Device],
    host_id: i32,
    known: &[u32],
    netlink: &mut Netlink,
) -> io::Result<Devices> {
    let mut found = Devices::default();
    for device in devices {
        match linked(device, host_id) {
            _ if device.interface.index == LOOPBACK_INDEX => {}
            Linked::Host(index) => found.ends.extend(netlink.interface(index)?),
            Linked::Elsewhere if device.up => found.unreachable.push(device.interface.name.clone()),
            Linked::Elsewhere | Linked::Inside => {}
        }
    }
    for index in known {
        if !found.ends.iter().any(|end| end.index == *index) {
            found.strayed.extend(netlink.interface(*index)?);
        }
    }
    Ok(found)
}

fn linked(device: &Device, host_id: i32) -> Linked {
    match (device.kind.as_deref(), device.peer, device.namespace) {
        (Some("veth"), Some(index), Some(id)) if id == host_id => Linked::Host(index),
        // A device of hardware, moved into the pod.
        (None, ..) | (_, _, Some(_)) => Linked::Elsewhere,
        (Some(_), _, None) => Linked::Inside,
    }
}
