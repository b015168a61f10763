//! What unit tests and end-to-end tests share.

mod skip;

pub use skip::skip;
