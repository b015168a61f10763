//! What the connections and questions of one pod share.

use std::net::SocketAddr;
use std::sync::Arc;

use super::clients::Clients;
use super::quotas::Quotas;
use super::{Identity, Shared};
use redirect_linux::netns::NetNs;
use redirect_protocol::placement::Placement;

/// See the module.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) shared: Shared,
    pub(super) identity: Identity,
    pub(super) netns: NetNs,
    pub(super) clients: Clients,
    /// Connections whose destinations have not answered yet.
    pub(super) unanswered: Arc<Quotas>,
}

/// How many connections of a pod may wait for their destinations. Each has two sockets of the proxy's.
const UNANSWERED: usize = 4096;

impl Context {
    pub(super) fn new(shared: Shared, identity: Identity, netns: NetNs) -> Self {
        Self { shared, identity, netns, clients: Clients::default(), unanswered: Quotas::new(UNANSWERED) }
    }

    /// What the access log calls the pod at this end of a connection: the proxy of a node knows addresses alone.
    pub(super) fn pod(&self, end: SocketAddr) -> Arc<str> {
        match self.shared.placement {
            Placement::Pod => Arc::clone(&self.identity.name),
            Placement::Node => end.ip().to_string().into(),
        }
    }
}
