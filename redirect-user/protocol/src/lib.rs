//! Who a pod is, where the node proxy listens, and what CNI plugin, command line and agent say to each other.

pub mod input;
pub mod panics;
pub mod placement;
pub mod pod;
pub mod wire;
