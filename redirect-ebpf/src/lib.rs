//! Shared by the kernel side and user space of ambient-redirect: map layouts, data path constants and the pure
//! decisions. No `std`; tested on the host.
//!
//! The programs themselves are in `main.rs` and its `kernel` module. They are thin: read the context, call a decision,
//! execute it, count it.
//!
//! Everything that crosses the kernel boundary is in network byte order, has no padding, and has a size that is asserted at
//! compile time.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

pub mod constants;
pub mod count;
pub mod decide;
pub mod diagnostics;
pub mod family;
pub mod flow;
pub mod maps;
pub mod packet;

pub use count::{Direction, Reason, Verdict};
pub use family::{Family, Ip, Ipv4, Ipv6};
