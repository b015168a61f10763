//! What the kernel says unasked: that interfaces, rules, routes and filters come and go.

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

/// What a packet says.
#[derive(Debug)]
pub struct Notification {
    /// The ID of the namespace that it is about, if that is not the socket's.
    pub namespace: Option<i32>,
    /// What has changed.
    pub messages: Vec<Raw>,
    /// The number of a mark that was made here.
    pub mark: Option<u32>,
}

/// Puts marks between the notifications of a socket: whatever the kernel said before is before the mark.
#[derive(Debug)]
pub struct Marker(OwnedFd);

impl Marker {
    /// Makes a mark with this number. It may be lost with notifications, see [`Notifications::wait`].
    pub fn mark(&self, number: u32) -> io::Result<()> {
        // The kernel's acknowledgement of nothing.
        let mut nothing = request(Raw::new(NLMSG_NOOP, Vec::new()), NLM_F_ACK);
        nothing.header.sequence_number = number;
        send(self.0.as_raw_fd(), &serialized(&nothing), MsgFlags::empty())?;
        Ok(())
    }
}

impl Notifications {
    /// Hears of these groups (`RTNLGRP_…`) in the calling thread's namespace, and in all those that have an ID there. The kernel
    /// keeps as many bytes of what comes meanwhile.
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

    /// What marks are made with, on any thread.
    pub fn marker(&self) -> io::Result<Marker> {
        // SAFETY: the socket lives for the length of the call.
        let socket = unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) };
        socket.try_clone_to_owned().map(Marker)
    }

    /// Waits for the next one. The error `ENOBUFS`: some were lost, for want of room.
    pub fn wait(&mut self) -> io::Result<Notification> {
        self.receive(MsgFlags::empty())
    }

    /// The next one, if it is there; else the error [`io::ErrorKind::WouldBlock`].
    pub fn poll(&mut self) -> io::Result<Notification> {
        self.receive(MsgFlags::MSG_DONTWAIT)
    }

    /// An error of the kind [`io::ErrorKind::InvalidData`]: what it says can't be understood.
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
