//! Kubernetes: which pods of this node are to be steered, and what it is told about them.
//!
//! ```text
//!  API server ──watch──▶ informer ──▶ store ──▶ queue ──▶ controller ──▶ agent::pods
//!                                      ▲ │                    │  └─ sandboxes: /proc, for pods that run already
//!        redirect-cni ──▶ admission ───┘ └─ rules             └──▶ voice: annotation, events ──▶ API server
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
mod options;
mod process_cgroup;
mod queue;
mod rules;
mod sandboxes;
mod store;
mod voice;

pub use options::Options;
pub use rules::{EnableLabel, Rules};

#[cfg(test)]
mod tests;

pub(crate) use client::{client, config};
pub(crate) use controller::{Controller, Timing};
pub(crate) use daemonset::OwnDaemonSet;
