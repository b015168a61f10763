//! Queries and answers over UDP. Each answer is sent from the queried address: in placement `node` it is not the host's.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike, recvmsg, sendmsg,
};
use socket2::Socket;
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::super::sockets;

/// A UDP socket of the resolver.
#[derive(Debug)]
pub(super) struct Datagrams {
    socket: UdpSocket,
    ipv6: bool,
}

/// The client and the queried address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) client: SocketAddr,
    server: IpAddr,
}

impl Datagrams {
    /// From a bound socket.
    pub(super) fn new(socket: Socket, address: SocketAddr) -> io::Result<Self> {
        sockets::tell_destinations(&socket, address)?;
        Ok(Self { socket: UdpSocket::from_std(socket.into())?, ipv6: address.is_ipv6() })
    }

    pub(super) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, Ends)> {
        self.socket
            .async_io(Interest::READABLE, || {
                if self.ipv6 {
                    self.try_receive::<SockaddrIn6>(buffer)
                } else {
                    self.try_receive::<SockaddrIn>(buffer)
                }
            })
            .await
    }

    fn try_receive<S: SockaddrLike + Into<SocketAddr> + Copy>(
        &self,
        buffer: &mut [u8],
    ) -> io::Result<(usize, Ends)> {
        let mut control = cmsg_space!(libc::in6_pktinfo);
        let mut parts = [IoSliceMut::new(buffer)];
        let message =
            recvmsg::<S>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
        let server = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                Some(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into())
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
            _ => None,
        });
        match (message.address, server) {
            (Some(client), Some(server)) => Ok((message.bytes, Ends { client: client.into(), server })),
            _ => Err(io::Error::other("a datagram without its addresses")),
        }
    }

    pub(super) async fn answer(&self, bytes: &[u8], ends: Ends) -> io::Result<()> {
        self.socket.async_io(Interest::WRITABLE, || self.try_answer(bytes, ends)).await
    }

    fn try_answer(&self, bytes: &[u8], Ends { client, server }: Ends) -> io::Result<()> {
        let (socket, parts) = (self.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        match (server, client) {
            (IpAddr::V4(server), SocketAddr::V4(client)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(server.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let control = [ControlMessage::Ipv4PacketInfo(&info)];
                sendmsg(socket, &parts, &control, MsgFlags::empty(), Some(&SockaddrIn::from(client)))?;
            }
            (IpAddr::V6(server), SocketAddr::V6(client)) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: server.octets() },
                    ipi6_ifindex: 0,
                };
                let control = [ControlMessage::Ipv6PacketInfo(&info)];
                sendmsg(socket, &parts, &control, MsgFlags::empty(), Some(&SockaddrIn6::from(client)))?;
            }
            (IpAddr::V4(_), SocketAddr::V6(_)) | (IpAddr::V6(_), SocketAddr::V4(_)) => {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        Ok(())
    }
}
