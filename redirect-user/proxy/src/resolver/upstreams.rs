//! The upstream servers of queries.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use redirect_ebpf::constants::PORT_DOMAIN;
use redirect_protocol::input::read_file;

/// The minimum interval between checks of the file.
const FRESH: Duration = Duration::from_secs(1);

/// The upstream servers, in the order in which they are queried.
#[derive(Debug)]
pub(in super::super) enum Upstreams {
    /// A fixed list.
    Fixed(Arc<[SocketAddr]>),
    /// The servers of a `resolv.conf`, which may change.
    File { path: PathBuf, seen: Mutex<Seen> },
}

/// The file at its last check.
#[derive(Debug, Default)]
pub(in super::super) struct Seen {
    looked: Option<Instant>,
    version: Option<Version>,
    servers: Arc<[SocketAddr]>,
}

/// Identifies a version of the file: inode, seconds and nanoseconds of the last change, length.
type Version = (u64, i64, i64, u64);

impl Upstreams {
    /// These servers or, if there are none, those of the file.
    pub(in super::super) fn new(servers: &[SocketAddr], file: &Path) -> Self {
        if servers.is_empty() {
            let upstreams = Self::File { path: file.to_owned(), seen: Mutex::default() };
            // At once, so that problems are logged early.
            upstreams.current();
            upstreams
        } else {
            Self::Fixed(servers.into())
        }
    }

    /// The current servers.
    pub(super) fn current(&self) -> Arc<[SocketAddr]> {
        match self {
            Self::Fixed(servers) => Arc::clone(servers),
            Self::File { path, seen } => {
                // A failed check has changed nothing.
                let mut seen = seen.lock();
                if seen.looked.is_none_or(|looked| looked.elapsed() > FRESH) {
                    seen.look(path);
                }
                Arc::clone(&seen.servers)
            }
        }
    }
}

/// The maximum size of `resolv.conf`.
const LONGEST: usize = 64 << 10;

impl Seen {
    fn look(&mut self, path: &Path) {
        let first = self.looked.replace(Instant::now()).is_none();
        let found = version(path);
        let version = found.as_ref().ok().copied();
        if version == self.version && !first {
            return;
        }
        self.version = version;
        match found.and_then(|_| read_file(path, LONGEST)) {
            Ok(text) => {
                let (usable, loopback) = parse(&String::from_utf8_lossy(&text));
                tracing::info!("forwarding DNS queries of pods to {usable:?} from {}", path.display());
                if usable.is_empty() {
                    tracing::warn!(
                        "{} names no DNS server that pods can reach ({loopback} on loopback): set \
                         --dns-upstream",
                        path.display()
                    );
                }
                self.servers = usable.into();
            }
            // The previous servers are better than none.
            Err(error) => tracing::warn!(
                "{}: {error}; forwarding DNS queries of pods to {:?}: set --dns-upstream for others",
                path.display(),
                self.servers
            ),
        }
    }
}

fn version(path: &Path) -> io::Result<Version> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

/// The servers of a `resolv.conf` that can be queried from a pod, and how many are on loopback, which would be the
/// pod's own. A link-local server with a scope belongs to an interface that the pod does not have.
fn parse(text: &str) -> (Vec<SocketAddr>, usize) {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
    });
    let (loopback, usable): (Vec<_>, Vec<_>) =
        named.map(|ip| ip.to_canonical()).partition(|ip| ip.is_loopback() || ip.is_unspecified());
    (usable.into_iter().map(|ip| SocketAddr::new(ip, PORT_DOMAIN)).collect(), loopback.len())
}

/// An address with or without a port.
pub(in super::super) fn parse_upstream(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, PORT_DOMAIN));
    let address = address.or_else(|_| text.parse::<SocketAddr>()).map_err(|_| {
        format!("{text} is no address: write 192.0.2.1, 192.0.2.1:53, 2001:db8::1 or [2001:db8::1]:53")
    })?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_a_file() {
        let text = "# nameserver 192.0.2.9\nsearch a.test\nnameserver 192.0.2.1\n nameserver\t2001:db8::1  # x\n\
                    nameserver 127.0.0.53\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver nonsense\nnameserver\n\
                    nameserver ::ffff:192.0.2.2\noptions ndots:5\n";
        let (usable, loopback) = parse(text);
        let usable: Vec<_> = usable.iter().map(ToString::to_string).collect();
        assert_eq!(usable, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
        assert_eq!(loopback, 2);
    }

    #[test]
    fn addresses_with_and_without_a_port() {
        for (text, expected) in [
            ("192.0.2.1", "192.0.2.1:53"),
            ("192.0.2.1:5353", "192.0.2.1:5353"),
            ("2001:db8::1", "[2001:db8::1]:53"),
            ("[2001:db8::1]:5353", "[2001:db8::1]:5353"),
            ("::ffff:192.0.2.1", "192.0.2.1:53"),
        ] {
            assert_eq!(parse_upstream(text).unwrap().to_string(), expected, "{text}");
        }
        for text in ["", "dns.test", "192.0.2.1:", "[2001:db8::1]", "192.0.2.1:70000"] {
            assert!(parse_upstream(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn a_file_that_changes_is_read_again_and_one_that_is_gone_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        let mut seen = Seen::default();
        seen.look(&path);
        assert_eq!(seen.servers[..], []);
        for (text, expected) in
            [("nameserver 192.0.2.1\n", "192.0.2.1:53"), ("nameserver 2001:db8::1\n", "[2001:db8::1]:53")]
        {
            fs::write(&path, text).unwrap();
            seen.look(&path);
            assert_eq!(seen.servers[..], [expected.parse().unwrap()]);
        }
        fs::remove_file(&path).unwrap();
        seen.look(&path);
        assert_eq!(seen.servers.len(), 1);
        // A file that is too long.
        fs::write(&path, "nameserver 192.0.2.9\n".repeat(LONGEST)).unwrap();
        seen.look(&path);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        seen.look(&path);
        assert_eq!(seen.servers[..], ["[2001:db8::1]:53".parse().unwrap()]);
    }
}
