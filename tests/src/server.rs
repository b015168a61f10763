//! A server inside a namespace that records its clients.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use anyhow::{Context, Result};
use socket2::{SockAddr, SockRef, Socket, Type};

use crate::echo::{self, Hello};
use crate::netns::Netns;
use crate::stack::Stack;

/// A listening server, see [`echo`]. Dropping it ends it and its connections.
#[derive(Debug)]
pub struct Server {
    listener: Arc<TcpListener>,
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    accepted: Mutex<Vec<Hello>>,
    streams: Mutex<Vec<Arc<TcpStream>>>,
}

impl Server {
    /// Listens on every address of the namespace: [`Stack::V4`] on `0.0.0.0`, [`Stack::V6`] on `[::]` for IPv6 alone,
    /// [`Stack::Mapped`] on `[::]` for both families. Port 0 takes a free one.
    pub fn start(netns: &Netns, stack: Stack, port: u16, greeting: &str) -> Result<Self> {
        Self::prepared(netns, stack, port, greeting, |_| Ok(()))
    }

    /// As [`Server::start`], with `prepare` applied to the socket before it listens.
    pub fn prepared(
        netns: &Netns,
        stack: Stack,
        port: u16,
        greeting: &str,
        prepare: impl FnOnce(&Socket) -> io::Result<()> + Send,
    ) -> Result<Self> {
        let address = match stack {
            Stack::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Stack::V6 | Stack::Mapped => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        let address = SocketAddr::new(address, port);
        let listener = netns.run(|| listen_prepared(stack, address, prepare))?;
        let listener = listener.with_context(|| format!("listen on {address} in {}", netns.name()))?;
        let port = listener.local_addr()?.port();
        let listener = Arc::new(listener);
        let shared = Arc::<Shared>::default();
        let acceptor = thread::spawn({
            let (listener, shared, greeting) = (listener.clone(), shared.clone(), greeting.to_owned());
            move || shared.accept_all(&listener, &greeting)
        });
        Ok(Self { listener, port, shared, acceptor: Some(acceptor) })
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The clients so far: the server's greeting for each.
    #[must_use]
    pub fn accepted(&self) -> Vec<Hello> {
        lock(&self.shared.accepted).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the acceptor with an error.
        let _ = SockRef::from(&self.listener.as_fd()).shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for stream in mem::take(&mut *lock(&self.shared.streams)) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: &TcpListener, greeting: &str) {
        while let Ok((stream, _)) = listener.accept() {
            let Ok(hello) = echo::hello(&stream, greeting) else { continue };
            lock(&self.accepted).push(hello.clone());
            let stream = Arc::new(stream);
            lock(&self.streams).push(stream.clone());
            let shared = self.clone();
            thread::spawn(move || {
                // Clients that disconnect midway are part of the tests.
                let _ = echo::serve(&stream, &hello);
                lock(&shared.streams).retain(|other| !Arc::ptr_eq(other, &stream));
            });
        }
    }
}

/// A listener like an ordinary application's.
pub fn listen(stack: Stack, address: SocketAddr) -> io::Result<TcpListener> {
    listen_prepared(stack, address, |_| Ok(()))
}

/// As [`listen`], with something done to the socket before it listens.
pub(crate) fn listen_prepared(
    stack: Stack,
    address: SocketAddr,
    prepare: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<TcpListener> {
    let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
    if stack != Stack::V4 {
        socket.set_only_v6(stack == Stack::V6)?;
    }
    socket.set_reuse_address(true)?;
    prepare(&socket)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
