//! A DNS server that answers every query and records the clients.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};

use crate::netns::Netns;
use crate::stack::canonical;
use crate::wait;

/// The port of DNS servers.
pub const PORT: u16 = 53;

/// The address of every name.
pub const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);

/// The address of every name.
pub const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53);

/// The prefix of names with a long text, and its length.
pub const LONG: (&str, usize) = ("long", 3000);

/// Names that begin so do not exist.
pub const ABSENT: &str = "absent";

/// A recorded query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Whether it came by TCP.
    pub tcp: bool,
    /// The client, with v4-mapped addresses as IPv4.
    pub from: SocketAddr,
    /// The name, as it was written, with the last dot.
    pub name: String,
    /// The type.
    pub kind: RecordType,
}

/// A server, over UDP and TCP. It ends with this value.
#[derive(Debug)]
pub struct DnsServer {
    socket: Arc<UdpSocket>,
    listener: Arc<TcpListener>,
    heard: Arc<Mutex<Vec<Heard>>>,
    threads: Vec<JoinHandle<()>>,
}

impl DnsServer {
    /// Serves at this address of the namespace; `[::]` is every address of both families.
    pub fn start(netns: &Netns, address: SocketAddr) -> Result<Self> {
        let bound = netns
            .run(|| -> io::Result<_> { Ok((bind(address, Type::DGRAM)?, bind(address, Type::STREAM)?)) })?;
        let (socket, listener) =
            bound.with_context(|| format!("DNS server on {address} in {}", netns.name()))?;
        listener.listen(128)?;
        let (socket, listener) = (Arc::new(UdpSocket::from(socket)), Arc::new(TcpListener::from(listener)));
        let heard = Arc::<Mutex<Vec<Heard>>>::default();
        let threads = vec![
            thread::spawn({
                let (socket, heard) = (socket.clone(), heard.clone());
                move || serve_udp(&socket, &heard)
            }),
            thread::spawn({
                let (listener, heard) = (listener.clone(), heard.clone());
                move || serve_tcp(&listener, &heard)
            }),
        ];
        Ok(Self { socket, listener, heard, threads })
    }

    /// Serves at every address of the namespace, on the usual port.
    pub fn everywhere(netns: &Netns) -> Result<Self> {
        Self::start(netns, (Ipv6Addr::UNSPECIFIED, PORT).into())
    }

    /// All queries so far.
    #[must_use]
    pub fn heard(&self) -> Vec<Heard> {
        lock(&self.heard).clone()
    }

    /// The queries for a name so far.
    #[must_use]
    pub fn heard_of(&self, name: &str) -> Vec<Heard> {
        self.heard().into_iter().filter(|heard| heard.name.eq_ignore_ascii_case(name)).collect()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        // Wakes both threads. On an unconnected UDP socket it returns an error, but wakes the thread anyway.
        let _ = SockRef::from(&self.socket.as_fd()).shutdown(Shutdown::Both);
        let _ = SockRef::from(&self.listener.as_fd()).shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn bind(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

fn serve_udp(socket: &UdpSocket, heard: &Mutex<Vec<Heard>>) {
    let mut buffer = [0; 4096];
    // After a shutdown, both length and sender are zero.
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        if length == 0 {
            break;
        }
        if let Some(answer) = answer(&buffer[..length], from, false, heard) {
            // A client that is gone does not concern the server.
            let _ = socket.send_to(&answer, from);
        }
    }
}

fn serve_tcp(listener: &TcpListener, heard: &Arc<Mutex<Vec<Heard>>>) {
    while let Ok((mut stream, from)) = listener.accept() {
        let heard = heard.clone();
        thread::spawn(move || {
            let _ = stream.set_read_timeout(Some(wait::patient(wait::SOON)));
            while let Ok(question) = read_framed(&mut stream) {
                let Some(answer) = answer(&question, from, true, &heard) else { break };
                if write_framed(&mut stream, &answer).is_err() {
                    break;
                }
            }
        });
    }
}

fn answer(question: &[u8], from: SocketAddr, tcp: bool, heard: &Mutex<Vec<Heard>>) -> Option<Vec<u8>> {
    let message = Message::from_vec(question).ok()?;
    let limit = if tcp { usize::from(u16::MAX) } else { message.max_payload().into() };
    let query = message.queries.first()?;
    let (name, kind) = (query.name().clone(), query.query_type());
    let text = name.to_ascii();
    lock(heard).push(Heard { tcp, from: canonical(from), name: text.clone(), kind });
    let data = match kind {
        RecordType::A => Some(RData::A(A(V4))),
        RecordType::AAAA => Some(RData::AAAA(AAAA(V6))),
        RecordType::TXT => {
            let length = if text.starts_with(LONG.0) { LONG.1 } else { 10 };
            Some(RData::TXT(TXT::new(vec!["x".repeat(100); length.div_ceil(100)])))
        }
        _ => None,
    };
    let edns = message.edns.is_some();
    let mut reply = message.into_response();
    reply.metadata.recursion_available = true;
    reply.additionals.clear();
    if edns {
        reply.set_edns(Edns::new());
    }
    if text.starts_with(ABSENT) {
        reply.metadata.response_code = ResponseCode::NXDomain;
    } else {
        reply.add_answers(data.map(|data| Record::from_rdata(name, 60, data)));
    }
    let bytes = reply.to_vec().ok()?;
    if bytes.len() > limit { reply.truncate().to_vec().ok() } else { Some(bytes) }
}

/// A question.
pub fn question(name: &str, kind: RecordType) -> Result<Vec<u8>> {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.id = identifier();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name)?, kind));
    Ok(message.to_vec()?)
}

/// Numbers the questions of this process.
fn identifier() -> u16 {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Checks that a message is the server's answer to a question.
pub fn check_answer(question: &[u8], answer: &[u8]) -> Result<()> {
    let (asked, answer) = (Message::from_vec(question)?, Message::from_vec(answer)?);
    ensure!(answer.metadata.id == asked.metadata.id, "the answer to another question: {answer}");
    ensure!(answer.queries == asked.queries, "the answer to another question: {answer}");
    ensure!(answer.metadata.response_code == ResponseCode::NoError, "{answer}");
    let right = match (
        asked.queries.first().map(Query::query_type),
        answer.answers.first().map(|record| &record.data),
    ) {
        (Some(RecordType::A), Some(RData::A(address))) => address.0 == V4,
        (Some(RecordType::AAAA), Some(RData::AAAA(address))) => address.0 == V6,
        (Some(RecordType::TXT), Some(RData::TXT(_))) => true,
        _ => false,
    };
    ensure!(right, "not what the server says: {answer}");
    Ok(())
}

/// Reads a message with its length before it.
pub fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// Sends a message with its length before it.
pub fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
