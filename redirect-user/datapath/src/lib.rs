//! The data path of pods: the desired facts, their difference from the observed ones, and the Linux implementation. Nothing
//! here knows about the lifecycle of pods, Kubernetes, or protocols.

pub mod bpf_log;
pub mod datapath;
pub mod facts;
mod faults;
pub mod handle;
pub mod linux;
pub mod listeners;
pub mod mirror;
