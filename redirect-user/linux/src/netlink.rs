//! Links, rules and routes of the calling thread's network namespace. Synchronous: the kernel answers a request before `send`
//! returns.

mod exchange;
pub mod nftables;
pub mod notifications;
mod raw;
mod routes;
mod rules;

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, AsRawFd as _};

use redirect_ebpf::Family;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_MASK, ROUTE_TABLE};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use crate::link::Program;
use crate::netns::NetNs;
use exchange::Exchange;
pub use raw::Raw;
pub use routes::{OtherRoute, Route, RouteKind, Routes, is_of_interest};
pub use rules::Rule;

/// The handles of our filters, one per program. The kernel needs more memory for larger handles.
pub const HANDLES: RangeInclusive<u32> = 1501..=1515;

/// The index of `lo`, in every network namespace.
pub const LOOPBACK_INDEX: u32 = 1;

/// An interface of a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
}

impl Interface {
    /// Whether it is `lo`.
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        self.index == LOOPBACK_INDEX
    }
}

/// A route socket in the namespace in which it was opened.
pub struct Netlink(Exchange);

/// An interface, and the device it is linked to.
#[derive(Clone, Debug)]
pub struct Device {
    /// The interface.
    pub interface: Interface,
    /// Whether it is up.
    pub up: bool,
    /// The kind of a virtual device: `veth`, `ipvlan`.
    pub kind: Option<String>,
    /// The index of its peer, or of the device below it.
    pub peer: Option<u32>,
    /// The ID of the namespace that the peer is in, if it is another one.
    pub namespace: Option<i32>,
}

