//! Watches for interfaces that appear in enrolled pods, and for rules, routes and TC filters that other software removes there;
//! in placement `node`, on the host.
//!
//! One netlink socket in the agent's namespace receives the notifications of every namespace that has an ID there
//! (`NETLINK_LISTEN_ALL_NSID`), so the agent need not poll pods.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;

use redirect_linux::netlink::notifications::{Notification, Notifications};
use redirect_linux::netlink::{Netlink, Raw};
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
        let mut notifications = Notifications::open(&GROUPS, BUFFER)?;
        let (events, receiver) = mpsc::channel(QUEUE);
        let watcher = Arc::clone(self);
        thread::Builder::new()
            .name("watch".into())
            .spawn(move || watcher.read(&mut notifications, &events))?;
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

    fn read(&self, notifications: &mut Notifications, events: &mpsc::Sender<io::Result<Event>>) {
        loop {
            let batch = match next_batch(notifications) {
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
                Err(error) if is_lost(&error) => vec![Event::Lost],
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
fn next_batch(notifications: &mut Notifications) -> io::Result<BTreeSet<Change>> {
    let mut changes: BTreeSet<Change> = changes_by(&notifications.wait()?).collect();
    thread::sleep(PAUSE);
    for _ in 0..BATCH {
        match notifications.poll() {
            Ok(notification) => changes.extend(changes_by(&notification)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(changes)
}

/// Whether notifications are missing, because there was no room for them or because they can't be understood.
fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS) || error.kind() == io::ErrorKind::InvalidData
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

/// What has changed by a notification, as far as that is of interest: what it says beyond that does not matter.
fn changes_by(notification: &Notification) -> impl Iterator<Item = Change> {
    let change = |message: &Raw| match notification.namespace {
        Some(id) => is_of_interest(message).then_some(Change::InNamespace(id)),
        None => removes(message).then(|| match message.kind() {
            libc::RTM_DELQDISC | libc::RTM_DELTFILTER => Change::OnDevice(message.word(TCM_IFINDEX)),
            _ => Change::OnHost,
        }),
    };
    notification.messages.iter().filter_map(change)
}

/// Whether a message calls for a look at its namespace: any about a link, and those about what is removed.
fn is_of_interest(message: &Raw) -> bool {
    message.kind() == libc::RTM_NEWLINK || message.kind() == libc::RTM_DELROUTE || removes(message)
}

/// Whether a message says that something was removed that can be ours on the host, where others' routes come and go.
fn removes(message: &Raw) -> bool {
    match message.kind() {
        libc::RTM_DELLINK | libc::RTM_DELRULE | libc::RTM_DELQDISC | libc::RTM_DELTFILTER => true,
        // Tables whose number does not fit have this one.
        libc::RTM_DELROUTE => message.byte(RTM_TABLE) == libc::RT_TABLE_COMPAT,
        _ => false,
    }
}

/// Where `struct tcmsg` has the index of the device.
const TCM_IFINDEX: usize = 4;
/// Where `struct rtmsg` has the number of the table.
const RTM_TABLE: usize = 4;
