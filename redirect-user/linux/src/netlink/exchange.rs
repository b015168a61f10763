//! Requests over a netlink socket, with all their answers.

use std::io;
use std::ops::RangeInclusive;

use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// Room for the largest packet that the kernel sends.
pub(super) const PACKET: usize = 1 << 16;

/// How often to read a list that changes while the kernel writes it.
const ATTEMPTS: usize = 16;

/// A socket in the namespace in which it was opened.
pub(super) struct Exchange {
    socket: Socket,
    sequence: u32,
    packet: Vec<u8>,
    /// The number of packets of the last answer.
    packets: usize,
    /// Work that a test does between packets, once.
    #[cfg(test)]
    meanwhile: Option<Box<dyn FnOnce()>>,
}

impl Exchange {
    /// A socket in the calling thread's namespace.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let exchange = Self::with(protocol, SocketAddr::new(0, 0))?;
        exchange.socket.set_cap_ack(true)?;
        Ok(exchange)
    }

    fn with(protocol: isize, peer: SocketAddr) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&peer)?;
        Ok(Self {
            socket,
            sequence: 0,
            packet: Vec::with_capacity(PACKET),
            packets: 0,
            #[cfg(test)]
            meanwhile: None,
        })
    }

    /// Sends one request and returns all of its answers. A list that changed while the kernel wrote it may lack objects that
    /// did not change, so it is read again.
    pub(super) fn request<T: NetlinkDeserializable>(
        &mut self,
        message: impl NetlinkSerializable,
        flags: u16,
    ) -> io::Result<Vec<T>> {
        let mut request = request(message, flags);
        for _ in 0..ATTEMPTS {
            request.header.sequence_number = self.next();
            let sequence = self.sequence;
            self.socket.send(&serialized(&request), 0)?;
            if let End::Whole(answers) = self.answers(sequence..=sequence)? {
                return Ok(answers);
            }
        }
        Err(kept_changing())
    }

    /// Reads a list whose changes the kernel does not report (e.g. rules) because it resumes by counting. A list that came in
    /// several packets is read until it is the same twice.
    pub(super) fn settled<T: PartialEq>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut before = read(self)?;
        for _ in 0..ATTEMPTS {
            if self.packets <= 1 {
                return Ok(before);
            }
            let now = read(self)?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
        Err(kept_changing())
    }

    /// Sends several requests with their flags in one packet, and returns when the last one is acknowledged. The first and the
    /// last message only delimit the batch. The others request no acknowledgement, because many of them could overrun the
    /// socket's buffer; the kernel still reports errors.
    pub(super) fn transact<T: NetlinkSerializable>(
        &mut self,
        begin: T,
        messages: Vec<(T, u16)>,
        end: T,
    ) -> io::Result<()> {
        let (first, mut packet) = (self.sequence.wrapping_add(1), Vec::new());
        let acknowledged = messages.len();
        let messages = std::iter::once((begin, 0)).chain(messages).chain([(end, 0)]);
        for (number, (message, flags)) in messages.enumerate() {
            let flags = if number == acknowledged { NLM_F_ACK | flags } else { flags };
            let mut request = request(message, flags);
            request.header.sequence_number = self.next();
            packet.extend(serialized(&request));
        }
        self.socket.send(&packet, 0)?;
        self.answers::<Ignored>(first..=self.sequence.wrapping_sub(1)).map(drop)
    }

    /// Runs `work` after the first packet of the next answer, if more are to come.
    #[cfg(test)]
    pub(super) fn after_first_packet(&mut self, work: impl FnOnce() + 'static) {
        self.meanwhile = Some(Box::new(work));
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Reads the kernel's answers to the requests with these numbers, to the end.
    fn answers<T: NetlinkDeserializable>(&mut self, of: RangeInclusive<u32>) -> io::Result<End<T>> {
        let mut answers = Answers::to(of);
        self.packets = 0;
        loop {
            self.packets += 1;
            self.packet.clear();
            let length = self.socket.recv(&mut self.packet, libc::MSG_TRUNC)?;
            if length > self.packet.len() {
                return Err(invalid(format!("the kernel's answer is too large: {length} bytes")));
            }
            if answers.read(&self.packet)? {
                return answers.end();
            }
            #[cfg(test)]
            self.meanwhile.take().into_iter().for_each(|work| work());
        }
    }
}

