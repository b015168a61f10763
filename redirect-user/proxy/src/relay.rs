//! Relays bytes both ways between two connections, until both ways have ended or one has failed.
//!
//! The end of one way is passed on, and the other way continues. Any failure ends both, and both ends see a reset, as
//! they would without the proxy.
//!
//! An idle connection, or one whose receiver keeps up, owns no buffer: bytes go from socket to socket through a buffer of
//! the thread. Only bytes that the receiver does not take at once are kept, and nothing more is read before they are
//! sent. So the proxy holds at most [`BUFFER`] per way, and ten thousand idle connections cost only their sockets.

use std::cell::RefCell;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

/// The most bytes that wait, per way.
const BUFFER: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Bytes relayed so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// From the client.
    pub(super) sent: AtomicU64,
    /// To the client.
    pub(super) received: AtomicU64,
}

/// Which of the two connections failed, and how.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    #[error("client: {0}")]
    Client(io::Error),
    #[error("upstream: {0}")]
    Upstream(io::Error),
}

/// A connection that is reset if it is dropped before [`Connection::finish`].
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    finished: bool,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, finished: false }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Closes without a reset, after both ways have ended.
    pub(super) fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.finished {
            reset_on_close(&self.stream);
        }
    }
}

/// Makes the socket's close a reset: the peer must not take it for a regular end of the data.
fn reset_on_close(stream: &TcpStream) {
    // Fails only on a socket without a connection, and then there is nothing to reset.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Relays until both ways have ended.
pub(super) async fn relay(
    client: &TcpStream,
    upstream: &TcpStream,
    counters: &Counters,
) -> Result<(), RelayError> {
    use RelayError::{Client, Upstream};
    let mut forth = pin!(pump(client, upstream, &counters.sent));
    let mut back = pin!(pump(upstream, client, &counters.received));
    let client_ended = tokio::select! {
        result = &mut forth => result.map_err(|failure| failure.named(Client, Upstream)).map(|()| true)?,
        result = &mut back => result.map_err(|failure| failure.named(Upstream, Client)).map(|()| false)?,
    };
    // The side that ended is no longer read, so its reset has to be detected separately.
    if client_ended {
        tokio::select! {
            result = back => result.map_err(|failure| failure.named(Upstream, Client)),
            error = failure_of(client) => Err(Client(error)),
        }
    } else {
        tokio::select! {
            result = forth => result.map_err(|failure| failure.named(Client, Upstream)),
            error = failure_of(upstream) => Err(Upstream(error)),
        }
    }
}

/// The end of a pump that failed.
enum Failure {
    From(io::Error),
    To(io::Error),
}

impl Failure {
    fn named(
        self,
        from: impl FnOnce(io::Error) -> RelayError,
        to: impl FnOnce(io::Error) -> RelayError,
    ) -> RelayError {
        match self {
            Self::From(error) => from(error),
            Self::To(error) => to(error),
        }
    }
}

/// Relays one way until its end, and passes the end on.
async fn pump(from: &TcpStream, to: &TcpStream, passed: &AtomicU64) -> Result<(), Failure> {
    let count = |bytes: usize| passed.fetch_add(bytes as u64, Ordering::Relaxed);
    loop {
        // Between two fast ends nothing ever has to wait, and other connections need the thread as well.
        consume_budget().await;
        from.readable().await.map_err(Failure::From)?;
        let rest = match transfer(from, to)? {
            Transfer::NotReady => continue,
            Transfer::End => return SockRef::from(to).shutdown(Shutdown::Write).map_err(Failure::To),
            Transfer::Passed { written, rest } => {
                count(written);
                rest
            }
        };
        let mut rest = rest.as_slice();
        while !rest.is_empty() {
            to.writable().await.map_err(Failure::To)?;
            let written = try_write(to, rest)?;
            count(written);
            rest = rest.get(written..).unwrap_or_default();
        }
    }
}

enum Transfer {
    NotReady,
    End,
    Passed { written: usize, rest: Vec<u8> },
}

/// Reads once and writes once, without blocking.
fn transfer(from: &TcpStream, to: &TcpStream) -> Result<Transfer, Failure> {
    SCRATCH.with_borrow_mut(|buffer| {
        let length = match from.try_read(buffer) {
            Ok(0) => return Ok(Transfer::End),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Transfer::NotReady),
            Err(error) => return Err(Failure::From(error)),
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        let written = try_write(to, bytes)?;
        Ok(Transfer::Passed { written, rest: bytes.get(written..).unwrap_or_default().to_vec() })
    })
}

fn try_write(to: &TcpStream, bytes: &[u8]) -> Result<usize, Failure> {
    match to.try_write(bytes) {
        Ok(written) => Ok(written),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(Failure::To(error)),
    }
}

/// Waits until a connection that nobody reads from fails.
pub(super) async fn failure_of(stream: &TcpStream) -> io::Error {
    loop {
        match stream.ready(Interest::ERROR).await {
            Ok(ready) if ready.is_error() => {
                let pending = stream.take_error().ok().flatten();
                return pending.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
            }
            // The wake-up may be spurious.
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}
