//! `redirect`: the command line of ambient-redirect, which runs the agent and the embedded node proxy as well.
//!
//! - `doctor`: whether a node can run the data path.
//! - [`top`]: connections as they are decided on.
//! - `validate`: proves from inside a pod that it is steered.

mod commands;
mod doctor;
pub mod top;
mod validate;

pub use commands::main;
