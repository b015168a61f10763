//! Finds the host's devices that lead to a pod. Each end of a veth pair has the index and namespace of its peer,
//! so the names that CNI plugins choose do not matter.

use std::io;

use crate::facts::{Devices, LOOPBACK_INDEX};
use redirect_linux::netlink::{Device, Netlink};
use redirect_linux::netns::NetNs;

/// The other end of a pod's interface.
enum Linked {
    /// The end of a veth pair with this index, in the host's namespace.
    Host(u32),
    /// Nothing outside the pod.
    Inside,
    /// Something outside the pod where this project can't capture.
    Elsewhere,
}

/// The devices of a pod. `netlink` is a socket in the host's namespace, and the calling thread is there as
/// well.
pub(super) fn of(pod: &NetNs, host: &NetNs, netlink: &mut Netlink) -> io::Result<Devices> {
    let (devices, host_id) = pod.run(|| {
        let mut pod = Netlink::open()?;
        io::Result::Ok((pod.devices()?, pod.namespace_id(host)?))
    })??;
    lead_to(&devices, host_id, &[], netlink)
}

/// The devices that lead out of a pod. `host_id` is the ID of the host's namespace in the pod's, `known` are the indices of the
/// host ends that the pod has had so far; `netlink` is a socket in the host's namespace.
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
        // A hardware device that was moved into the pod.
        (None, ..) | (_, _, Some(_)) => Linked::Elsewhere,
        (Some(_), _, None) => Linked::Inside,
    }
}
