//! The clients of a pod with open connections, so that no delivery reuses the tuple of one.
//!
//! A delivery borrows its client's address. Its far end, the socket that the application accepts, then has the pod's
//! address and port, the client's address, and the port that the delivery chose. The proxy's own end of a client's
//! connection has the same tuple with the client's port, in the same namespace. If both ports were equal, the
//! delivery's packets would go to the proxy's end. The kernel does not prevent that: it compares the near end only.

use std::collections::HashSet;
use std::net::SocketAddr;

use parking_lot::{Mutex, MutexGuard};

/// Source and destination.
type Pair = (SocketAddr, SocketAddr);

/// The pod's inbound connections.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<HashSet<Pair>>);

/// An entry, until it is dropped.
#[derive(Debug)]
pub(super) struct Client<'a> {
    clients: &'a Clients,
    pair: Pair,
}

impl Clients {
    pub(super) fn enter(&self, source: SocketAddr, destination: SocketAddr) -> Client<'_> {
        let pair = (source, destination);
        self.lock().insert(pair);
        Client { clients: self, pair }
    }

    pub(super) fn contains(&self, source: SocketAddr, destination: SocketAddr) -> bool {
        self.lock().contains(&(source, destination))
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Pair>> {
        // A panic can't leave the set half changed.
        self.0.lock()
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.pair);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_known_while_they_are_connected() {
        let clients = Clients::default();
        for address in ["10.0.0.2:8080", "[fd00::2]:8080"] {
            let destination: SocketAddr = address.parse().unwrap();
            let one = clients.enter(SocketAddr::new(destination.ip(), 1), destination);
            assert!(clients.contains(one.pair.0, destination));
            assert!(!clients.contains(SocketAddr::new(destination.ip(), 2), destination));
            let source = one.pair.0;
            drop(one);
            assert!(!clients.contains(source, destination));
        }
    }
}
