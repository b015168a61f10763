//! Finds the node proxy's listeners in the socket tables of a network namespace.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::net::IpAddr;

use redirect_ebpf::Family;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_ebpf::decide::Outbound;
use redirect_ebpf::maps::PodFlags;

use super::datapath::Target;
use redirect_protocol::placement::Placement;
use redirect_protocol::pod::PodAddresses;
use redirect_protocol::wire::{FactState, Transport};

/// A listener of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The family of the connections that it is for.
    pub family: Family,
    transport: Transport,
    port: u16,
}

impl Listener {
    /// The listeners of a pod, in display order.
    fn of(target: &Target) -> Vec<Self> {
        let mut ports =
            [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL].map(|port| (Transport::Tcp, port)).to_vec();
        if target.flags.contains(PodFlags::DNS) {
            ports.extend([(Transport::Tcp, PORT_DNS), (Transport::Udp, PORT_DNS)]);
        }
        let of = |family| ports.iter().map(move |&(transport, port)| Self { family, transport, port });
        target.addresses.families().flat_map(of).collect()
    }

    /// Its state in the calling thread's namespace. Not every proxy has tunnels: if it listens, but not for tunnels, that
    /// listener is unused.
    fn state(self) -> io::Result<FactState> {
        Ok(if is_there(self)? {
            FactState::Present
        } else if self.port == PORT_TUNNEL && is_there(Self { port: PORT_INBOUND, ..self })? {
            FactState::Unused
        } else {
            FactState::Missing
        })
    }

    /// Whether it gets the pod's connections with this decision: the proxy's listener or its resolver's.
    pub fn serves(self, decision: Outbound, transport: Transport) -> bool {
        let port = match decision {
            Outbound::Capture => PORT_OUTBOUND,
            Outbound::Resolve => PORT_DNS,
            Outbound::Deliver | Outbound::Pass(_) | Outbound::Refuse(_) => return false,
        };
        (self.transport, self.port) == (transport, port)
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
        };
        write!(f, "listener of the node proxy, {transport} port {}, {}", self.port, self.family)
    }
}

/// The listeners of a pod and their states, in the pod or in the calling thread's namespace.
pub fn look(target: &Target, placement: Placement) -> io::Result<Vec<(Listener, FactState)>> {
    let look =
        || Listener::of(target).into_iter().map(|listener| Ok((listener, listener.state()?))).collect();
    match placement {
        Placement::Pod => target.netns.run(look)?,
        Placement::Node => look(),
    }
}

/// The families in which the proxy listens for captured connections of both directions, in the calling thread's namespace.
pub(super) fn served() -> io::Result<BTreeSet<Family>> {
    let mut served = BTreeSet::new();
    for family in Family::ALL {
        let listens = |port| is_there(Listener { family, transport: Transport::Tcp, port });
        if listens(PORT_OUTBOUND)? && listens(PORT_INBOUND)? {
            served.insert(family);
        }
    }
    Ok(served)
}

/// An IPv6 socket at `::` accepts IPv4 as well, unless `bindv6only` is set.
fn is_there(Listener { family, transport, port }: Listener) -> io::Result<bool> {
    if bound(transport, family)?.iter().any(|bound| bound.port == port) {
        return Ok(true);
    }
    let both = family == Family::Ipv4
        && fs::read_to_string("/proc/sys/net/ipv6/bindv6only").is_ok_and(|value| value.trim() == "0");
    Ok(both && bound(transport, Family::Ipv6)?.iter().any(|bound| bound.port == port && bound.anywhere))
}

/// The address of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The port.
    pub port: u16,
    /// Whether it is bound to the unspecified address.
    anywhere: bool,
}

/// The listeners of a family in the calling thread's namespace; none if the kernel lacks the family.
pub fn bound(transport: Transport, family: Family) -> io::Result<Vec<Bound>> {
    let Some(table) = table(transport, family)? else { return Ok(Vec::new()) };
    Ok(listening(transport, table.lines().map_while(Result::ok)))
}

