//! Placement `node`: exempts packets on the ingress device from the host's connection tracking.
//!
//! Where the host translates addresses of Services (kube-proxy does), the address of a pod would take the place of the one
//! that was dialled before the proxy's socket has the packet: the proxy would not know the Service, and no socket the next
//! packet. One rule of nftables, in a table of our own, does it: `iifname "redirect0" notrack`. Nobody's rules are touched.

use std::io;
use std::path::Path;
use std::sync::Once;

use redirect_ebpf::constants::ENTRANCE;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

const TABLE: &str = "ambient-redirect";
const CHAIN: &str = "entrance";

/// There, if the kernel tracks connections.
const TRACKING: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Before connection tracking (-200).
const PRIORITY: i32 = -300;

/// `enum nf_tables_msg_types`, as far as they are used.
mod message {
    pub(super) const NEW_TABLE: u8 = 0;
    pub(super) const DELETE_TABLE: u8 = 2;
    pub(super) const NEW_CHAIN: u8 = 3;
    pub(super) const NEW_RULE: u8 = 6;
    pub(super) const GET_RULE: u8 = 7;
}

/// Sees to the rule, where connections are tracked. Returns whether it was missing. What cannot be done is told, once:
/// pods reach everything else all the same.
pub(super) fn ensure() -> bool {
    static TOLD: Once = Once::new();
    if !Path::new(TRACKING).exists() {
        return false;
    }
    let outcome = is_there().and_then(|there| if there { Ok(false) } else { add().map(|()| true) });
    outcome.unwrap_or_else(|error| {
        TOLD.call_once(|| {
            tracing::warn!(
                %error,
                "cannot exempt device {ENTRANCE} from connection tracking by nftables (CONFIG_NF_TABLES, \
                 CONFIG_NFT_CT): enrolled pods cannot reach Services whose addresses the host translates"
            );
        });
        false
    })
}

/// Removes the rule. Returns whether it was there.
pub(super) fn remove() -> io::Result<bool> {
    if !Path::new(TRACKING).exists() || !is_there().unwrap_or(false) {
        return Ok(false);
    }
    let mut netlink = Netlink::open()?;
    netlink.transact(&[(message::DELETE_TABLE, 0, text(1, TABLE))])?;
    Ok(true)
}

fn is_there() -> io::Result<bool> {
    Netlink::open()?.has_rule()
}

/// The table anew, whatever was left of it, in one transaction.
fn add() -> io::Result<()> {
    const CREATE: u16 = NLM_F_CREATE;
    let table = text(1, TABLE);
    let hook = [number(1, 0), number(2, PRIORITY.cast_unsigned())].concat();
    let chain = [text(1, TABLE), text(3, CHAIN), nested(4, &hook), text(7, "filter")].concat();
    let rule = [text(1, TABLE), text(2, CHAIN), nested(4, &expressions())].concat();
    Netlink::open()?.transact(&[
        (message::NEW_TABLE, CREATE, table.clone()),
        (message::DELETE_TABLE, 0, table.clone()),
        (message::NEW_TABLE, CREATE, table),
        (message::NEW_CHAIN, CREATE, chain),
        (message::NEW_RULE, CREATE | NLM_F_APPEND, rule),
    ])
}

/// `meta iifname`, into the first register; `cmp` it; `notrack`.
fn expressions() -> Vec<u8> {
    const REGISTER: u32 = 1;
    const INTERFACE_NAME: u32 = 6;
    const EQUAL: u32 = 0;
    let mut name = [0; 16];
    name[..ENTRANCE.len()].copy_from_slice(ENTRANCE.as_bytes());
    let load = [number(1, REGISTER), number(2, INTERFACE_NAME)].concat();
    let compare = [number(1, REGISTER), number(2, EQUAL), nested(3, &attribute(1, &name))].concat();
    let expression = |word: &str, data: &[u8]| nested(1, &[text(1, word), nested(2, data)].concat());
    [expression("meta", &load), expression("cmp", &compare), nested(1, &text(1, "notrack"))].concat()
}

fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = (4 + content.len()) as u16;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
    const NESTED: u16 = 0x8000;
    attribute(kind | NESTED, content)
}

fn text(kind: u16, content: &str) -> Vec<u8> {
    attribute(kind, &[content.as_bytes(), &[0]].concat())
}

fn number(kind: u16, content: u32) -> Vec<u8> {
    attribute(kind, &content.to_be_bytes())
}

/// A socket of nfnetlink in the calling thread's namespace.
struct Netlink(Socket);

/// One answer: its type, its sequence number, and what follows its header.
struct Answer {
    kind: u16,
    sequence: u32,
    rest: Vec<u8>,
}

