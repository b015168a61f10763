//! The state shared by the connections and queries of one pod.

use std::net::SocketAddr;
use std::sync::Arc;

use super::clients::Clients;
use super::quotas::Quotas;
use super::{Identity, Shared};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) shared: Shared,
    pub(super) identity: Identity,
    pub(super) netns: NetNs,
    pub(super) clients: Clients,
    /// Connections whose destinations have not answered yet.
    pub(super) unanswered: Arc<Quotas>,
}

/// How many connections of a pod may wait for their destinations. Each has two of the proxy's sockets.
const UNANSWERED: usize = 4096;

impl Context {
    pub(super) fn new(shared: Shared, identity: Identity, netns: NetNs) -> Self {
        Self { shared, identity, netns, clients: Clients::default(), unanswered: Quotas::new(UNANSWERED) }
    }

    /// The name in the access log of the pod at this end of a connection. In placement `node` the proxy only
    /// knows addresses.
    pub(super) fn pod(&self, end: SocketAddr) -> Arc<str> {
        match self.shared.placement {
            Placement::Pod => Arc::clone(&self.identity.name),
            Placement::Node => end.ip().to_string().into(),
        }
    }
}
