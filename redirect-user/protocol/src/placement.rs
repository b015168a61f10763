//! Where the node proxy's listeners are.

/// Where the node proxy's listeners are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Placement {
    /// In each pod's network namespace, as ztunnel does.
    #[default]
    Pod,
    /// Once per node, in the host's network namespace.
    Node,
}

impl Placement {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::Pod, Self::Node];
}