/// The kernel's table of the family's sockets in the calling thread's namespace; `None` if the kernel lacks the family.
fn table(transport: Transport, family: Family) -> io::Result<Option<BufReader<File>>> {
    let table = match (transport, family) {
        (Transport::Tcp, Family::Ipv4) => "tcp",
        (Transport::Tcp, Family::Ipv6) => "tcp6",
        (Transport::Udp, Family::Ipv4) => "udp",
        (Transport::Udp, Family::Ipv6) => "udp6",
    };
    match File::open(format!("/proc/thread-self/net/{table}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => Ok(Some(BufReader::new(file?))),
    }
}

/// Whether the proxies in the calling thread's namespace have no more connections of a pod. They have one if a socket
/// impersonates an end of it, i.e. its address is none of the namespace's `own`.
pub(super) fn have_let_go(pod: &PodAddresses, own: &BTreeSet<IpAddr>) -> io::Result<bool> {
    let pod: BTreeSet<IpAddr> = pod.iter().collect();
    for family in Family::ALL {
        let Some(table) = table(Transport::Tcp, family)? else { continue };
        for line in table.lines().skip(1) {
            let is_impersonated = |(local, remote): &(IpAddr, IpAddr)| {
                !own.contains(local) && !local.is_loopback() && (pod.contains(local) || pod.contains(remote))
            };
            if ends(&line?).as_ref().is_some_and(is_impersonated) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The ends of a connection in a TCP table, unless it is closed.
fn ends(line: &str) -> Option<(IpAddr, IpAddr)> {
    const TIME_WAIT: &str = "06";
    let mut words = line.split_whitespace().skip(1);
    let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
    if [LISTEN, TIME_WAIT].contains(&state) {
        return None;
    }
    Some((address(local)?, address(remote)?))
}

/// Four-byte words in native byte order.
fn address(end: &str) -> Option<IpAddr> {
    let (digits, _) = end.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(digits.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    Some(match digits.len() {
        8 => IpAddr::from(word(0)?),
        _ => {
            let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()
        }
    })
}

/// Whether the calling thread's namespace has any TCP socket that listens or is connected, by the kernel's
/// counters.
pub(super) fn has_sockets() -> io::Result<bool> {
    for (file, line) in [("sockstat", "TCP: inuse "), ("sockstat6", "TCP6: inuse ")] {
        let text = match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            // The kernel has no IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text?,
        };
        let counted = text.lines().find_map(|of| of.strip_prefix(line)?.split(' ').next()?.parse().ok());
        if counted != Some(0u32) {
            return Ok(true);
        }
    }
    Ok(false)
}

const LISTEN: &str = "0A";

/// The listeners in a table: "sl local_address rem_address st …". The TCP table begins with them, and may be
/// long.
fn listening(transport: Transport, lines: impl Iterator<Item = String>) -> Vec<Bound> {
    let parsed = lines.skip(1).map_while(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        if transport == Transport::Tcp && state != LISTEN {
            return None;
        }
        let (address, port) = local.rsplit_once(':')?;
        let anywhere = address.bytes().all(|digit| digit == b'0');
        Some(Bound { port: u16::from_str_radix(port, 16).ok()?, anywhere })
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_the_first_in_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                        0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1\n\
                        1: 0100007F:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2\n\
                        2: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 3\n";
        let found = listening(Transport::Tcp, table.lines().map(str::to_owned));
        let bound = |port, anywhere| Bound { port, anywhere };
        assert_eq!(found, [bound(PORT_OUTBOUND, true), bound(PORT_INBOUND, false)]);
    }

    #[test]
    fn ends_are_addresses_of_either_family_until_the_connection_is_over() {
        let table = |state: &str| {
            format!("   3: 0100007F:1F90 0200000A:C350 {state} 00000000:00000000 00:00000000 00000000")
        };
        assert_eq!(ends(&table("01")), Some(([127, 0, 0, 1].into(), [10, 0, 0, 2].into())));
        assert_eq!([ends(&table("06")), ends(&table("0A"))], [None, None]);
        let ipv6 = "   0: 000000FD000000000000000002000000:1F90 0000000000000000FFFF00000200000A:C350 01 0:0";
        let (local, remote) = ends(ipv6).unwrap();
        assert_eq!([local, remote], ["fd00::2".parse::<IpAddr>().unwrap(), [10, 0, 0, 2].into()]);
    }

    #[test]
    fn datagram_sockets_are_all_listeners() {
        let table = "  sl  local_address                         remote_address                        st tx_queue\n\
             31: 00000000000000000000000001000000:3ACD 00000000000000000000000000000000:0000 07 00000000:00000000\n";
        let found = listening(Transport::Udp, table.lines().map(str::to_owned));
        assert_eq!(found, [Bound { port: PORT_DNS, anywhere: false }]);
    }
}
