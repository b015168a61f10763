//! The proxy's parts on loopback, and in network namespaces where the tests may create them.
//!
//! There is no capture here. For tests of whole connections, the listener is in one namespace and the pod in another, in
//! which the application has the very address that the client dialed.

mod inside;
mod namespace;
mod pass;
mod relay;
mod resolver;

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Long enough for anything expected to happen.
const LONG: Duration = Duration::from_secs(10);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(LONG, future).await.unwrap_or_else(|_| panic!("did not happen: {what}"))
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    soon(what, async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Sends, shuts down writing, and reads until the other side has ended.
async fn send_and_end(stream: &mut TcpStream, bytes: &[u8]) {
    soon("sending", stream.write_all(bytes)).await.unwrap();
    soon("ending", stream.shutdown()).await.unwrap();
}

async fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    soon("the end of the data", stream.read_to_end(&mut bytes)).await?;
    Ok(bytes)
}

async fn expect_reset(stream: &mut TcpStream) {
    let error = read_all(stream).await.expect_err("a reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
