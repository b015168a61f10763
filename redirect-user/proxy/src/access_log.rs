//! The access log of connections and DNS queries, one JSON object per line.
//!
//! A separate thread writes it, so that a slow disk does not slow down connections. Lines that exceed the queue are
//! dropped, and the proxy's own log reports how many.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use serde::Serialize;

use super::{Direction, Transport};

/// The capacity of the queue, in lines.
const QUEUE: usize = 16 * 1024;

/// One line.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Line {
    Connection(ConnectionLine),
    Dns(DnsLine),
}

/// The outcome of a DNS query.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DnsLine {
    /// `dns`.
    pub(super) event: &'static str,
    pub(super) pod: Arc<str>,
    pub(super) uid: Arc<str>,
    pub(super) family: &'static str,
    pub(super) transport: Transport,
    pub(super) source: SocketAddr,
    /// `None` if the query could not be parsed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<String>,
    /// The server that answered; `None` if none did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) upstream: Option<SocketAddr>,
    pub(super) rcode: String,
    pub(super) duration_ms: u64,
}

/// An event of a connection.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ConnectionLine {
    pub(super) event: Event,
    pub(super) pod: Arc<str>,
    pub(super) uid: Arc<str>,
    pub(super) direction: Direction,
    pub(super) family: &'static str,
    pub(super) source: SocketAddr,
    pub(super) original_destination: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) upstream_local: Option<SocketAddr>,
    #[serde(flatten)]
    pub(super) end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Event {
    /// A connection was accepted.
    Open,
    /// It ended, or was refused.
    Close,
}

/// Facts that are known at the end only.
#[derive(Clone, Debug, Serialize)]
pub(super) struct End {
    pub(super) bytes_sent: u64,
    pub(super) bytes_received: u64,
    pub(super) duration_ms: u64,
    pub(super) result: String,
}

/// A handle to the log.
#[derive(Clone, Debug)]
pub(super) struct AccessLog {
    lines: SyncSender<Line>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Starts the thread that writes to the file, or to standard output if the path is `-`. The thread ends when the last
    /// handle is dropped and everything is written.
    pub(super) fn open(path: &Path) -> io::Result<(Self, JoinHandle<()>)> {
        let output: Box<dyn Write + Send> = if path == Path::new("-") {
            Box::new(io::stdout())
        } else {
            Box::new(File::options().create(true).append(true).open(path)?)
        };
        Self::start(output)
    }

    fn start(output: impl Write + Send + 'static) -> io::Result<(Self, JoinHandle<()>)> {
        let (lines, queue) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&dropped);
        let thread = thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write(&queue, BufWriter::with_capacity(64 * 1024, output), &count))?;
        Ok((Self { lines, dropped }, thread))
    }

    /// Queues a line; never blocks.
    pub(super) fn write(&self, line: Line) {
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write(queue: &Receiver<Line>, mut output: impl Write, dropped: &AtomicU64) {
    while let Ok(first) = queue.recv() {
        if let Err(error) = batch(first, queue, &mut output) {
            tracing::error!("access log: {error}; entries were lost");
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::warn!(
                "access log: dropped {lost} lines, because its file does not accept them fast enough"
            );
        }
    }
}

/// Writes all queued lines, then flushes: readers see a line soon after its event, and under load many lines share one
/// write.
fn batch(first: Line, queue: &Receiver<Line>, output: &mut impl Write) -> io::Result<()> {
    for line in std::iter::once(first).chain(queue.try_iter().take(QUEUE)) {
        serde_json::to_writer(&mut *output, &line)?;
        output.write_all(b"\n")?;
    }
    output.flush()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;

    use super::*;

    /// Blocks until released.
    struct Slow {
        go: Option<mpsc::Receiver<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(go) = self.go.take() {
                let _ = go.recv();
            }
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_file_loses_lines_and_holds_nobody_up() {
        let (go, wait) = mpsc::channel();
        let written = Arc::default();
        let (log, thread) = AccessLog::start(Slow { go: Some(wait), written: Arc::clone(&written) }).unwrap();
        let total = 3 * QUEUE;
        for number in 0..total {
            log.write(Line::Connection(ConnectionLine {
                event: Event::Open,
                pod: "shop/cart".into(),
                uid: number.to_string().into(),
                direction: Direction::Inbound,
                family: "IPv6",
                source: "[fd00::1]:1".parse().unwrap(),
                original_destination: "[fd00::2]:2".parse().unwrap(),
                upstream_local: None,
                end: None,
            }));
        }
        go.send(()).unwrap();
        drop(log);
        thread.join().unwrap();
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!((QUEUE..total).contains(&lines.len()), "{} lines of {total}", lines.len());
        assert_eq!(lines[0]["uid"], "0");
        assert_eq!(lines[0]["original_destination"], "[fd00::2]:2");
    }
}
