//! Routes of a pod's network namespace: ours and the pod's own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{REPLY_TABLE, ROUTE_TABLE};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::raw::{self, Raw};
use super::{Interface, LOOPBACK_INDEX, Netlink, address_family};

/// One of our routes. What it delivers locally goes through `lo`, whatever its device. But the device determines which source the
/// kernel chooses, and a socket that is bound to a device (`SO_BINDTODEVICE`) only uses routes of that device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Its table.
    pub table: u32,
    /// Its destination.
    pub destination: IpNet,
    /// Its metric. No two of our routes share table, destination and metric, so each one replaces the previous route at its place.
    pub metric: u32,
    /// Its type.
    pub kind: RouteKind,
    /// Its device.
    pub interface: Interface,
    /// Its preferred source.
    pub source: Option<IpAddr>,
}

/// The type of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// Delivers packets: ours locally, the pod's own to other hosts.
    Open,
    /// `unreachable`
    Unreachable,
    /// `prohibit`
    Prohibit,
    /// `blackhole`
    Blackhole,
}

impl RouteKind {
    const REFUSING: [(Self, u8, RouteType); 3] = [
        (Self::Unreachable, libc::RTN_UNREACHABLE, RouteType::Unreachable),
        (Self::Prohibit, libc::RTN_PROHIBIT, RouteType::Prohibit),
        (Self::Blackhole, libc::RTN_BLACKHOLE, RouteType::BlackHole),
    ];

    /// From the kernel's number; `open` is the number of the type that does not refuse.
    fn new(number: u8, open: u8) -> Option<Self> {
        let refusing = Self::REFUSING.iter().find(|(_, refusing, _)| *refusing == number);
        refusing.map(|(kind, ..)| *kind).or((number == open).then_some(Self::Open))
    }
}

impl Route {
    /// Table, destination and metric. A new route replaces the one at the same place.
    #[must_use]
    pub const fn place(&self) -> (u32, IpNet, u32) {
        (self.table, self.destination, self.metric)
    }

    /// The route's family.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self.destination {
            IpNet::V4(_) => Family::Ipv4,
            IpNet::V6(_) => Family::Ipv6,
        }
    }

    fn message(&self) -> RouteMessage {
        let refusing = RouteKind::REFUSING.iter().find(|(kind, ..)| *kind == self.kind);
        let mut route = RouteMessage::default();
        route.header = RouteHeader {
            address_family: address_family(self.family()),
            destination_prefix_length: self.destination.prefix_len(),
            kind: refusing.map_or(RouteType::Local, |(.., refusing)| *refusing),
            scope: if refusing.is_some() { RouteScope::Universe } else { RouteScope::Host },
            protocol: RouteProtocol::Static,
            ..RouteHeader::default()
        };
        route.attributes = vec![
            RouteAttribute::Destination(address(self.destination.network())),
            RouteAttribute::Table(self.table),
        ];
        if self.metric != 0 {
            route.attributes.push(RouteAttribute::Priority(self.metric));
        }
        if refusing.is_none() {
            route.attributes.push(RouteAttribute::Oif(self.interface.index));
            route.attributes.extend(self.source.map(|source| RouteAttribute::PrefSource(address(source))));
        }
        route
    }
}

fn address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

/// An IPv6 route of the pod itself, or one hop of a multipath route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherRoute {
    /// Its destination.
    pub destination: IpNet,
    /// Its metric.
    pub metric: u32,
    /// Its router preference (RFC 4191), for routes of the same metric: the lowest comes first.
    pub rank: u8,
    /// Its type.
    pub kind: RouteKind,
    /// Its device.
    pub interface: Interface,
    /// Its preferred source.
    pub source: Option<IpAddr>,
}

/// The routes of a family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Ours.
    pub ours: Vec<Route>,
    /// The IPv6 routes of the main table. For IPv4 the kernel decides for each connection.
    pub main: Vec<OtherRoute>,
    /// Whether tables other than `main` have routes that lead somewhere; the pod's own rules select them.
    pub elsewhere: bool,
    /// The addresses of the namespace, except those that every namespace or every link has.
    pub addresses: Vec<IpAddr>,
}

/// `struct rtmsg`
const SIZE: usize = 12;
const FAMILY: usize = 0;
const DESTINATION_LENGTH: usize = 1;
const TABLE: usize = 4;
const KIND: usize = 7;

/// The attributes of a route that this module uses.
struct Found {
    kind: u8,
    table: u32,
    destination: IpNet,
    metric: u32,
    /// The indices of its devices, the best one first.
    devices: Vec<u32>,
    source: Option<IpAddr>,
    rank: u8,
}

