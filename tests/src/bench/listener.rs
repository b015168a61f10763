//! Listeners for the measurements' protocol, on threads.

use std::io;
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;

use redirect_ebpf::constants::MARK_PROXY;
use socket2::{Domain, SockRef, Socket, Type};

use super::protocol;

/// The number of concurrent connections, with one thread each: that costs the least per connection, and a client that
/// has connected but not sent its request blocks no other.
const WORKERS: usize = 16;

/// Listens on a port of the calling thread's namespace, in both families; until the value is dropped.
#[derive(Debug)]
pub struct Listener(Arc<TcpListener>);

/// What kind of listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// An application.
    Application,
    /// A node proxy: marked and transparent.
    Proxy,
}

impl Listener {
    /// Starts it.
    pub fn start(port: u16, owner: Owner) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM.cloexec(), None)?;
        if owner == Owner::Proxy {
            socket.set_mark(MARK_PROXY)?;
            socket.set_reuse_port(true)?;
            socket.set_ip_transparent_v4(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_only_v6(false)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        socket.listen(1024)?;
        let listener = Arc::new(TcpListener::from(socket));
        for _ in 0..WORKERS {
            let listener = Arc::clone(&listener);
            thread::Builder::new().stack_size(64 * 1024).spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    // A client that leaves early does not matter.
                    let _ = protocol::serve(stream, port);
                }
            })?;
        }
        Ok(Self(listener))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Makes every accept() fail, and with it its thread end.
        let _ = SockRef::from(&*self.0).shutdown(Shutdown::Both);
    }
}
