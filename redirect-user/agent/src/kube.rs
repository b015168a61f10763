//! Kubernetes: which pods of this node to enroll, and what to report about them.
//!
//! ```text
//!  API server ──watch──▶ informer ──▶ store ──▶ queue ──▶ controller ──▶ agent::pods
//!                                      ▲ │                    │  └─ sandboxes: /proc, for pods that run already
//!        redirect-cni ──▶ admission ───┘ └─ rules             └──▶ status: annotation, events ──▶ API server
//! ```
//!
//! The API server holds the desired state only: the kernel decides whether a pod is enrolled, and the annotation
//! follows.

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

#[cfg(test)]
pub(crate) use client::{Rate, client_at};
pub(crate) use client::{client, config};
pub(crate) use controller::Controller;
pub(crate) use daemonset::OwnDaemonSet;
pub(crate) use timing::Timing;