impl Netlink {
    /// A socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Exchange::open(NETLINK_ROUTE).map(Self)
    }

    /// The ID by which the socket's namespace knows another one. The kernel assigns one if there is none.
    pub fn namespace_id(&mut self, netns: &NetNs) -> io::Result<i32> {
        let descriptor = NsidAttribute::Fd(netns.as_fd().as_raw_fd().cast_unsigned());
        let mut message = NsidMessage::default();
        message.attributes = vec![descriptor.clone()];
        for _ in 0..2 {
            let answers = self.0.request(RouteNetlinkMessage::GetNsId(message.clone()), NLM_F_ACK)?;
            let known = answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewNsId(found) => found.attributes.into_iter().find_map(|attribute| {
                    if let NsidAttribute::Id(id) = attribute { u32::try_from(id).ok() } else { None }
                }),
                _ => None,
            });
            if let Some(id) = known {
                return Ok(id.cast_signed());
            }
            let mut new = message.clone();
            new.attributes.push(NsidAttribute::Id(-1));
            match self.change(RouteNetlinkMessage::NewNsId(new), 0) {
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result?,
            }
        }
        Err(io::Error::other("the network namespace has no ID here, and is given none"))
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.0.request::<Raw>(message, NLM_F_ACK | flags).map(drop)
    }

    /// The interfaces of the namespace, and the indices of those that are up.
    pub fn interfaces(&mut self) -> io::Result<(Vec<Interface>, BTreeSet<u32>)> {
        let devices = self.devices()?;
        let up = devices.iter().filter(|device| device.up).map(|device| device.interface.index).collect();
        Ok((devices.into_iter().map(|device| device.interface).collect(), up))
    }

    /// The interfaces of the namespace, and the devices they are linked to.
    pub fn devices(&mut self) -> io::Result<Vec<Device>> {
        // `struct ifinfomsg`
        const SIZE: usize = 16;
        const INDEX: usize = 4;
        const FLAGS: usize = 8;
        const INFO_KIND: u16 = 1;
        let links = self.list(RouteNetlinkMessage::GetLink(LinkMessage::default()), libc::RTM_NEWLINK)?;
        let device = |link: &Raw| {
            let mut name = None;
            let (mut kind, mut peer, mut namespace) = (None, None, None);
            for attribute in link.attributes(SIZE) {
                let value = attribute.value();
                match attribute.kind() {
                    libc::IFLA_IFNAME => name = Some(raw::text(value)),
                    libc::IFLA_LINK => peer = raw::word(value),
                    libc::IFLA_LINK_NETNSID => namespace = raw::word(value).map(u32::cast_signed),
                    libc::IFLA_LINKINFO => {
                        let found = raw::attributes(value).find(|found| found.kind() == INFO_KIND);
                        kind = found.map(|found| raw::text(found.value()));
                    }
                    _ => {}
                }
            }
            let interface = Interface { index: link.word(INDEX), name: name? };
            let up = link.word(FLAGS) & libc::IFF_UP.cast_unsigned() != 0;
            Some(Device { interface, up, kind, peer, namespace })
        };
        Ok(links.iter().filter_map(device).collect())
    }

    /// Lists all objects of a kind.
    fn list(&mut self, any: RouteNetlinkMessage, kind: u16) -> io::Result<Vec<Raw>> {
        let mut found = self.0.request::<Raw>(any, NLM_F_DUMP)?;
        found.retain(|answer| answer.kind() == kind);
        Ok(found)
    }

    /// Lists them where the kernel does not report concurrent changes.
    fn settled_list(&mut self, any: RouteNetlinkMessage, kind: u16) -> io::Result<Vec<Raw>> {
        let mut found = self.0.settled(|exchange| exchange.request::<Raw>(any.clone(), NLM_F_DUMP))?;
        found.retain(|answer| answer.kind() == kind);
        Ok(found)
    }

    /// The interfaces with all their attributes.
    pub fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let answers = self.0.request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// The interface with this index.
    pub fn interface(&mut self, index: u32) -> io::Result<Option<Interface>> {
        let mut wanted = LinkMessage::default();
        wanted.header.index = index;
        self.link(wanted)
    }

    /// The interface with this name.
    pub fn find(&mut self, name: &str) -> io::Result<Option<Interface>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes = vec![LinkAttribute::IfName(name.into())];
        self.link(wanted)
    }

    fn link(&mut self, wanted: LinkMessage) -> io::Result<Option<Interface>> {
        let answers = match self.0.request(RouteNetlinkMessage::GetLink(wanted), NLM_F_ACK) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => interface(link),
            _ => None,
        }))
    }

    /// Creates a veth pair.
    pub fn add_pair(&mut self, name: &str, peer: &str) -> io::Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![LinkAttribute::IfName(peer.into())];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.change(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The alias of an interface.
    pub fn alias(&mut self, index: u32) -> io::Result<Option<String>> {
        let found = self.links()?.into_iter().find(|link| link.header.index == index);
        Ok(found.into_iter().flat_map(|link| link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::IfAlias(alias) => Some(alias),
            _ => None,
        }))
    }

    /// Sets the alias of an interface.
    pub fn set_alias(&mut self, name: &str, alias: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::IfAlias(alias.into())];
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Deletes an interface.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.change(RouteNetlinkMessage::DelLink(link), 0)
    }

    /// A description of a rule with this priority that is not the ingress device's.
    pub fn other_rule(&mut self, family: Family, priority: u32) -> io::Result<Option<String>> {
        let at_priority = RuleAttribute::Priority(priority);
        let others = self.all_rules(family)?.into_iter();
        Ok(others
            .filter(|found| found.attributes.contains(&at_priority) && !leads_to_ingress_device(found))
            .map(|found| in_words(&found))
            .next())
    }

    /// Returns whether it was missing.
    pub fn ensure_ingress_device_rule(&mut self, family: Family, priority: u32) -> io::Result<bool> {
        let message = RouteNetlinkMessage::NewRule(ingress_device_rule(family, priority));
        made(self.change(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// Removes the ingress device's rules of any priority. Returns how many there were.
    pub fn delete_ingress_device_rules(&mut self, family: Family) -> io::Result<usize> {
        let ours: Vec<_> = self.all_rules(family)?.into_iter().filter(leads_to_ingress_device).collect();
        for rule in &ours {
            self.change(RouteNetlinkMessage::DelRule(rule.clone()), 0)?;
        }
        Ok(ours.len())
    }

    fn all_rules(&mut self, family: Family) -> io::Result<Vec<RuleMessage>> {
        let mut any = RuleMessage::default();
        any.header.family = address_family(family);
        let any = RouteNetlinkMessage::GetRule(any);
        let answers = self.0.settled(|exchange| exchange.request(any.clone(), NLM_F_DUMP))?;
        let rules = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(found) => Some(found),
            _ => None,
        });
        Ok(rules.collect())
    }

    /// Adds a host-scoped address to an interface. Returns whether it was missing.
    pub fn ensure_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<bool> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.scope = AddressScope::Host;
        message.header.index = index;
        message.attributes =
            vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        made(self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL))
    }

    /// `local default dev INGRESS_DEVICE table ROUTE_TABLE`. The route uses that device because the reverse path filter accepts
    /// a source if the route to it leads through the device that the packet arrived on.
    pub fn add_ingress_device_route(&mut self, family: Family, index: u32) -> io::Result<()> {
        let mut route = RouteMessage::default();
        route.header = RouteHeader {
            address_family: address_family(family),
            kind: RouteType::Local,
            scope: RouteScope::Host,
            protocol: RouteProtocol::Static,
            ..RouteHeader::default()
        };
        route.attributes =
            vec![everything(family), RouteAttribute::Table(ROUTE_TABLE), RouteAttribute::Oif(index)];
        self.change(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Sets an interface up.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// The interface's BPF filters that have our handles.
    pub fn filters(&mut self, interface: u32) -> io::Result<Vec<Filter>> {
        let filters = self.all_filters(interface)?.into_iter().map(|(_, filter)| filter);
        Ok(filters.filter(|filter| filter.program != 0 && HANDLES.contains(&filter.handle)).collect())
    }

    /// All filters of an interface's `ingress` or clsact qdisc with their kinds, in execution order. Filters that are not BPF
    /// programs have the ID zero.
    pub fn all_filters(&mut self, interface: u32) -> io::Result<Vec<(String, Filter)>> {
        // `struct tcmsg`
        const SIZE: usize = 20;
        const HANDLE: usize = 8;
        const INFO: usize = 16;
        const PROGRAM_ID: u16 = 11;
        let mut filters = Vec::new();
        for side in Side::ALL {
            let any = RouteNetlinkMessage::GetTrafficFilter(traffic_control(interface, side.parent()));
            for found in self.settled_list(any, libc::RTM_NEWTFILTER)? {
                let (mut kind, mut program) = (String::new(), 0);
                for attribute in found.attributes(SIZE) {
                    let value = attribute.value();
                    match attribute.kind() {
                        libc::TCA_KIND => kind = raw::text(value),
                        libc::TCA_OPTIONS if kind == TcFilterBpf::KIND => {
                            let id = raw::attributes(value).find(|found| found.kind() == PROGRAM_ID);
                            program = id.and_then(|found| raw::word(found.value())).unwrap_or(0);
                        }
                        _ => {}
                    }
                }
                let (priority, handle) = ((found.word(INFO) >> 16) as u16, found.word(HANDLE));
                let filter = Filter { side, priority, handle, program };
                // A qdisc with one side only, as on `lo`, lists its filters for both sides.
                let shown = (kind.clone(), Filter { side: Side::Ingress, ..filter });
                let is_shown = interface == LOOPBACK_INDEX && filters.contains(&shown);
                // The entry that represents a whole priority has no handle.
                if handle != 0 && !is_shown {
                    filters.push((kind, filter));
                }
            }
        }
        Ok(filters)
    }

    /// Attaches a program as a filter. Replaces an existing one atomically.
    pub fn set_filter(
        &mut self,
        interface: u32,
        filter: Filter,
        program: &Program,
        name: &str,
    ) -> io::Result<()> {
        let mut message = filter.message(interface);
        message.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.into()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program.fd.as_raw_fd().cast_unsigned())),
                TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        self.change(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE)
    }

    /// Returns whether it existed.
    pub fn delete_filter(&mut self, interface: u32, filter: Filter) -> io::Result<bool> {
        let mut message = filter.message(interface);
        message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.into())];
        match self.change(RouteNetlinkMessage::DelTrafficFilter(message), 0) {
            Ok(()) => Ok(true),
            // No such filter, no filter of this priority, no clsact qdisc, or no such interface.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Adds a clsact qdisc for filters to an interface, unless it has one. `lo` gets an `ingress` qdisc with one side, because
    /// each side takes 4 KiB of kernel memory.
    pub fn add_qdisc(&mut self, interface: &Interface) -> io::Result<()> {
        let mut message = traffic_control(interface.index, CLSACT);
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        let kind = if interface.is_loopback() { "ingress" } else { "clsact" };
        message.attributes = vec![TcAttribute::Kind(kind.into())];
        match self.change(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// Removes an interface's qdisc for filters, if it has no filters.
    pub fn delete_qdisc(&mut self, interface: u32) -> io::Result<()> {
        for side in Side::ALL {
            let any = RouteNetlinkMessage::GetTrafficFilter(traffic_control(interface, side.parent()));
            if !self.list(any, libc::RTM_NEWTFILTER)?.is_empty() {
                return Ok(());
            }
        }
        match self.change(RouteNetlinkMessage::DelQueueDiscipline(traffic_control(interface, CLSACT)), 0) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) =>
            {
                Ok(())
            }
            result => result,
        }
    }
}

