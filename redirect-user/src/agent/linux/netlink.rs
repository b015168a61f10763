//! Links, rules and routes of the network namespace that the calling thread is in. Synchronous: each request is
//! answered by the time it was sent.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};

use redirect_ebpf::Family;
use redirect_ebpf::constants::{MARK_CAPTURE, MARK_MASK, ROUTE_METRIC, ROUTE_TABLE};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
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
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::super::facts::{Interface, LOOPBACK_INDEX, Mark};
use super::bpf::Program;
use super::tc::HANDLES;
use crate::netns::NetNs;

/// A route socket in the namespace in which it was opened.
pub(in crate::agent) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(in crate::agent) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one request and reads all of its answers.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;

        let mut answers = Vec::new();
        loop {
            let (packet, _) = self.socket.recv_from_full()?;
            let mut rest = &packet[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                let length = (answer.header.length as usize).next_multiple_of(4).min(rest.len());
                rest = rest.get(length.max(1)..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// The ID by which the socket's namespace knows another one; it is given one if it has none.
    pub(in crate::agent) fn namespace_id(&mut self, netns: &NetNs) -> io::Result<i32> {
        let descriptor = NsidAttribute::Fd(netns.as_fd().as_raw_fd().cast_unsigned());
        let mut message = NsidMessage::default();
        message.attributes = vec![descriptor.clone()];
        for _ in 0..2 {
            let answers = self.request(RouteNetlinkMessage::GetNsId(message.clone()), NLM_F_ACK)?;
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
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result?,
            }
        }
        Err(io::Error::other("the network namespace has no ID here, and is given none"))
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(drop)
    }

    /// The interfaces that are in the namespace, and the indices of those that are up.
    pub(super) fn interfaces(&mut self) -> io::Result<(Vec<Interface>, BTreeSet<u32>)> {
        let links = self.links()?;
        let is_up = |link: &&LinkMessage| link.header.flags.contains(LinkFlags::Up);
        let up = links.iter().filter(is_up).map(|link| link.header.index).collect();
        Ok((links.into_iter().filter_map(interface).collect(), up))
    }

    /// The interfaces with all that the kernel tells of them.
    pub(super) fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let answers = self.request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// The interface with this index.
    pub(super) fn interface(&mut self, index: u32) -> io::Result<Option<Interface>> {
        let mut wanted = LinkMessage::default();
        wanted.header.index = index;
        self.link(wanted)
    }

    /// The interface with this name.
    pub(super) fn find(&mut self, name: &str) -> io::Result<Option<Interface>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes = vec![LinkAttribute::IfName(name.into())];
        self.link(wanted)
    }

    fn link(&mut self, wanted: LinkMessage) -> io::Result<Option<Interface>> {
        let answers = match self.request(RouteNetlinkMessage::GetLink(wanted), NLM_F_ACK) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => interface(link),
            _ => None,
        }))
    }

    /// Makes a pair of devices.
    pub(super) fn add_pair(&mut self, name: &str, peer: &str) -> io::Result<()> {
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

    /// What somebody noted about an interface.
    pub(super) fn alias(&mut self, index: u32) -> io::Result<Option<String>> {
        let found = self.links()?.into_iter().find(|link| link.header.index == index);
        Ok(found.into_iter().flat_map(|link| link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::IfAlias(alias) => Some(alias),
            _ => None,
        }))
    }

    pub(super) fn set_alias(&mut self, name: &str, alias: &str) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(name.into()), LinkAttribute::IfAlias(alias.into())];
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    pub(super) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.change(RouteNetlinkMessage::DelLink(link), 0)
    }

    /// A rule of this priority that is not the entrance's, in words.
    pub(super) fn other_rule(&mut self, family: Family, priority: u32) -> io::Result<Option<String>> {
        let at_priority = RuleAttribute::Priority(priority);
        let others = self.all_rules(family)?.into_iter();
        Ok(others
            .filter(|found| found.attributes.contains(&at_priority) && !leads_to_entrance(found))
            .map(|found| in_words(&found))
            .next())
    }

    /// Returns whether it was missing.
    pub(super) fn ensure_entrance_rule(&mut self, family: Family, priority: u32) -> io::Result<bool> {
        let message = RouteNetlinkMessage::NewRule(entrance_rule(family, priority));
        made(self.change(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// Removes the entrance's rules, of whatever priority. Returns how many there were.
    pub(super) fn delete_entrance_rules(&mut self, family: Family) -> io::Result<usize> {
        let ours: Vec<_> = self.all_rules(family)?.into_iter().filter(leads_to_entrance).collect();
        for rule in &ours {
            self.change(RouteNetlinkMessage::DelRule(rule.clone()), 0)?;
        }
        Ok(ours.len())
    }

    fn all_rules(&mut self, family: Family) -> io::Result<Vec<RuleMessage>> {
        let mut any = RuleMessage::default();
        any.header.family = address_family(family);
        let answers = self.request(RouteNetlinkMessage::GetRule(any), NLM_F_DUMP)?;
        let rules = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(found) => Some(found),
            _ => None,
        });
        Ok(rules.collect())
    }

    /// Gives an interface an address that is known on the host alone. Returns whether it had not got it.
    pub(super) fn ensure_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<bool> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.scope = AddressScope::Host;
        message.header.index = index;
        message.attributes =
            vec![AddressAttribute::Local(address.into()), AddressAttribute::Address(address.into())];
        made(self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL))
    }

    /// `local default dev ENTRANCE table ROUTE_TABLE`. Of that device, because the reverse path filter takes a source for
    /// right if the route to it is through the device that the packet came in by.
    pub(super) fn add_entrance_route(&mut self, family: Family, index: u32) -> io::Result<()> {
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

    pub(super) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// The BPF filters of an interface's clsact qdisc that have handles of ours.
    pub(super) fn filters(&mut self, interface: u32) -> io::Result<Vec<Filter>> {
        let filters = self.all_filters(interface)?.into_iter().map(|(_, filter)| filter);
        Ok(filters.filter(|filter| filter.program != 0 && HANDLES.contains(&filter.handle)).collect())
    }

    /// All filters of an interface's clsact qdisc with their kinds, in the order in which they are asked. Those that are no
    /// BPF programs have the ID zero.
    pub(super) fn all_filters(&mut self, interface: u32) -> io::Result<Vec<(String, Filter)>> {
        let mut filters = Vec::new();
        for side in Side::ALL {
            let any = traffic_control(interface, side.parent());
            for answer in self.request(RouteNetlinkMessage::GetTrafficFilter(any), NLM_F_DUMP)? {
                let RouteNetlinkMessage::NewTrafficFilter(found) = answer else { continue };
                let (mut kind, mut program) = (String::new(), 0);
                for attribute in found.attributes {
                    match attribute {
                        TcAttribute::Kind(name) => kind = name,
                        TcAttribute::Options(options) => {
                            let id = options.iter().find_map(|option| match option {
                                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                                _ => None,
                            });
                            program = id.unwrap_or(0);
                        }
                        _ => {}
                    }
                }
                let (priority, handle) = ((found.header.info >> 16) as u16, found.header.handle.into());
                // What all filters of a priority have in common has no handle.
                if handle != 0 {
                    filters.push((kind, Filter { side, priority, handle, program }));
                }
            }
        }
        Ok(filters)
    }

    /// Puts a program into a filter's place, in one step if there is another one.
    pub(super) fn set_filter(
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

    /// Returns whether it was there.
    pub(super) fn delete_filter(&mut self, interface: u32, filter: Filter) -> io::Result<bool> {
        let mut message = filter.message(interface);
        message.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.into())];
        match self.change(RouteNetlinkMessage::DelTrafficFilter(message), 0) {
            Ok(()) => Ok(true),
            // No such filter, no filter of this priority, no clsact qdisc, no such interface.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Gives an interface a clsact qdisc, unless it has one.
    pub(super) fn add_clsact(&mut self, interface: u32) -> io::Result<()> {
        let mut message = traffic_control(interface, CLSACT);
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        message.attributes = vec![TcAttribute::Kind("clsact".into())];
        match self.change(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// Removes the clsact qdisc of an interface, if it has one and no filters are on it.
    pub(super) fn delete_clsact(&mut self, interface: u32) -> io::Result<()> {
        for side in Side::ALL {
            let any = traffic_control(interface, side.parent());
            if !self.request(RouteNetlinkMessage::GetTrafficFilter(any), NLM_F_DUMP)?.is_empty() {
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

    /// Our rules.
    pub(super) fn rules(&mut self, family: Family) -> io::Result<Vec<Mark>> {
        let all = self.all_rules(family)?;
        let is_ours = |mark: &Mark| {
            let wanted = rule(family, *mark);
            all.iter()
                .any(|found| wanted.attributes.iter().all(|attribute| found.attributes.contains(attribute)))
        };
        Ok(Mark::ALL.into_iter().filter(is_ours).collect())
    }

    pub(super) fn add_rule(&mut self, family: Family, mark: Mark) -> io::Result<()> {
        self.change(RouteNetlinkMessage::NewRule(rule(family, mark)), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub(super) fn delete_rule(&mut self, family: Family, mark: Mark) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelRule(rule(family, mark)), 0)
    }

    /// The devices and preferred sources of our routes.
    pub(super) fn routes(
        &mut self,
        family: Family,
        interfaces: &[Interface],
    ) -> io::Result<Vec<(Interface, Option<IpAddr>)>> {
        let mut any = RouteMessage::default();
        any.header.address_family = address_family(family);
        let mut routes = Vec::new();
        for answer in self.request(RouteNetlinkMessage::GetRoute(any), NLM_F_DUMP)? {
            let RouteNetlinkMessage::NewRoute(found) = answer else { continue };
            if matches!(found.header.kind, RouteType::Local | RouteType::Unreachable)
                && found.header.destination_prefix_length == 0
                && found.attributes.contains(&RouteAttribute::Table(ROUTE_TABLE))
            {
                let source = found.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
                    RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
                    _ => None,
                });
                // Routes that refuse have no device, or `lo`, depending on the family.
                let index = found.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                });
                let index = index.unwrap_or(LOOPBACK_INDEX);
                let interface = interfaces.iter().find(|interface| interface.index == index);
                routes.extend(interface.map(|interface| (interface.clone(), source)));
            }
        }
        Ok(routes)
    }

    pub(super) fn add_route(
        &mut self,
        family: Family,
        interface: &Interface,
        source: Option<IpAddr>,
    ) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let message = RouteNetlinkMessage::NewRoute(route(family, interface, source));
        self.change(message, NLM_F_CREATE | NLM_F_REPLACE).with_context(|| match source {
            Some(source) => {
                format!("is {source} an address of the pod, and past duplicate address detection?")
            }
            None => format!("{family} route"),
        })
    }

    pub(super) fn delete_route(
        &mut self,
        family: Family,
        interface: &Interface,
        source: Option<IpAddr>,
    ) -> io::Result<()> {
        match self.change(RouteNetlinkMessage::DelRoute(route(family, interface, source)), 0) {
            // Another source was put in its place.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }
}

/// Whether something was made, or was there.
fn made(outcome: io::Result<()>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

const CLSACT: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };

/// Which packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Ingress,
    Egress,
}

impl Side {
    const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    const fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: 0xffff, minor }
    }
}

