//! Kubernetes: which pods of this node are to be steered, and what it is told about them.
//!
//! ```text
//!  API server ──watch──▶ informer ──▶ store ──▶ queue ──▶ controller ──▶ agent::pods
//!                                      ▲ │                    │  └─ sandboxes: /proc, for pods that run already
//!        redirect-cni ──▶ admission ───┘ └─ rules             └──▶ status: annotation, events ──▶ API server
//! ```
//!
//! The API server says what is wanted, never what is: whether a pod is steered is asked of the kernel, and its
//! annotation follows.

mod admission;
mod api;
mod client;
mod controller;
mod daemonset;
mod exclusions;
mod informer;
mod labels;
mod options;
mod process_cgroup;
mod queue;
mod rules;
mod sandboxes;
mod status;
mod store;
mod timing;

pub use labels::{EnableLabel, Rules};
pub use options::Options;

#[cfg(test)]
mod tests;

pub(crate) use client::{client, config};
pub(crate) use controller::Controller;
pub(crate) use daemonset::OwnDaemonSet;
pub(crate) use timing::Timing;
