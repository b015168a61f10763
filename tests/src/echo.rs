//! The protocol of the test servers: one line of JSON when a client connects ([`Hello`]), then an echo of
//! everything, and after the end of the client's direction one more line of JSON ([`Farewell`]), which only arrives
//! if a half-closed connection survives.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::stack::canonical;

/// The server's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which server it is.
    pub greeting: String,
    /// The client as the server sees it (`getpeername`), with v4-mapped addresses as IPv4.
    pub peer: SocketAddr,
    /// Its own address (`getsockname`), likewise.
    pub local: SocketAddr,
}

/// The server's last message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Farewell {
    /// How many bytes the client sent.
    pub received: u64,
}

/// Serves one connection to its end.
pub fn serve(mut stream: &TcpStream, hello: &Hello) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    send_line(stream, hello)?;
    let mut buffer = [0; 16 * 1024];
    let mut received = 0;
    loop {
        let length = stream.read(&mut buffer)?;
        let Some(data) = buffer.get(..length).filter(|data| !data.is_empty()) else { break };
        received += length as u64;
        stream.write_all(data)?;
    }
    send_line(stream, &Farewell { received })?;
    stream.shutdown(Shutdown::Write)
}

/// The first message of a server with this greeting on this connection.
pub fn hello(stream: &TcpStream, greeting: &str) -> io::Result<Hello> {
    Ok(Hello {
        greeting: greeting.to_owned(),
        peer: canonical(stream.peer_addr()?),
        local: canonical(stream.local_addr()?),
    })
}

fn send_line(mut stream: &TcpStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}
