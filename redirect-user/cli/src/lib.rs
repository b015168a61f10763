//! `redirect`: the CLI of ambient-redirect, which also runs the agent and the embedded node proxy.
//!
//! - `doctor`: checks whether a node can run the data path.
//! - [`top`]: live connection rates.
//! - `validate`: checks from inside a pod that its connections are captured.

mod commands;
mod doctor;
pub mod top;
mod validate;

pub use commands::main;
