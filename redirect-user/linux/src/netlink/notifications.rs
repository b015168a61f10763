//! What the kernel says unasked: that interfaces, rules, routes and filters come and go.

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnknownCmsg, recvmsg};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::exchange::{PACKET, messages};
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

    /// Waits for the next one.
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
        let mut found = Vec::new();
        for message in messages::<Raw>(self.packet.get(..length).unwrap_or_default()) {
            if let Ok(NetlinkPayload::InnerMessage(message)) = message?.1 {
                found.push(message);
            }
        }
        Ok(Notification { namespace, messages: found })
    }
}
