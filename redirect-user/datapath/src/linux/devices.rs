//! Finds the host's devices that lead to a pod, placement `node`. Each end of a veth pair names the index and the namespace of the
//! other one, so the names that CNI plugins give them do not matter.

use std::io;

use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use crate::facts::{Devices, LOOPBACK_INDEX};
use redirect_linux::netlink::{Netlink, interface};
use redirect_linux::netns::NetNs;

/// How a pod's interface is linked.
enum Linked {
    /// To the end of a veth pair with this index, in the host's namespace.
    Host(u32),
    /// To nothing outside the pod.
    Inside,
    /// To something outside the pod that is not ours to steer at.
    Elsewhere,
}

/// The devices of a pod. `netlink` is a socket in the host's namespace, where the calling thread is.
pub(super) fn of(pod: &NetNs, host: &NetNs, netlink: &mut Netlink) -> io::Result<Devices> {
    let (links, host_id) = pod.run(|| {
        let mut pod = Netlink::open()?;
        io::Result::Ok((pod.links()?, pod.namespace_id(host)?))
    })??;
    let mut devices = Devices::default();
    for link in links {
        let up = link.header.flags.contains(LinkFlags::Up);
        match linked(&link, host_id) {
            _ if link.header.index == LOOPBACK_INDEX => {}
            Linked::Host(index) => devices.ends.extend(netlink.interface(index)?),
            Linked::Elsewhere if up => devices.unreachable.extend(interface(link).map(|found| found.name)),
            Linked::Elsewhere | Linked::Inside => {}
        }
    }
    Ok(devices)
}

fn linked(link: &LinkMessage, host_id: i32) -> Linked {
    let (mut other, mut namespace, mut kind) = (None, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Link(index) => other = Some(*index),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(*id),
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match (kind, other, namespace) {
        (Some(InfoKind::Veth), Some(index), Some(id)) if id == host_id => Linked::Host(index),
        // A device of hardware, moved into the pod.
        (None, ..) | (_, _, Some(_)) => Linked::Elsewhere,
        (Some(_), _, None) => Linked::Inside,
    }
}
