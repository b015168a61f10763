//! Where the node proxy's listeners are.

/// Where the node proxy's listeners are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Placement {
    /// In each pod's network namespace, as ztunnel has them.
    #[default]
    Pod,
    /// In the host's network namespace, once for the node.
    Node,
}
