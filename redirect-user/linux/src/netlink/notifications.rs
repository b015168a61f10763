//! Notifications from the kernel about interfaces, rules, routes and filters.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnknownCmsg, recvmsg, send};
use rtnetlink::packet_core::{NLM_F_ACK, NLMSG_NOOP, NetlinkPayload};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::exchange::{PACKET, messages, request, serialized};
use super::raw::Raw;

/// A socket in the namespace in which it was opened.
pub struct Notifications {
    socket: Socket,
    packet: Vec<u8>,
    control: Vec<u8>,
}

/// The contents of a packet.
#[derive(Debug)]
pub struct Notification {
    /// The ID of the namespace that it concerns, if that is not the socket's.
    pub namespace: Option<i32>,
    /// The changes.
    pub messages: Vec<Raw>,
    /// The number of a mark, if this packet is one.
    pub mark: Option<u32>,
}

/// Inserts marks into a socket's notifications: what the kernel reported before is ahead of the mark.
#[derive(Debug)]
pub struct Marker(OwnedFd);

impl Marker {
    /// Inserts a mark with this number. Marks may be lost like notifications, see [`Notifications::wait`].
    pub fn mark(&self, number: u32) -> io::Result<()> {
        // The kernel acknowledges an empty request.
        let mut nothing = request(Raw::new(NLMSG_NOOP, Vec::new()), NLM_F_ACK);
        nothing.header.sequence_number = number;
        send(self.0.as_raw_fd(), &serialized(&nothing), MsgFlags::empty())?;
        Ok(())
    }
}

impl Notifications {
    /// Subscribes to these groups (`RTNLGRP_…`) in the calling thread's namespace and in all namespaces that have an ID there.
    /// `buffer` is the size of the receive buffer in bytes.
    pub fn open(groups: &[u32], buffer: i32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_listen_all_namespaces(true)?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        socket.set_rx_buf_sz(buffer)?;
        let control = nix::cmsg_space!([u64; 8]);
        Ok(Self { socket, packet: vec![0; PACKET], control })
    }

    /// A marker for this socket, usable on any thread.
    pub fn marker(&self) -> io::Result<Marker> {
        // SAFETY: the socket lives for the length of the call.
        let socket = unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) };
        socket.try_clone_to_owned().map(Marker)
    }

    /// Waits for the next notification. The error `ENOBUFS` means that some were lost because the buffer was
    /// full.
    pub fn wait(&mut self) -> io::Result<Notification> {
        self.receive(MsgFlags::empty())
    }

    /// The next notification, if there is one; else the error [`io::ErrorKind::WouldBlock`].
    pub fn poll(&mut self) -> io::Result<Notification> {
        self.receive(MsgFlags::MSG_DONTWAIT)
    }

    /// An error of the kind [`io::ErrorKind::InvalidData`] means that it can't be parsed.
    fn receive(&mut self, flags: MsgFlags) -> io::Result<Notification> {
        let mut parts = [IoSliceMut::new(&mut self.packet)];
        let descriptor = self.socket.as_raw_fd();
        let received = recvmsg::<()>(descriptor, &mut parts, Some(&mut self.control), flags)?;
        let namespace = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Unknown(UnknownCmsg { cmsg_header, data_bytes })
                if cmsg_header.cmsg_level == libc::SOL_NETLINK
                    && cmsg_header.cmsg_type == libc::NETLINK_LISTEN_ALL_NSID =>
            {
                data_bytes.first_chunk().map(|id| i32::from_ne_bytes(*id))
            }
            _ => None,
        });
        let length = received.bytes;
        let (mut found, mut mark) = (Vec::new(), None);
        for message in messages::<Raw>(self.packet.get(..length).unwrap_or_default()) {
            match message? {
                (_, Ok(NetlinkPayload::InnerMessage(message))) => found.push(message),
                (header, Ok(NetlinkPayload::Error(_))) => mark = Some(header.sequence_number),
                _ => {}
            }
        }
        Ok(Notification { namespace, messages: found, mark })
    }
}
