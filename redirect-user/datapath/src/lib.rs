//! What is in the kernel for pods: which facts have to hold, how they differ from those that do, and the Linux that brings
//! them about. Nothing here knows of pods' life, of Kubernetes, or of what is said to others.

pub mod bpf_log;
pub mod datapath;
pub mod facts;
mod faults;
pub mod handle;
pub mod linux;
pub mod listeners;