impl Netlink {
    /// The subsystem of nftables.
    const SUBSYSTEM: u8 = 10;
    /// `NFPROTO_INET`: both families.
    const INET: u8 = 1;

    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        Ok(Self(socket))
    }

    /// Messages with their flags, all of which are heeded or none.
    fn transact(&mut self, messages: &[(u8, u16, Vec<u8>)]) -> io::Result<()> {
        const BEGIN: u16 = 0x10;
        const END: u16 = 0x11;
        let border = |kind| packet(kind, NLM_F_REQUEST, [0, 0, 0, Self::SUBSYSTEM], 0, &[]);
        let mut batch = border(BEGIN);
        for (sequence, (kind, flags, attributes)) in (1..).zip(messages) {
            let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            batch.extend(packet(of_nftables(*kind), flags, [Self::INET, 0, 0, 0], sequence, attributes));
        }
        batch.extend(border(END));
        self.0.send(&batch, 0)?;
        loop {
            for answer in self.receive()? {
                if answer.error()? && answer.sequence as usize == messages.len() {
                    return Ok(());
                }
            }
        }
    }

    fn has_rule(&mut self) -> io::Result<bool> {
        const DONE: u16 = 3;
        let attributes = [text(1, TABLE), text(2, CHAIN)].concat();
        let kind = of_nftables(message::GET_RULE);
        let request = packet(kind, NLM_F_REQUEST | NLM_F_DUMP, [Self::INET, 0, 0, 0], 1, &attributes);
        self.0.send(&request, 0)?;
        let mut found = false;
        loop {
            for answer in self.receive()? {
                match answer.error() {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                    outcome => outcome?,
                };
                found |= answer.kind == of_nftables(message::NEW_RULE);
                if answer.kind == DONE {
                    return Ok(found);
                }
            }
        }
    }

    fn receive(&self) -> io::Result<Vec<Answer>> {
        let (packet, _) = self.0.recv_from_full()?;
        Ok(answers(&packet))
    }
}

impl Answer {
    /// The error that it reports. Otherwise whether it is an acknowledgement.
    fn error(&self) -> io::Result<bool> {
        const ERROR: u16 = 2;
        if self.kind != ERROR {
            return Ok(false);
        }
        let code = self.rest.first_chunk().map_or(-libc::EPROTO, |bytes| i32::from_ne_bytes(*bytes));
        if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(-code)) }
    }
}

const fn of_nftables(kind: u8) -> u16 {
    u16::from_be_bytes([Netlink::SUBSYSTEM, kind])
}

/// Header, `struct nfgenmsg`, attributes.
fn packet(kind: u16, flags: u16, general: [u8; 4], sequence: u32, attributes: &[u8]) -> Vec<u8> {
    const HEADER: usize = 16;
    let length = (HEADER + general.len() + attributes.len()) as u32;
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(general);
    bytes.extend(attributes);
    bytes
}

/// What a packet of the kernel's holds, as far as it can be read.
fn answers(mut packet: &[u8]) -> Vec<Answer> {
    const HEADER: usize = 16;
    let mut answers = Vec::new();
    while packet.len() >= HEADER {
        let word =
            |at: usize| u32::from_ne_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
        let length = word(0) as usize;
        let Some(rest) = packet.get(HEADER..length) else { break };
        let kind = u16::from_ne_bytes([packet[4], packet[5]]);
        answers.push(Answer { kind, sequence: word(8), rest: rest.into() });
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_far_as_they_go() {
        let first = packet(2, 0, 0_i32.to_ne_bytes(), 7, &[]);
        let second = packet(2, 0, (-libc::ENOENT).to_ne_bytes(), 8, &[1, 2, 3]);
        let mut all = [first.clone(), second.clone()].concat();
        let found = answers(&all);
        assert_eq!(found.iter().map(|answer| answer.sequence).collect::<Vec<_>>(), [7, 8]);
        assert!(found[0].error().unwrap());
        assert_eq!(found[1].error().unwrap_err().kind(), io::ErrorKind::NotFound);
        all.truncate(first.len() + 5);
        assert_eq!(answers(&all).len(), 1);
        assert!(answers(&[]).is_empty() && answers(&[0; 64]).is_empty());
    }

    #[test]
    fn attributes_are_padded_and_say_their_length() {
        assert_eq!(text(3, "abcd"), [9, 0, 3, 0, b'a', b'b', b'c', b'd', 0, 0, 0, 0]);
        assert_eq!(number(1, 1), [8, 0, 1, 0, 0, 0, 0, 1]);
        assert_eq!(nested(1, &number(2, 0))[..4], [12, 0, 1, 0x80]);
    }
}
