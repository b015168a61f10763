//! A client's connection to a test server.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use socket2::{SockAddr, Socket, Type};

use crate::echo::{Farewell, Hello};
use crate::netns::Netns;
use crate::stack::{Stack, canonical};
use crate::wait::{self, SOON};

/// A connection that is established and, after [`Connection::open`], greeted.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    /// What `getpeername` says, as the client's socket spells it.
    pub peer_name: SocketAddr,
    /// What `getsockname` says, likewise.
    pub local_name: SocketAddr,
    /// The server's first message.
    pub heard: Hello,
}

impl Connection {
    /// Connects and waits for the server's greeting.
    pub fn open(netns: &Netns, stack: Stack, to: SocketAddr) -> Result<Self> {
        Self::open_within(netns, stack, to, SOON)
    }

    /// As [`Connection::open`], with a limit for each of the two steps.
    pub fn open_within(netns: &Netns, stack: Stack, to: SocketAddr, limit: Duration) -> Result<Self> {
        let from = netns.name();
        let stream = netns
            .run(|| dial(stack, to, limit))?
            .with_context(|| format!("{stack} connection from {from} to {to}"))?;
        Self::greeted(stream).with_context(|| format!("greeting over {stack} from {to} to {from}"))
    }

    /// Wraps a connected stream and waits for the server's greeting.
    pub fn greeted(stream: TcpStream) -> Result<Self> {
        // If the connection was reset in the meantime, getpeername fails; the reset is the better error.
        let reset = |error| stream.take_error().ok().flatten().unwrap_or(error);
        let peer_name = stream.peer_addr().map_err(reset)?;
        let local_name = stream.local_addr()?;
        let mut stream = BufReader::new(stream);
        let heard = read_line(&mut stream)?;
        Ok(Self { peer_name, local_name, heard: serde_json::from_slice(&heard)?, stream })
    }

    /// Whether the client itself connected to the server: a proxy in between would have another port.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.heard.peer == canonical(self.local_name)
    }

    /// Sends a line and checks that it comes back.
    pub fn exchange(&mut self, line: &str) -> Result<()> {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let echoed = read_line(&mut self.stream)?;
        if echoed.trim_ascii_end() != line.as_bytes() {
            bail!("sent {line:?}, got back {:?}", String::from_utf8_lossy(&echoed));
        }
        Ok(())
    }

    /// Checks that a line arrives that was sent before the connection was greeted.
    pub fn hears(&mut self, line: &str) -> Result<()> {
        let heard = read_line(&mut self.stream)?;
        if heard.trim_ascii_end() != line.as_bytes() {
            bail!("got {:?} instead of {line:?}", String::from_utf8_lossy(&heard));
        }
        Ok(())
    }

    /// Sends data and returns what comes back, at the same time; the connection stays open.
    pub fn transfer(&mut self, data: &[u8]) -> Result<Vec<u8>> {
        let mut sender = self.stream.get_ref().try_clone()?;
        let mut echoed = vec![0; data.len()];
        thread::scope(|scope| {
            let sent = scope.spawn(move || sender.write_all(data));
            self.stream.read_exact(&mut echoed).context("receive")?;
            sent.join().map_err(|_| anyhow!("sender panicked"))?.context("send")
        })?;
        Ok(echoed)
    }

    /// Ends the client's direction and waits for the server's last line and end. Returns how many bytes the
    /// server received.
    pub fn finish(mut self) -> Result<u64> {
        self.stream.get_ref().shutdown(Shutdown::Write)?;
        let farewell: Farewell = serde_json::from_slice(&read_line(&mut self.stream)?)?;
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest)?;
        if !rest.is_empty() {
            bail!("{} bytes after the server's last line", rest.len());
        }
        Ok(farewell.received)
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Whether the other side ends the connection within a time.
    pub fn is_cut_within(&mut self, limit: Duration) -> Result<bool> {
        self.stream.get_ref().set_read_timeout(Some(wait::patient(limit)))?;
        match self.stream.read(&mut [0; 1]) {
            Ok(0) => Ok(true),
            Ok(_) => bail!("data where an end or nothing was expected"),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(_) => Ok(true),
        }
    }
}

/// Connects a socket of this kind, in the namespace of the calling thread.
pub fn dial(stack: Stack, to: SocketAddr, limit: Duration) -> std::io::Result<TcpStream> {
    dial_prepared(stack, to, limit, |_| Ok(()))
}

/// As [`dial`], with something done to the socket before.
pub fn dial_prepared(
    stack: Stack,
    to: SocketAddr,
    limit: Duration,
    prepare: impl FnOnce(&Socket) -> std::io::Result<()>,
) -> std::io::Result<TcpStream> {
    let limit = wait::patient(limit);
    let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
    prepare(&socket)?;
    socket.connect_timeout(&SockAddr::from(stack.spell(to)), limit)?;
    socket.set_read_timeout(Some(limit))?;
    socket.set_write_timeout(Some(limit))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

/// The operating system's error at the bottom of a failure, if there is one.
#[must_use]
pub fn io_kind(error: &anyhow::Error) -> Option<ErrorKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

fn read_line(stream: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(line)
}