/// The kernel's answers so far.
struct Answers<T> {
    /// The numbers of the requests.
    of: RangeInclusive<u32>,
    found: Vec<T>,
    changed: bool,
    /// The error of an answer that can't be parsed. The answers after it are read all the same: the kernel refuses to start
    /// another list before this one has ended.
    error: Option<io::Error>,
}

/// The end of a list.
#[derive(Debug, PartialEq, Eq)]
enum End<T> {
    /// Complete.
    Whole(Vec<T>),
    /// The list changed while the kernel wrote it.
    Changed,
}

impl<T: NetlinkDeserializable> Answers<T> {
    const fn to(of: RangeInclusive<u32>) -> Self {
        Self { of, found: Vec::new(), changed: false, error: None }
    }

    /// Adds the answers of a packet. Returns whether the last one was among them.
    fn read(&mut self, packet: &[u8]) -> io::Result<bool> {
        for message in messages::<T>(packet) {
            let (header, payload) = message?;
            if !self.of.contains(&header.sequence_number) {
                continue;
            }
            self.changed |= header.flags & NLM_F_DUMP_INTR != 0;
            match payload {
                Ok(NetlinkPayload::InnerMessage(inner)) => self.found.push(inner),
                Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                }
                Ok(NetlinkPayload::Done(_)) => return Ok(true),
                Ok(NetlinkPayload::Error(error)) if error.code.is_some() => return Err(error.to_io()),
                // The acknowledgement of a request.
                Ok(NetlinkPayload::Error(_)) if header.sequence_number == *self.of.end() => return Ok(true),
                // Answers were lost.
                Ok(NetlinkPayload::Overrun(_)) => self.changed = true,
                Ok(_) => {}
                Err(error) => _ = self.error.get_or_insert(invalid(error.to_string())),
            }
        }
        Ok(false)
    }

    fn end(self) -> io::Result<End<T>> {
        match self.error {
            Some(error) => Err(error),
            None if self.changed => Ok(End::Changed),
            None => Ok(End::Whole(self.found)),
        }
    }
}

type Payload<T> = Result<NetlinkPayload<T>, DecodeError>;

/// The messages of a packet: their headers and payloads, as far as they can be parsed.
pub(super) fn messages<T: NetlinkDeserializable>(
    mut rest: &[u8],
) -> impl Iterator<Item = io::Result<(NetlinkHeader, Payload<T>)>> {
    use rtnetlink::packet_core::Parseable as _;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let framed = NetlinkBuffer::new_checked(&rest);
        let header = framed.and_then(|buffer| NetlinkHeader::parse(&buffer));
        let header = match header {
            Ok(header) => header,
            Err(error) => {
                rest = &[];
                return Some(Err(invalid(error.to_string())));
            }
        };
        let payload = NetlinkMessage::deserialize(rest).map(|message| message.payload);
        rest = rest.get((header.length as usize).next_multiple_of(4)..).unwrap_or_default();
        Some(Ok((header, payload)))
    })
}

pub(super) fn request<T: NetlinkSerializable>(message: T, flags: u16) -> NetlinkMessage<T> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    request.finalize();
    request
}

pub(super) fn serialized<T: NetlinkSerializable>(message: &NetlinkMessage<T>) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Only acknowledgements matter.
struct Ignored;

