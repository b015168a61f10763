//! Accepts connections.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::connection;
use super::handle::Handle;
use super::listener::Listener;
use super::options::Options;
use super::shared::Shared;
use redirect_linux::socket_file::BindError;

/// The listening socket.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
    options: Arc<Options>,
}

impl Server {
    /// Creates the socket, within a runtime. Proxies that connect wait until [`Self::run`]: an agent that starts has
    /// to set its pods first ([`Handle::set`]), because a proxy drops every pod that its snapshot lacks.
    pub fn bind(path: &Path, options: Options) -> Result<(Self, Handle), BindError> {
        let listener = Listener::bind(path)?;
        let shared = Shared::new();
        let handle = Handle { shared: Arc::clone(&shared), socket: path.into() };
        Ok((Self { listener, shared, options: Arc::new(options) }, handle))
    }

    /// Serves proxies until `shutdown`. Then closes the connections, which leaves the proxies' pods running, and
    /// removes the socket's file.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = pin!(shutdown);
        let slots = Arc::new(Semaphore::new(self.options.max_connections));
        let mut connections = JoinSet::new();
        for id in 1.. {
            if slots.available_permits() == 0 {
                tracing::warn!(
                    connections = self.options.max_connections,
                    "too many node proxies are connected: end those that are left over"
                );
            }
            let accepted = async {
                let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
                Ok::<_, io::Error>((self.listener.accept().await?, slot))
            };
            let accepted = tokio::select! {
                () = &mut shutdown => break,
                accepted = accepted => accepted,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((socket, slot)) => {
                    let (shared, options) = (Arc::clone(&self.shared), Arc::clone(&self.options));
                    connections.spawn(async move {
                        connection::serve(id, socket, shared, options).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::error!(%error, "cannot accept node proxy connection");
                    // Probably out of descriptors: waits for other connections to end.
                    tokio::select! {
                        () = &mut shutdown => break,
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                    }
                }
            }
        }
        connections.shutdown().await;
    }
}
