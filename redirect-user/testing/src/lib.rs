//! Helpers shared by unit tests and end-to-end tests.

mod api_server;
mod skip;

pub use api_server::{ApiServer, Fault, World};
pub use skip::skip;