impl NetlinkDeserializable for Ignored {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

fn kept_changing() -> io::Error {
    let what = format!("the kernel's list changed each of the {ATTEMPTS} times it was read");
    io::Error::new(io::ErrorKind::ResourceBusy, what)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::sched::{CloneFlags, unshare};
    use rtnetlink::packet_core::{DoneMessage, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
    use rtnetlink::packet_route::RouteNetlinkMessage;
    use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
    use rtnetlink::sys::protocols::{NETLINK_ROUTE, NETLINK_USERSOCK};

    use super::super::raw::Raw;
    use super::*;

    /// A message from the kernel.
    fn message(sequence: u32, flags: u16, payload: NetlinkPayload<Raw>) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        (header.sequence_number, header.flags) = (sequence, flags);
        let mut message = NetlinkMessage::new(header, payload);
        message.finalize();
        serialized(&message)
    }

    fn object(sequence: u32, flags: u16, content: u8) -> Vec<u8> {
        message(sequence, flags, NetlinkPayload::InnerMessage(Raw::new(99, vec![content; 4])))
    }

    fn done(sequence: u32, flags: u16, code: i32) -> Vec<u8> {
        let mut done = DoneMessage::default();
        done.code = code;
        message(sequence, flags, NetlinkPayload::Done(done))
    }

    /// `struct nlmsgerr`.
    fn error(sequence: u32, code: i32) -> Vec<u8> {
        message(sequence, 0, NetlinkPayload::InnerMessage(Raw::new(2, [code.to_ne_bytes(), [0; 4]].concat())))
    }

    /// Parses packets: the objects' contents, `None` if more packets are to come.
    fn read(packets: &[Vec<u8>]) -> Option<io::Result<End<u8>>> {
        let mut answers = Answers::<Raw>::to(7..=7);
        for packet in packets {
            match answers.read(packet) {
                Ok(false) => {}
                Ok(true) => {
                    return Some(answers.end().map(|end| match end {
                        End::Whole(found) => End::Whole(found.iter().map(|raw| raw.byte(0)).collect()),
                        End::Changed => End::Changed,
                    }));
                }
                Err(error) => return Some(Err(error)),
            }
        }
        None
    }

    #[test]
    fn a_list_is_whole_or_it_is_none() {
        let whole = |found: &[u8]| Some(End::Whole(found.to_vec()));
        for (packets, wanted) in [
            (vec![object(7, 0, 1), object(7, 0, 2), done(7, 0, 0)], whole(&[1, 2])),
            (vec![[object(7, 0, 1), object(7, 0, 2), done(7, 0, 0)].concat()], whole(&[1, 2])),
            (vec![done(7, 0, 0)], whole(&[])),
            (vec![object(6, 0, 3), done(6, 0, -libc::EPERM), object(7, 0, 1), done(7, 0, 0)], whole(&[1])),
            (vec![object(7, 0, 1)], None),
            (vec![object(7, NLM_F_DUMP_INTR, 1), object(7, 0, 2), done(7, 0, 0)], Some(End::Changed)),
            (vec![object(7, 0, 1), done(7, NLM_F_DUMP_INTR, 0)], Some(End::Changed)),
            (vec![message(7, 0, NetlinkPayload::Overrun(Vec::new())), done(7, 0, 0)], Some(End::Changed)),
            (vec![object(7, 0, 1), error(7, 0)], whole(&[1])),
        ] {
            assert_eq!(read(&packets).transpose().expect("no error"), wanted, "{packets:?}");
        }
    }

    #[test]
    fn an_error_is_not_the_end_of_a_list() {
        for (packets, wanted) in [
            (vec![object(7, 0, 1), done(7, 0, -libc::ENOMEM)], libc::ENOMEM),
            (vec![object(7, 0, 1), done(7, NLM_F_DUMP_INTR, -libc::ENOMEM)], libc::ENOMEM),
            (vec![error(7, -libc::EPERM)], libc::EPERM),
        ] {
            let error = read(&packets).expect("an end").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(wanted), "{packets:?}");
        }
        // Truncated.
        let cut = object(7, 0, 1)[..18].to_vec();
        assert_eq!(read(&[cut]).expect("an end").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// Answers like the kernel: each request gets the next of these packets, with its sequence number filled in.
    fn double(rounds: Vec<Vec<Vec<u8>>>) -> (SocketAddr, thread::JoinHandle<usize>) {
        let mut socket = Socket::new(NETLINK_USERSOCK).unwrap();
        let address = socket.bind_auto().unwrap();
        let answer = move || {
            let mut heard = 0;
            for packets in rounds {
                let (request, from) = socket.recv_from_full().unwrap();
                heard += 1;
                for mut packet in packets {
                    let mut at = 0;
                    while at < packet.len() {
                        packet[at + 8..at + 12].copy_from_slice(&request[8..12]);
                        at += u32::from_ne_bytes(packet[at..at + 4].try_into().unwrap()) as usize;
                    }
                    socket.send_to(&packet, &from, 0).unwrap();
                }
            }
            heard
        };
        (address, thread::spawn(answer))
    }

    #[test]
    fn a_list_that_changed_is_read_again() {
        let changed = vec![object(0, NLM_F_DUMP_INTR, 1), done(0, 0, 0)];
        let whole = vec![object(0, 0, 1), object(0, 0, 2), done(0, 0, 0)];
        let (address, kernel) = double(vec![changed.clone(), changed.clone(), whole]);
        let mut exchange = Exchange::with(NETLINK_USERSOCK, address).unwrap();
        let found = exchange.request::<Raw>(Raw::new(98, Vec::new()), NLM_F_DUMP).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(kernel.join().unwrap(), 3);

        let (address, kernel) = double(vec![changed; ATTEMPTS]);
        let mut exchange = Exchange::with(NETLINK_USERSOCK, address).unwrap();
        let error = exchange.request::<Raw>(Raw::new(98, Vec::new()), NLM_F_DUMP).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(kernel.join().unwrap(), ATTEMPTS);
    }

    #[test]
    fn a_list_in_parts_is_read_until_it_is_the_same_twice() {
        let list = |content: &[u8]| {
            let objects = content.iter().map(|content| object(0, 0, *content));
            objects.chain([done(0, 0, 0)]).collect::<Vec<_>>()
        };
        for (rounds, wanted) in [
            (vec![list(&[1, 2]), list(&[1]), list(&[1, 2]), list(&[1, 2])], Some(vec![1, 2])),
            (vec![vec![list(&[1, 2]).concat()]], Some(vec![1, 2])),
            ([list(&[1]), list(&[1, 2])].into_iter().cycle().take(1 + ATTEMPTS).collect(), None),
        ] {
            let times = rounds.len();
            let (address, kernel) = double(rounds);
            let mut exchange = Exchange::with(NETLINK_USERSOCK, address).unwrap();
            let found = exchange.settled(|exchange| {
                let found = exchange.request::<Raw>(Raw::new(98, Vec::new()), NLM_F_DUMP)?;
                Ok(found.iter().map(|raw| raw.byte(0)).collect::<Vec<_>>())
            });
            match (found, wanted) {
                (Err(error), None) => assert_eq!(error.kind(), io::ErrorKind::ResourceBusy),
                (found, wanted) => assert_eq!(found.ok(), wanted),
            }
            assert_eq!(kernel.join().unwrap(), times);
        }
    }

    /// The kernel reports that a device disappeared while it listed them.
    #[test]
    fn a_list_of_devices_has_none_that_went_meanwhile() {
        const PAIRS: usize = 50;
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            let name = "a_list_of_devices_has_none_that_went_meanwhile";
            return redirect_testing::skip(name, "needs root");
        }
        let link = |name: &str| {
            let mut link = LinkMessage::default();
            link.attributes = vec![LinkAttribute::IfName(name.into())];
            link
        };
        let mut changes = Exchange::open(NETLINK_ROUTE).unwrap();
        for number in 0..PAIRS {
            let mut pair = link(&format!("pair{number}"));
            pair.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]));
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
            changes.request::<Raw>(RouteNetlinkMessage::NewLink(pair), flags).unwrap();
        }
        let mut exchange = Exchange::open(NETLINK_ROUTE).unwrap();
        exchange.after_first_packet(move || {
            let first = RouteNetlinkMessage::DelLink(link("pair0"));
            changes.request::<Raw>(first, NLM_F_ACK).unwrap();
        });
        let any = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let found = exchange.request::<Raw>(any, NLM_F_DUMP).unwrap();
        // `lo`, and the remaining pairs.
        assert_eq!(found.len(), 1 + 2 * (PAIRS - 1));
        assert!(exchange.meanwhile.is_none(), "there were more than fit in a packet");
    }
}
