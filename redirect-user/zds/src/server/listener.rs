//! The socket that node proxies connect to.

use std::io;
use std::path::Path;

use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};

use redirect_linux::socket_file::{self, BindError, SocketFile};

#[derive(Debug)]
pub(super) struct Listener {
    // Dropped before the listener, so that a successor never finds a file without a listener.
    _file: SocketFile,
    inner: UnixSeqpacketListener,
}

impl Listener {
    /// Must be called within a runtime.
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = socket_file::listen_at(path)?;
        let inner = UnixSeqpacketListener::try_from(listener)
            .map_err(|source| BindError::Io { path: path.into(), source })?;
        Ok(Self { _file: file, inner })
    }

    /// Cancel-safe.
    pub(super) async fn accept(&mut self) -> io::Result<UnixSeqpacket> {
        self.inner.accept().await
    }
}