impl Found {
    /// `None` if it is of another family.
    fn read(message: &Raw) -> Option<Self> {
        let (family, unspecified) = match i32::from(message.byte(FAMILY)) {
            libc::AF_INET => (Family::Ipv4, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            libc::AF_INET6 => (Family::Ipv6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            _ => return None,
        };
        let address = |value: &[u8]| match family {
            Family::Ipv4 => Some(IpAddr::from(*value.first_chunk::<4>()?)),
            Family::Ipv6 => Some(IpAddr::from(*value.first_chunk::<16>()?)),
        };
        let mut found = Self {
            kind: message.byte(KIND),
            table: message.byte(TABLE).into(),
            destination: IpNet::new(unspecified, 0).ok()?,
            metric: 0,
            devices: Vec::new(),
            source: None,
            rank: 0,
        };
        let mut destination = unspecified;
        for attribute in message.attributes(SIZE) {
            let value = attribute.value();
            match attribute.kind() {
                libc::RTA_TABLE => found.table = raw::word(value)?,
                libc::RTA_DST => destination = address(value)?,
                libc::RTA_PRIORITY => found.metric = raw::word(value)?,
                libc::RTA_OIF => found.devices.extend(raw::word(value)),
                libc::RTA_PREFSRC => found.source = address(value),
                libc::RTA_MULTIPATH => found.devices.extend(devices(value)),
                libc::RTA_PREF => found.rank = rank(*value.first()?),
                _ => {}
            }
        }
        found.destination = IpNet::new(destination, message.byte(DESTINATION_LENGTH)).ok()?;
        Some(found)
    }

    /// Whether the destination is exempt from capture, so that the route does not matter.
    fn is_aside(&self) -> bool {
        let address = self.destination.addr();
        address.is_loopback() || address.is_multicast() || is_link_local(address)
    }

    /// The address, if it belongs to this namespace alone.
    fn own_address(&self) -> Option<IpAddr> {
        let single = self.destination.prefix_len() == self.destination.max_prefix_len();
        let own = self.kind == libc::RTN_LOCAL && self.table == u32::from(libc::RT_TABLE_LOCAL);
        (own && single && !self.is_aside()).then(|| self.destination.addr())
    }
}

/// The device indices of a multipath route.
fn devices(mut hops: &[u8]) -> impl Iterator<Item = u32> {
    // `struct rtnexthop`; its first two bytes are its length including attributes.
    const SIZE: usize = 8;
    const INDEX: usize = 4;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*hops.first_chunk()?));
        let index = hops.get(INDEX..).and_then(raw::word)?;
        hops = hops.get(length.max(SIZE).next_multiple_of(4)..).unwrap_or_default();
        Some(index)
    })
}

/// The rank of a router preference (`ICMPV6_ROUTER_PREF_…`): high, medium, other.
const fn rank(preference: u8) -> u8 {
    const MEDIUM: u8 = 0;
    const HIGH: u8 = 1;
    match preference {
        HIGH => 0,
        MEDIUM => 1,
        _ => 2,
    }
}

/// IPv4 link-local addresses count like any other: cloud providers assign them to pod devices for traffic that leaves the
/// cluster.
const fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Whether a notification about an added route means that a pod has another address or a new destination. Our routes, which
/// have large table numbers, do not.
#[must_use]
pub fn is_of_interest(message: &Raw) -> bool {
    let Some(found) = Found::read(message) else { return false };
    if found.table == ROUTE_TABLE || found.table == REPLY_TABLE {
        return false;
    }
    let leads = || match found.destination {
        IpNet::V4(_) => false,
        IpNet::V6(_) => !found.is_aside() && RouteKind::new(found.kind, libc::RTN_UNICAST).is_some(),
    };
    found.own_address().is_some() || leads()
}

impl Netlink {
    /// All relevant routes: those through these interfaces.
    pub fn routes(&mut self, family: Family, interfaces: &[Interface]) -> io::Result<Routes> {
        let mut any = RouteMessage::default();
        any.header.address_family = address_family(family);
        let mut routes = Routes::default();
        let interface = |index: u32| interfaces.iter().find(|interface| interface.index == index);
        let messages = self.list(RouteNetlinkMessage::GetRoute(any), libc::RTM_NEWROUTE)?;
        for found in messages.iter().filter_map(Found::read) {
            let Found { table, destination, metric, source, rank, .. } = found;
            if table == ROUTE_TABLE || table == REPLY_TABLE {
                // Depending on the family, routes that refuse have no device or `lo`.
                let device = interface(found.devices.first().copied().unwrap_or(LOOPBACK_INDEX));
                if let (Some(kind), Some(device)) = (RouteKind::new(found.kind, libc::RTN_LOCAL), device) {
                    let interface = device.clone();
                    routes.ours.push(Route { table, destination, metric, kind, interface, source });
                }
                continue;
            }
            routes.addresses.extend(found.own_address());
            let kind = RouteKind::new(found.kind, libc::RTN_UNICAST);
            let Some(kind) = kind.filter(|_| family == Family::Ipv6 && !found.is_aside()) else { continue };
            if table != u32::from(libc::RT_TABLE_MAIN) {
                routes.elsewhere |= kind == RouteKind::Open;
                continue;
            }
            let hops = found.devices.into_iter().filter_map(interface).cloned();
            routes.main.extend(hops.map(|interface| OtherRoute {
                destination,
                metric,
                rank,
                kind,
                interface,
                source,
            }));
        }
        Ok(routes)
    }

    /// Adds one of our routes, or replaces the one at its place.
    pub fn add_route(&mut self, route: &Route) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let message = RouteNetlinkMessage::NewRoute(route.message());
        self.change(message, NLM_F_CREATE | NLM_F_REPLACE).with_context(|| match route.source {
            Some(source) => {
                format!("is {source} an address of the pod, and past duplicate address detection?")
            }
            None => format!("{} route", route.family()),
        })
    }

    /// Deletes one of our routes. A missing route is no error.
    pub fn delete_route(&mut self, route: &Route) -> io::Result<()> {
        match self.change(RouteNetlinkMessage::DelRoute(route.message()), 0) {
            // Already gone, by itself or with its interface.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENODEV)) => Ok(()),
            result => result,
        }
    }
}
