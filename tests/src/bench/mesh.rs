//! A ZDS server that hands pods to a proxy without our agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use redirect_zds::messages::WorkloadInfo;
use redirect_zds::server::{Handle, Options, Server, Workload};
use tokio::runtime::Runtime;

use crate::pod::Pod;
use crate::{agent, wait};

/// A ZDS server.
#[derive(Debug)]
pub struct Mesh {
    runtime: Runtime,
    handle: Handle,
    dir: PathBuf,
}

impl Mesh {
    /// Listens for proxies, in a directory that is created if necessary.
    pub fn start(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let guard = runtime.enter();
        let (server, handle) = Server::bind(&agent::zds_socket(dir), Options::default())?;
        drop(guard);
        runtime.spawn(server.run(std::future::pending()));
        Ok(Self { runtime, handle, dir: dir.to_owned() })
    }

    /// The directory of its socket.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hands a pod to the proxies; returns when the newest one serves it.
    pub fn add(&self, pod: &Pod) -> Result<()> {
        let identity = pod.identity();
        let workload = Workload {
            uid: identity.uid.clone(),
            info: WorkloadInfo {
                name: identity.name.clone(),
                namespace: identity.namespace.clone(),
                service_account: identity.service_account.clone(),
            },
            netns: Some(Arc::new(pod.netns().descriptor().try_clone()?)),
        };
        let added = self.runtime.block_on(self.handle.add(workload, wait::SOON));
        added.with_context(|| format!("pod {identity}"))
    }

    /// Waits until a process is connected and serves every pod.
    pub fn wait_for_proxy(&self, process: u32) -> Result<()> {
        let process = i32::try_from(process)?;
        wait::until_true("proxy in step", wait::SOON, || {
            let proxies = self.handle.proxies();
            Ok(proxies
                .iter()
                .any(|proxy| proxy.peer.process.pid() == process && proxy.synced && proxy.refused.is_empty()))
        })
    }

    /// Waits until no proxy is connected.
    pub fn wait_for_no_proxy(&self) -> Result<()> {
        wait::until_true("end of the proxy", wait::SOON, || Ok(self.handle.proxies().is_empty()))
    }
}
