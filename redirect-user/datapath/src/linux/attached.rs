//! Lists the programs attached to our hooks: ours and others.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::devices;
use super::in_pod::CGROUP;
use super::shortcuts::Shortcut;
use crate::facts::{Hook, Interface};
use redirect_linux::link::{self, At, AttachType};
use redirect_linux::netlink::{HANDLES, Netlink, Side};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

/// A hook, and its attached programs.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The cgroup hook, named by our program there, or an interface and a direction.
    pub place: String,
    /// The programs, in execution order.
    programs: Vec<Program>,
}

#[derive(Clone, Debug)]
struct Program {
    /// Its ID; `None` for a filter of another kind.
    id: Option<u32>,
    /// Its name in the kernel.
    name: String,
    /// Whether it is ours, by its name.
    ours: bool,
}

impl Attached {
    /// Programs of others that run before ours.
    #[must_use]
    pub fn before_ours(&self) -> BTreeSet<&str> {
        let last = self.programs.iter().rposition(|program| program.ours).unwrap_or(0);
        self.programs.iter().take(last).filter(|program| !program.ours).map(|other| &*other.name).collect()
    }

    /// All programs of others.
    pub fn others(&self) -> impl Iterator<Item = &str> {
        self.programs.iter().filter(|program| !program.ours).map(|other| &*other.name)
    }
}

/// The programs attached to our hooks of a cgroup.
pub fn at_cgroup(cgroup: &Path) -> io::Result<Vec<Attached>> {
    let directory = File::open(cgroup)?;
    let at = |(name, attach_type): (&'static str, AttachType)| {
        let ids = link::programs(At::Descriptor(directory.as_fd()), attach_type)?;
        Ok(Attached { place: name.into(), programs: named(ids, &[name])? })
    };
    CGROUP.into_iter().map(at).collect()
}

/// The programs attached to a pod's interfaces, and to the ends of its devices in the calling thread's namespace.
pub fn on_devices(pod: &NetNs) -> io::Result<Vec<Attached>> {
    let mut attached = pod.run(|| {
        let mut netlink = Netlink::open()?;
        let (interfaces, _) = netlink.interfaces()?;
        on(&mut netlink, &interfaces)
    })??;
    let mut netlink = Netlink::open()?;
    let ends = devices::of(pod, &NetNs::current()?, &mut netlink)?.ends;
    attached.extend(on(&mut netlink, &ends)?);
    Ok(attached)
}

/// The pod's interfaces without an end in the calling thread's namespace, i.e. without a host gate.
pub fn unguarded(pod: &NetNs) -> io::Result<Vec<String>> {
    Ok(devices::of(pod, &NetNs::current()?, &mut Netlink::open()?)?.unreachable)
}

/// The programs on interfaces of the calling thread's namespace that may send packets to pods past the host ends of their
/// devices, with their places.
pub fn shortcuts() -> io::Result<Vec<String>> {
    let shortcut = Shortcut::known()?;
    let mut netlink = Netlink::open()?;
    let (interfaces, _) = netlink.interfaces()?;
    let mut found = Vec::new();
    for Attached { place, programs } in on(&mut netlink, &interfaces)? {
        for program in programs.iter().filter(|program| !program.ours) {
            if let Some(id) = program.id
                && shortcut.is_taken_by(id)?
            {
                found.push(format!("{} on {place}", program.name));
            }
        }
    }
    Ok(found)
}

/// The programs on interfaces of the calling thread's namespace. The kernel runs tcx programs before filters.
fn on(netlink: &mut Netlink, interfaces: &[Interface]) -> io::Result<Vec<Attached>> {
    let ours: Vec<_> = Placement::ALL.into_iter().flat_map(Hook::of).map(|hook| hook.program()).collect();
    let mut attached = Vec::new();
    for interface in interfaces {
        let filters = netlink.all_filters(interface.index)?;
        for (side, attach_type, label) in [
            (Side::Ingress, AttachType::BPF_TCX_INGRESS, "ingress"),
            (Side::Egress, AttachType::BPF_TCX_EGRESS, "egress"),
        ] {
            let mut programs = named(link::programs(At::Interface(interface.index), attach_type)?, &ours)?;
            for (kind, filter) in filters.iter().filter(|(_, filter)| filter.side == side) {
                let id = (filter.program != 0).then_some(filter.program);
                let name = id.map(link::program_name).transpose()?.flatten();
                let is_ours = |name: &String| ours.contains(&&**name) && HANDLES.contains(&filter.handle);
                let ours = name.as_ref().is_some_and(is_ours);
                let name = name.unwrap_or_else(|| format!("a filter of kind {kind}"));
                programs.push(Program { id, name, ours });
            }
            attached.push(Attached { place: format!("{}, {label}", interface.name), programs });
        }
    }
    Ok(attached)
}

/// The programs with these IDs, except those that have been unloaded meanwhile.
fn named(ids: Vec<u32>, ours: &[&str]) -> io::Result<Vec<Program>> {
    let mut programs = Vec::new();
    for id in ids {
        if let Some(name) = link::program_name(id)? {
            // The kernel truncates names.
            let is_cut = |own: &&str| !name.is_empty() && own.get(..15).unwrap_or(own) == name;
            programs.push(Program { id: Some(id), ours: ours.iter().any(is_cut), name });
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_the_last_of_ours_does_not_matter() {
        let attached = |names: &[&str]| {
            let program =
                |name: &&str| Program { id: None, name: (*name).into(), ours: name.starts_with("our") };
            Attached { place: "eth0, ingress".into(), programs: names.iter().map(program).collect() }
        };
        for (names, before) in [
            (&["our_4", "our_6", "other"][..], &[][..]),
            (&["other"], &[]),
            (&["other", "our_4"], &["other"]),
            (&["our_4", "x", "our_6", "y"], &["x"]),
            (&[], &[]),
        ] {
            assert_eq!(attached(names).before_ours().into_iter().collect::<Vec<_>>(), before, "{names:?}");
        }
    }
}