/// Whether the object was created; it may exist already.
fn made(outcome: io::Result<()>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

const CLSACT: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };

/// The direction of an interface's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Packets that arrive.
    Ingress,
    /// Packets that leave.
    Egress,
}

impl Side {
    /// Both sides.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    const fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: 0xffff, minor }
    }
}

/// A filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The direction.
    pub side: Side,
    /// Its priority.
    pub priority: u16,
    /// Its handle.
    pub handle: u32,
    /// The program's ID.
    pub program: u32,
}

impl Filter {
    fn message(self, interface: u32) -> TcMessage {
        let mut message = traffic_control(interface, self.side.parent());
        message.header.handle = self.handle.into();
        let every_protocol = (libc::ETH_P_ALL as u16).to_be();
        message.header.info = u32::from(self.priority) << 16 | u32::from(every_protocol);
        message
    }
}

fn traffic_control(interface: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = interface.cast_signed();
    message.header.parent = parent;
    message
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::Ipv4 => AddressFamily::Inet,
        Family::Ipv6 => AddressFamily::Inet6,
    }
}

/// Index and name of an interface.
pub fn interface(link: LinkMessage) -> Option<Interface> {
    let index = link.header.index;
    let name = link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    });
    name.map(|name| Interface { index, name })
}

/// The destination of a default route.
const fn everything(family: Family) -> RouteAttribute {
    RouteAttribute::Destination(match family {
        Family::Ipv4 => RouteAddress::Inet(Ipv4Addr::UNSPECIFIED),
        Family::Ipv6 => RouteAddress::Inet6(Ipv6Addr::UNSPECIFIED),
    })
}

