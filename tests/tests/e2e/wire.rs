//! Raw frames: a packet socket on a pod's device, which sends many in one call and sees incoming ones.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use redirect_tests::Netns;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

/// A frame, and its sender's EtherType, which the kernel trusts on the way out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    pub(crate) protocol: u16,
}

/// A packet socket on `eth0` of a namespace.
pub(crate) struct Wire {
    socket: Socket,
    device: u32,
}

impl Wire {
    pub(crate) fn of(netns: &Netns) -> Result<Self> {
        netns.run(Self::here)?
    }

    /// In the namespace of the calling thread.
    pub(crate) fn here() -> Result<Self> {
        const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
        let everything = (libc::ETH_P_ALL as u16).to_be();
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(everything))))?;
        let device = nix::net::if_::if_nametoindex("eth0")?;
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: it is a socket's address.
        *unsafe { storage.view_as::<libc::sockaddr_ll>() } = address(device, libc::ETH_P_ALL as u16);
        // SAFETY: the storage has an address of this length.
        let bound = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as u32) };
        socket.bind(&bound)?;
        set(&socket, PACKET_IGNORE_OUTGOING)?;
        socket.set_recv_buffer_size(8 << 20)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, device })
    }

    /// From here on, sent frames skip the queueing discipline, and so every TC program.
    pub(crate) fn past_qdisc(self) -> Result<Self> {
        const PACKET_QDISC_BYPASS: libc::c_int = 20;
        set(&self.socket, PACKET_QDISC_BYPASS)?;
        Ok(self)
    }

    /// Sends frames in one call, as many as the kernel accepts: those that a TC program drops count as sent.
    pub(crate) fn send(&self, frames: &[Frame]) -> Result<()> {
        let mut addresses: Vec<_> = frames.iter().map(|frame| address(self.device, frame.protocol)).collect();
        let mut parts: Vec<_> = frames
            .iter()
            .map(|frame| libc::iovec {
                iov_base: frame.bytes.as_ptr().cast_mut().cast(),
                iov_len: frame.bytes.len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = addresses
            .iter_mut()
            .zip(&mut parts)
            .map(|(address, part)| {
                // SAFETY: integers and pointers only: zero is a valid value.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_name = (&raw mut *address).cast();
                message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
                message.msg_hdr.msg_iov = &raw mut *part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let mut left = &mut messages[..];
        while !left.is_empty() {
            // SAFETY: the messages, and what they point to, live for the length of the call.
            let sent = unsafe {
                libc::sendmmsg(
                    self.socket.as_raw_fd(),
                    left.as_mut_ptr(),
                    left.len() as u32,
                    libc::MSG_DONTWAIT,
                )
            };
            let skipped = match usize::try_from(sent) {
                Ok(sent) => sent,
                Err(_) => match io::Error::last_os_error() {
                    // Dropped by a program, or because there is no receiver.
                    error if error.raw_os_error() == Some(libc::ENOBUFS) => 1,
                    error if error.kind() == io::ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(1));
                        0
                    }
                    error => return Err(error).context("sendmmsg"),
                },
            };
            left = &mut left[skipped..];
        }
        Ok(())
    }

    /// The next received frame, up to the buffer's size.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [MaybeUninit<u8>]) -> Result<Option<&'a [u8]>> {
        match self.socket.recv(buffer) {
            // SAFETY: the kernel has written them.
            Ok(length) => Ok(Some(unsafe { buffer[..length].assume_init_ref() })),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn address(device: u32, protocol: u16) -> libc::sockaddr_ll {
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: device as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    }
}

fn set(socket: &Socket, option: libc::c_int) -> Result<()> {
    let on: libc::c_int = 1;
    let (value, size) = ((&raw const on).cast(), size_of_val(&on) as u32);
    // SAFETY: the option is an int, and lives for the length of the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value, size) };
    ensure!(result == 0, "packet socket option {option}: {}", io::Error::last_os_error());
    Ok(())
}

/// The link address of `eth0`.
pub(crate) fn link_address(netns: &Netns) -> Result<[u8; 6]> {
    let device = netns.json("ip -j link show dev eth0")?;
    let text = device[0]["address"].as_str().context("eth0 has no link address")?;
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().with_context(|| format!("{text} is no link address"))
}
