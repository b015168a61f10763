//! The ingress device, placement `node`: packets of pods reach the proxy through this device of the host, and rules and routes
//! deliver its packets locally.
//!
//! It is one end of a veth pair. Nothing is ever sent through the pair: the programs redirect packets to this end as if they had
//! arrived through it.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use redirect_ebpf::Family;
use redirect_ebpf::constants::{INGRESS_DEVICE, INGRESS_DEVICE_PEER};

use super::{notrack, sysctl};
use crate::facts::Interface;
use redirect_linux::netlink::Netlink;

/// The ingress device must accept packets with any source, whatever the host's reverse path filter, and must have no other
/// traffic. The filter has to be loose for packets that the host itself sends to pods: the route to the host's own addresses
/// is never through this device. The kernel uses the larger of this value and the host's.
const IPV4: [(&str, &str); 3] = [("accept_local", "1"), ("src_valid_mark", "1"), ("rp_filter", "2")];
const IPV6: [(&str, &str); 3] = [("disable_ipv6", "0"), ("addr_gen_mode", "1"), ("accept_ra", "0")];
const IPV6_OF_PEER: [(&str, &str); 1] = [("disable_ipv6", "1")];

/// The filter drops everything on a device without an address. This one is a host address anyway.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 15, 0, 1);

/// Must be off: otherwise the kernel finds the proxy's socket before the route, and drops forwarded packets that have a
/// socket, such as answers to the proxy, which are addressed to pods. It covers both families.
const EARLY_DEMUX: &str = "/proc/sys/net/ipv4/tcp_early_demux";

/// The alias of the ingress device that records that the sysctl was on before. A file records the same ([`EarlyDemuxNote`]),
/// because either can get lost.
const WAS_ON: &str = "ambient-redirect: net.ipv4.tcp_early_demux was 1";

/// A file that exists if placement `node` has turned the sysctl off.
#[derive(Clone, Debug)]
pub struct EarlyDemuxNote(PathBuf);

impl EarlyDemuxNote {
    /// The note at this path.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Whether the sysctl was on before.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.0.exists()
    }

    /// Removes the note, once the sysctl is restored.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Records that the sysctl was on.
    pub fn write(&self) {
        if let Err(error) = fs::write(&self.0, "true") {
            tracing::warn!(path = %self.0.display(), %error, "cannot save sysctl state: is its file system \
                 full?");
        }
    }
}

/// The ingress device, and whether any part of it was missing.
pub(super) struct IngressDevice {
    pub(super) interface: Interface,
    pub(super) repaired: bool,
}

/// Creates or repairs the ingress device, in the host's namespace.
pub(super) fn ensure(
    netlink: &mut Netlink,
    priority: u32,
    note: &EarlyDemuxNote,
) -> anyhow::Result<IngressDevice> {
    let families = families()?;
    // Checked before anything is created: another rule at our priority is a configuration error.
    for &family in families {
        if let Some(other) = netlink.other_rule(family, priority)? {
            bail!(
                "{family}: rule priority {priority} of the host is taken by `{other}`: choose another with --rule-priority"
            );
        }
    }
    let mut repaired = false;
    let context = || format!("device {INGRESS_DEVICE}");
    let found = netlink.find(INGRESS_DEVICE)?;
    if found.is_none() {
        netlink.add_pair(INGRESS_DEVICE, INGRESS_DEVICE_PEER).with_context(context)?;
        repaired = true;
    }
    match (is_noted(netlink, found.as_ref())?, note.is_there()) {
        (true, false) => note.write(),
        (false, true) => netlink.set_alias(INGRESS_DEVICE, WAS_ON)?,
        (true, true) | (false, false) => {}
    }
    repaired |= turn_early_demux_off(netlink, note)?;
    let (ours, peer) = (netlink.find(INGRESS_DEVICE)?, netlink.find(INGRESS_DEVICE_PEER)?);
    let (Some(ours), Some(peer)) = (ours, peer) else {
        bail!(
            "device {INGRESS_DEVICE} or its peer {INGRESS_DEVICE_PEER} is gone: something else removes devices of the host"
        );
    };
    repaired |= set(4, INGRESS_DEVICE, &IPV4)?;
    repaired |= netlink.ensure_address(ours.index, ADDRESS).with_context(context)?;
    if families.contains(&Family::Ipv6) {
        repaired |= set(6, INGRESS_DEVICE, &IPV6)? | set(6, INGRESS_DEVICE_PEER, &IPV6_OF_PEER)?;
    }
    // Both ends, because some hosts ignore routes through devices without a carrier.
    for end in [&ours, &peer] {
        netlink.set_up(end.index).with_context(context)?;
    }
    for &family in families {
        if netlink.routes(family, std::slice::from_ref(&ours))?.ours.is_empty() {
            netlink
                .add_ingress_device_route(family, ours.index)
                .with_context(|| format!("{family} route"))?;
            repaired = true;
        }
        repaired |=
            netlink.ensure_ingress_device_rule(family, priority).with_context(|| format!("{family} rule"))?;
    }
    repaired |= notrack::ensure();
    Ok(IngressDevice { interface: ours, repaired })
}

/// Removes it from the calling thread's namespace, with the routes through it. Returns the number of removed rules,
/// whether the device existed, and whether the notrack rule existed.
pub(super) fn remove(netlink: &mut Netlink, note: &EarlyDemuxNote) -> io::Result<(usize, bool, bool)> {
    let mut rules = 0;
    for &family in families()? {
        rules += netlink.delete_ingress_device_rules(family)?;
    }
    let found = netlink.find(INGRESS_DEVICE)?;
    if note.is_there() || is_noted(netlink, found.as_ref())? {
        fs::write(EARLY_DEMUX, "1")?;
    }
    if let Some(found) = &found {
        netlink.delete_link(found.index)?;
    }
    Ok((rules, found.is_some(), notrack::remove()?))
}

/// Whether the ingress device's alias records that the sysctl was on.
fn is_noted(netlink: &mut Netlink, ingress_device: Option<&Interface>) -> io::Result<bool> {
    let alias = ingress_device.map(|found| netlink.alias(found.index)).transpose()?.flatten();
    Ok(alias.as_deref() == Some(WAS_ON))
}

fn turn_early_demux_off(netlink: &mut Netlink, note: &EarlyDemuxNote) -> anyhow::Result<bool> {
    if fs::read_to_string(EARLY_DEMUX).with_context(|| EARLY_DEMUX)?.trim() == "0" {
        return Ok(false);
    }
    // The notes come first, or the original value could get lost.
    netlink.set_alias(INGRESS_DEVICE, WAS_ON)?;
    note.write();
    fs::write(EARLY_DEMUX, "0")
        .with_context(|| format!("cannot write {EARLY_DEMUX}: is /proc/sys read-only?"))?;
    Ok(true)
}

fn families() -> io::Result<&'static [Family]> {
    Ok(if sysctl::has_ipv6()? { &Family::ALL } else { &[Family::Ipv4] })
}

/// Returns whether it changed anything.
fn set(version: u8, interface: &str, sysctls: &[(&str, &str)]) -> anyhow::Result<bool> {
    let mut changed = false;
    for (name, wanted) in sysctls {
        let path = Path::new("/proc/sys/net").join(format!("ipv{version}/conf/{interface}/{name}"));
        let context = || format!("{} can't be set: is /proc/sys read-only?", path.display());
        if fs::read_to_string(&path).with_context(context)?.trim() != *wanted {
            fs::write(&path, wanted).with_context(context)?;
            changed = true;
        }
    }
    Ok(changed)
}
