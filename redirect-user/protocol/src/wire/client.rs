//! The client: synchronous and without a runtime, because the plugin must start within milliseconds.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SetSockOpt, SockFlag, SockType, UnixAddr, connect, recvmsg,
    sendmsg, setsockopt, socket,
};
use nix::sys::time::TimeVal;

use super::gc;
use super::packet::{self, PacketError};
use super::{MAX_PACKET, Reply, Request, VERSION};

/// Why a request got no answer, or no usable one. Every message names the socket and, if there is one, the
/// remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No process listens.
    #[error("the agent cannot be reached at {}; is the ambient-redirect DaemonSet running on this node?", socket.display())]
    Unreachable {
        /// Where the agent should listen.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The agent closed the connection, probably because it restarts.
    #[error("the agent at {} closed the connection without an answer; it may be restarting, try again", socket.display())]
    Closed {
        /// Where the agent listens.
        socket: PathBuf,
    },
    /// The deadline passed.
    #[error("the agent at {} did not answer within {after:?}; see its log, or raise timeoutSeconds", socket.display())]
    TimedOut {
        /// Where the agent listens.
        socket: PathBuf,
        /// The deadline.
        after: Duration,
    },
    /// The agent is from another release.
    #[error(
        "the agent at {} speaks version {theirs} of the protocol, this program version {VERSION}; \
         install the same release of both",
        socket.display()
    )]
    Version {
        /// Where the agent listens.
        socket: PathBuf,
        /// The agent's version.
        theirs: u16,
    },
    /// A packet does not fit.
    #[error("a message to or from the agent at {} is larger than {MAX_PACKET} bytes", socket.display())]
    TooLarge {
        /// Where the agent listens.
        socket: PathBuf,
    },
    /// The agent's answer can't be parsed.
    #[error("the answer of the agent at {} cannot be understood; install the same release of both", socket.display())]
    Malformed {
        /// Where the agent listens.
        socket: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The agent's reply does not match the request.
    #[error("unexpected answer from the agent at {}; install the same release of both", socket.display())]
    Unexpected {
        /// Where the agent listens.
        socket: PathBuf,
    },
    /// The connection failed in another way.
    #[error("the connection to the agent at {} failed", socket.display())]
    Io {
        /// Where the agent listens.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The agent refused.
    #[error(transparent)]
    Refused(#[from] super::Error),
}

impl Error {
    /// Whether no agent of our version processed the request. Callers that can do without the agent tolerate these
    /// errors, but no answer that an agent gave.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Closed { .. } | Self::TimedOut { .. })
    }
}

/// Sends one request and waits until the final reply. All of it, connecting included, takes at most `timeout`.
///
/// A [`Reply::Error`] becomes [`Error::Refused`]; the returned list is never empty and holds none.
pub fn call(
    socket: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<Vec<Reply>, Error> {
    let connection = Connection::open(socket, timeout)?;
    connection.send(request, netns)?;
    let mut replies = Vec::new();
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        match connection.receive(&mut buffer)? {
            Reply::Error(refusal) => return Err(refusal.into()),
            reply => replies.push(reply),
        }
        if replies.last().is_some_and(Reply::is_final) {
            return Ok(replies);
        }
    }
}

/// Sends one request and passes each reply on, until `each` stops or the final reply arrives. `timeout` is for the first
/// one.
pub fn follow(
    socket: &Path,
    request: &Request,
    timeout: Duration,
    mut each: impl FnMut(Reply) -> ControlFlow<()>,
) -> Result<(), Error> {
    let mut connection = Connection::open(socket, timeout)?;
    connection.send(request, None)?;
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let reply = match connection.receive(&mut buffer)? {
            Reply::Error(refusal) => return Err(refusal.into()),
            reply => reply,
        };
        connection.timeout = Duration::MAX;
        let last = reply.is_final();
        if each(reply).is_break() || last {
            return Ok(());
        }
    }
}

