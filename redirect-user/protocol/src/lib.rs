//! Pod identities, the node proxy's placement, and the protocol between the CNI plugin, the command line and
//! the agent.

pub mod input;
pub mod panics;
pub mod placement;
pub mod pod;
pub mod wire;