/// A filter of a clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) side: Side,
    /// Filters of one priority have to be of one protocol; ours look at the family themselves.
    pub(super) priority: u16,
    pub(super) handle: u32,
    /// The program's ID.
    pub(super) program: u32,
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

/// What an interface is known by.
pub(super) fn interface(link: LinkMessage) -> Option<Interface> {
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

fn rule(family: Family, mark: Mark) -> RuleMessage {
    let (value, priority) = mark.rule();
    rule_of(family, value, priority)
}

fn entrance_rule(family: Family, priority: u32) -> RuleMessage {
    rule_of(family, MARK_CAPTURE, priority)
}

fn leads_to_entrance(rule: &RuleMessage) -> bool {
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

fn rule_of(family: Family, value: u32, priority: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = address_family(family);
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::FwMark(value),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(ROUTE_TABLE),
    ];
    rule
}

fn route(family: Family, interface: &Interface, source: Option<IpAddr>) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: address_family(family),
        kind: if source.is_some() { RouteType::Local } else { RouteType::Unreachable },
        scope: if source.is_some() { RouteScope::Host } else { RouteScope::Universe },
        protocol: RouteProtocol::Static,
        ..RouteHeader::default()
    };
    route.attributes = vec![everything(family), RouteAttribute::Table(ROUTE_TABLE)];
    if let Some(source) = source {
        route.attributes.push(RouteAttribute::Oif(interface.index));
        if !interface.is_loopback() {
            // Routes of one table and one network have to differ in it, and `lo` is to be the first choice.
            route.attributes.push(RouteAttribute::Priority(ROUTE_METRIC + interface.index));
        }
        route.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    route
}
