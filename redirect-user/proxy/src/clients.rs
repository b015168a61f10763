//! The clients of a pod whose connections are open, so that no delivery takes one's place.
//!
//! A delivery borrows its client's address. Its far end, the socket that the application accepts, then has the pod's
//! address and port, the client's address, and the port that the delivery chose; the proxy's own end of a client's
//! connection has the same with the client's port, in the same namespace. Were both ports the same, the delivery's
//! packets would go to the proxy's end. The kernel does not see it coming: it compares the near end only.

use std::collections::HashSet;
use std::net::SocketAddr;

use parking_lot::{Mutex, MutexGuard};

/// From where, to where.
type Pair = (SocketAddr, SocketAddr);

/// The pod's inbound connections.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<HashSet<Pair>>);

/// One of them, until dropped.
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
        // No panic can leave the set half changed.
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