fn ingress_device_rule(family: Family, priority: u32) -> RuleMessage {
    rule_of(family, MARK_CAPTURE, priority, ROUTE_TABLE)
}

fn leads_to_ingress_device(rule: &RuleMessage) -> bool {
    [RuleAttribute::FwMark(MARK_CAPTURE), RuleAttribute::FwMask(MARK_MASK), RuleAttribute::Table(ROUTE_TABLE)]
        .iter()
        .all(|attribute| rule.attributes.contains(attribute))
}

fn in_words(rule: &RuleMessage) -> String {
    let words = rule.attributes.iter().filter_map(|attribute| match attribute {
        RuleAttribute::FwMark(mark) => Some(format!("fwmark {mark:#x}")),
        RuleAttribute::FwMask(mask) => Some(format!("mask {mask:#x}")),
        RuleAttribute::Source(source) => Some(format!("from {source}/{}", rule.header.src_len)),
        RuleAttribute::Destination(to) => Some(format!("to {to}/{}", rule.header.dst_len)),
        RuleAttribute::Iifname(name) => Some(format!("iif {name}")),
        RuleAttribute::Table(table) => Some(format!("lookup {table}")),
        _ => None,
    });
    words.collect::<Vec<_>>().join(" ")
}

fn rule_of(family: Family, value: u32, priority: u32, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = address_family(family);
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::FwMark(value),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(table),
    ];
    rule
}