/// For requests that are answered by [`Reply::Done`].
pub fn call_done(
    socket: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<(), Error> {
    match call(socket, request, netns, timeout)?.as_slice() {
        [Reply::Done] => Ok(()),
        _ => Err(Error::Unexpected { socket: socket.into() }),
    }
}

struct Connection<'a> {
    fd: OwnedFd,
    socket: &'a Path,
    started: Instant,
    timeout: Duration,
}

impl<'a> Connection<'a> {
    fn open(path: &'a Path, timeout: Duration) -> Result<Self, Error> {
        let unreachable = |errno: Errno| Error::Unreachable { socket: path.into(), source: errno.into() };
        let address = UnixAddr::new(path).map_err(unreachable)?;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| Error::Io { socket: path.into(), source: errno.into() })?;
        let connection = Self { fd, socket: path, started: Instant::now(), timeout };
        // With a full backlog, connect() blocks for as long as a send would.
        connection.within(SendTimeout, || connect(connection.fd.as_raw_fd(), &address)).map_err(|error| {
            match error {
                Error::Io { socket, source } => Error::Unreachable { socket, source },
                other => other,
            }
        })?;
        Ok(connection)
    }

    /// Sends the request in as many packets as necessary.
    fn send(&self, request: &Request, netns: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        match request {
            Request::Gc { valid } => {
                gc::requests(valid).iter().try_for_each(|part| self.send_packet(part, netns))
            }
            request => self.send_packet(request, netns),
        }
    }

    fn send_packet(&self, request: &Request, netns: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let packet = packet::encode(request).map_err(|error| self.packet_error(error))?;
        let fds: Vec<_> = netns.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        self.within(SendTimeout, || {
            let data = [IoSlice::new(&packet)];
            sendmsg::<()>(self.fd.as_raw_fd(), &data, control, MsgFlags::MSG_NOSIGNAL, None)
        })?;
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Reply, Error> {
        let (size, flags) = self.within(ReceiveTimeout, || {
            let mut data = [IoSliceMut::new(buffer)];
            // Without room for control messages, the kernel discards unexpected descriptors.
            recvmsg::<()>(self.fd.as_raw_fd(), &mut data, None, MsgFlags::empty()).map(|m| (m.bytes, m.flags))
        })?;
        if flags.contains(MsgFlags::MSG_TRUNC) {
            return Err(Error::TooLarge { socket: self.socket.into() });
        }
        match buffer.get(..size) {
            None | Some([]) => Err(Error::Closed { socket: self.socket.into() }),
            Some(packet) => packet::decode(packet).map_err(|error| self.packet_error(error)),
        }
    }

    /// Runs a system call whose timeout is the given socket option, with the remaining time.
    fn within<O, T>(&self, option: O, mut syscall: impl FnMut() -> nix::Result<T>) -> Result<T, Error>
    where
        O: SetSockOpt<Val = TimeVal> + Copy,
    {
        let timed_out = || Error::TimedOut { socket: self.socket.into(), after: self.timeout };
        let failed = |errno: Errno| Error::Io { socket: self.socket.into(), source: errno.into() };
        loop {
            let left = self.timeout.saturating_sub(self.started.elapsed());
            // Zero would mean no timeout.
            if left < Duration::from_micros(1) {
                return Err(timed_out());
            }
            setsockopt(&self.fd, option, &time_val(left)).map_err(failed)?;
            match syscall() {
                Ok(value) => return Ok(value),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(timed_out()),
                Err(Errno::EPIPE | Errno::ECONNRESET) => {
                    return Err(Error::Closed { socket: self.socket.into() });
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    fn packet_error(&self, error: PacketError) -> Error {
        let socket = self.socket.into();
        match error {
            PacketError::TooLarge { .. } => Error::TooLarge { socket },
            PacketError::Version { theirs } => Error::Version { socket, theirs },
            PacketError::Json(source) => Error::Malformed { socket, source },
        }
    }
}

fn time_val(duration: Duration) -> TimeVal {
    // A timeout beyond the range becomes the longest possible one.
    let seconds = duration.as_secs().try_into().unwrap_or(i64::from(i32::MAX));
    TimeVal::new(seconds, duration.subsec_micros().into())
}
