//! The protocol between client and server of a measurement, and the server.
//!
//! The client's first message selects the measurement. The server closes first, as servers of short connections do, so
//! the socket in TIME_WAIT is on its side.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde::{Deserialize, Serialize};
use socket2::SockRef;

/// The length of every request and every response.
pub const MESSAGE: usize = 64;

/// How much a client sends before it waits for a response, in a bulk transfer.
pub const VOLUME: usize = 2 * 1024 * 1024;

/// How much is read at once of it.
const CHUNK: usize = 256 * 1024;

/// A response with arbitrary content.
const RESPONSE: [u8; MESSAGE] = [b'.'; MESSAGE];

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// One request and one response.
    Request = b'R',
    /// Requests and responses in turn, until the client closes.
    PingPong = b'P',
    /// Volumes and responses in turn, until the client closes.
    Bulk = b'B',
    /// Reports how the server sees the connection, as one line of JSON.
    Identify = b'I',
}

impl Kind {
    /// A request of this kind.
    #[must_use]
    pub fn request(self) -> [u8; MESSAGE] {
        [self as u8; MESSAGE]
    }
}

/// How the server sees a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    /// The listener's port.
    pub port: u16,
    /// The client.
    pub peer: SocketAddr,
    /// The destination that the client dialed, as a node proxy finds it.
    pub destination: SocketAddr,
}

impl Sight {
    fn of(stream: &TcpStream, port: u16) -> io::Result<Self> {
        Ok(Self { port, peer: stream.peer_addr()?, destination: destination(stream)? })
    }
}

/// The original destination as ztunnel finds it: from conntrack, or else the socket's own address.
fn destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let remembered = socket.original_dst_v4().or_else(|_| socket.original_dst_v6());
    match remembered.ok().and_then(|address| address.as_socket()) {
        Some(address) => Ok(address),
        None => stream.local_addr(),
    }
}

/// Serves one connection to its end. `port` is the listener's.
pub fn serve(mut stream: TcpStream, port: u16) -> io::Result<()> {
    let mut request = [0; MESSAGE];
    stream.read_exact(&mut request)?;
    match request[0] {
        kind if kind == Kind::Request as u8 => stream.write_all(&RESPONSE),
        kind if kind == Kind::PingPong as u8 => loop {
            stream.write_all(&RESPONSE)?;
            match stream.read_exact(&mut request) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            }
        },
        kind if kind == Kind::Bulk as u8 => {
            let mut buffer = vec![0; CHUNK];
            let mut missing = VOLUME - MESSAGE;
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(()),
                    length if length < missing => missing -= length,
                    // The client sends nothing more before the response.
                    _ => {
                        stream.write_all(&RESPONSE)?;
                        missing = VOLUME;
                    }
                }
            }
        }
        kind if kind == Kind::Identify as u8 => {
            serde_json::to_writer(&stream, &Sight::of(&stream, port)?)?;
            stream.write_all(b"\n")
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
