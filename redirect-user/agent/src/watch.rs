//! Watches for interfaces that appear in enrolled pods, and for rules, routes and TC filters that other software removes there;
//! in placement `node`, on the host.
//!
//! One netlink socket in the agent's namespace receives the notifications of every namespace that has an ID there
//! (`NETLINK_LISTEN_ALL_NSID`), so the agent need not poll pods.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::mem::{MaybeUninit, size_of_val};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::sync::mpsc;

use redirect_linux::netlink::Netlink;
use redirect_linux::netns::NetNs;

/// The namespaces that are watched.
pub(crate) struct Watch {
    netlink: Mutex<Netlink>,
    /// Whether what is removed on the host is of interest.
    host: bool,
    /// UIDs of pods by namespace ID.
    followed: Mutex<HashMap<i32, String>>,
}

/// What was noticed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Something in the namespace of the pod of this UID has changed.
    Changed(String),
    /// Something was removed on the host.
    Host,
    /// A filter was removed from the device of the host with this index.
    Device(u32),
    /// Events were lost: any pod may have changed.
    Lost,
}

const GROUPS: [u32; 6] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_TC,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// Room for what comes while the thread is not running, in bytes.
const BUFFER: i32 = 1 << 20;

/// How long messages are left to gather.
const PAUSE: Duration = Duration::from_millis(5);

/// How many of them are read before what they say is passed on.
const BATCH: usize = 1024;

/// How many events may wait; when they are more, they are treated as lost.
const QUEUE: usize = 256;

impl Watch {
    /// Watches pods, and the host or not, once somebody listens.
    pub(super) fn new(host: bool) -> io::Result<Arc<Self>> {
        let netlink = Mutex::new(Netlink::open()?);
        Ok(Arc::new(Self { netlink, host, followed: Mutex::default() }))
    }

    /// Starts to listen. Events end with an error, or when the receiver is dropped.
    pub(super) fn listen(self: &Arc<Self>) -> io::Result<mpsc::Receiver<io::Result<Event>>> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_listen_all_namespaces(true)?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_rx_buf_sz(BUFFER)?;
        let (events, receiver) = mpsc::channel(QUEUE);
        let watcher = Arc::clone(self);
        thread::Builder::new().name("watch".into()).spawn(move || watcher.read(&socket, &events))?;
        Ok(receiver)
    }

    /// Watches a pod's namespace.
    pub(super) fn follow(&self, uid: &str, netns: &NetNs) -> io::Result<()> {
        let id = self.netlink.lock().unwrap_or_else(PoisonError::into_inner).namespace_id(netns)?;
        let mut followed = self.followed();
        // An older sandbox of the pod may have had another.
        followed.retain(|_, known| known != uid);
        followed.insert(id, uid.to_owned());
        Ok(())
    }

    /// Watches it no more.
    pub(super) fn unfollow(&self, uid: &str) {
        self.followed().retain(|_, followed| followed != uid);
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<i32, String>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, socket: &Socket, events: &mpsc::Sender<io::Result<Event>>) {
        loop {
            let batch = match next_batch(socket) {
                Ok(changes) => {
                    let followed = self.followed();
                    let event = |change| match change {
                        Change::OnHost => self.host.then_some(Event::Host),
                        Change::OnDevice(_) if self.host => Some(Event::Host),
                        Change::OnDevice(index) => Some(Event::Device(index)),
                        Change::InNamespace(id) => followed.get(&id).cloned().map(Event::Changed),
                    };
                    changes.into_iter().filter_map(event).collect()
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => vec![Event::Lost],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Whoever listens is gone or ends by it.
                    let _ = events.blocking_send(Err(error));
                    return;
                }
            };
            for event in batch {
                match events.try_send(Ok(event)) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(_)) => {
                        if events.blocking_send(Ok(Event::Lost)).is_err() {
                            return;
                        }
                    }
                    Err(mpsc::error::TrySendError::Closed(_)) => return,
                }
            }
        }
    }
}

/// Waits for a message, and returns what has changed by it and by those that come soon after it.
///
/// Enrolments send dozens of messages. Whoever sends one pays for waking a thread that waits for it, so that this one does not
/// wait for each.
fn next_batch(socket: &Socket) -> io::Result<BTreeSet<Change>> {
    let mut changes: BTreeSet<Change> = next_change(socket, 0)?.into_iter().collect();
    thread::sleep(PAUSE);
    for _ in 0..BATCH {
        match next_change(socket, libc::MSG_DONTWAIT) {
            Ok(change) => changes.extend(change),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(changes)
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    /// Something in the namespace with this ID has changed.
    InNamespace(i32),
    /// Something was removed from the socket's own namespace.
    OnHost,
    /// A filter was removed from the device with this index in the socket's own namespace.
    OnDevice(u32),
}

/// The type of a message.
fn kind(packet: &[u8]) -> u16 {
    // After the length.
    let [_, _, _, _, low, high, ..] = *packet else { return 0 };
    u16::from_ne_bytes([low, high])
}

/// The index of the device whose filters a message is about: in `struct tcmsg`, behind the header.
fn device(packet: &[u8]) -> u32 {
    packet.get(20..24).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Whether a message calls for a look at its namespace: any about a link, and those about what is removed. What it says
/// beyond that does not matter.
fn is_of_interest(packet: &[u8]) -> bool {
    kind(packet) == libc::RTM_NEWLINK || kind(packet) == libc::RTM_DELROUTE || removes(packet)
}

/// Whether a message says that something was removed that can be ours on the host, where others' routes come and go.
fn removes(packet: &[u8]) -> bool {
    const TABLE: usize = 20;
    match kind(packet) {
        libc::RTM_DELLINK | libc::RTM_DELRULE | libc::RTM_DELQDISC | libc::RTM_DELTFILTER => true,
        // Tables whose number does not fit have this one.
        libc::RTM_DELROUTE => packet.get(TABLE) == Some(&libc::RT_TABLE_COMPAT),
        _ => false,
    }
}

/// Receives a message and returns what has changed, if that is of interest.
fn next_change(socket: &Socket, flags: libc::c_int) -> io::Result<Option<Change>> {
    let mut packet = [0u8; 8192];
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
    // SAFETY: zero is a valid value for every field.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: all buffers live for the length of the call, with the lengths that the header says.
    if unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if !is_of_interest(&packet) {
        return Ok(None);
    }
    // SAFETY: the kernel filled the header in.
    let mut entry = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !entry.is_null() {
        // SAFETY: the entry lies within the control buffer.
        let header = unsafe { *entry };
        if header.cmsg_level == libc::SOL_NETLINK && header.cmsg_type == libc::NETLINK_LISTEN_ALL_NSID {
            // SAFETY: an entry of this type holds an int.
            let data = unsafe { libc::CMSG_DATA(entry) }.cast::<i32>();
            // SAFETY: as above; it need not be aligned.
            return Ok(Some(Change::InNamespace(unsafe { data.read_unaligned() })));
        }
        // SAFETY: the header and the entry are the kernel's.
        entry = unsafe { libc::CMSG_NXTHDR(&raw const message, entry) };
    }
    Ok(removes(&packet).then(|| match kind(&packet) {
        libc::RTM_DELQDISC | libc::RTM_DELTFILTER => Change::OnDevice(device(&packet)),
        _ => Change::OnHost,
    }))
}
