//! Watches for interfaces, addresses and routes that appear in enrolled pods, and for rules, routes and TC filters that other software
//! removes there; in placement `node`, on the host.
//!
//! One netlink socket in the agent's namespace receives the notifications of every namespace that has an ID there
//! (`NETLINK_LISTEN_ALL_NSID`), so the agent need not poll pods.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;

use redirect_linux::netlink::notifications::{Marker, Notification, Notifications};
use redirect_linux::netlink::{self, LOOPBACK_INDEX, Netlink, Raw};
use redirect_linux::netns::NetNs;

/// The namespaces that are watched.
pub(crate) struct Watch {
    netlink: Mutex<Netlink>,
    /// Whether what is removed on the host is of interest.
    host: bool,
    /// Pods by namespace ID.
    followed: Mutex<HashMap<i32, Followed>>,
    /// Of who listens now.
    marker: Mutex<Option<Marker>>,
    /// The number of the latest mark.
    marks: AtomicU32,
    /// The number of the latest mark that was made.
    marked: AtomicU32,
}

struct Followed {
    uid: String,
    /// The mark that is between what was said before the pod was followed and what was said after. What was said before is of
    /// no interest: whoever follows the pod looks at its namespace afterwards.
    since: u32,
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
        Ok(Arc::new(Self {
            netlink,
            host,
            followed: Mutex::default(),
            marker: Mutex::default(),
            marks: AtomicU32::new(0),
            marked: AtomicU32::new(0),
        }))
    }

    /// Starts to listen. Events end with an error, or when the receiver is dropped.
    pub(super) fn listen(self: &Arc<Self>) -> io::Result<mpsc::Receiver<io::Result<Event>>> {
        let mut notifications = Notifications::open(&GROUPS, BUFFER)?;
        *self.marker.lock() = Some(notifications.marker()?);
        let (events, receiver) = mpsc::channel(QUEUE);
        let watcher = Arc::clone(self);
        thread::Builder::new()
            .name("watch".into())
            .spawn(move || watcher.read(&mut notifications, &events))?;
        Ok(receiver)
    }

    /// Watches a pod's namespace: whatever changes there from now on. To be called before it is looked at.
    pub(super) fn follow(&self, uid: &str, netns: &NetNs) -> io::Result<()> {
        let id = self.netlink.lock().namespace_id(netns)?;
        let since = self.mark();
        let mut followed = self.followed();
        // An older sandbox of the pod may have had another.
        followed.retain(|_, known| known.uid != uid);
        followed.insert(id, Followed { uid: uid.to_owned(), since });
        Ok(())
    }

    /// Marks this moment among the notifications.
    fn mark(&self) -> u32 {
        let marker = self.marker.lock();
        let number = self.marks.fetch_add(1, Ordering::Relaxed) + 1;
        match marker.as_ref().map(|marker| marker.mark(number)) {
            Some(Ok(())) => {
                self.marked.fetch_max(number, Ordering::Release);
                number
            }
            // Everything is after it.
            Some(Err(_)) | None => 0,
        }
    }

    /// Watches it no more.
    pub(super) fn unfollow(&self, uid: &str) {
        self.followed().retain(|_, followed| followed.uid != uid);
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<i32, Followed>> {
        self.followed.lock()
    }

    fn read(&self, notifications: &mut Notifications, events: &mpsc::Sender<io::Result<Event>>) {
        // Those that were made before this thread listened are not among its notifications.
        let mut reached = self.marks.load(Ordering::Relaxed);
        loop {
            let batch = match self.next_batch(notifications, &mut reached) {
                Ok(changes) => {
                    let followed = self.followed();
                    let event = |change| match change {
                        Change::OnHost => self.host.then_some(Event::Host),
                        Change::OnDevice(_) if self.host => Some(Event::Host),
                        Change::OnDevice(index) => Some(Event::Device(index)),
                        Change::InNamespace { id, mark } => {
                            let followed = followed.get(&id).filter(|followed| followed.since <= mark)?;
                            Some(Event::Changed(followed.uid.clone()))
                        }
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

    /// Waits for a message, and returns what has changed by it and by those that come soon after it. `reached` is the latest mark
    /// before them.
    ///
    /// Enrollments send dozens of messages. Whoever sends one pays for waking a thread that waits for it, so that this one does not
    /// wait for each.
    fn next_batch(
        &self,
        notifications: &mut Notifications,
        reached: &mut u32,
    ) -> io::Result<BTreeSet<Change>> {
        let mut changes = BTreeSet::new();
        let mut add = |notification: &Notification, reached: &mut u32| {
            *reached = notification.mark.unwrap_or(0).max(*reached);
            changes.extend(changes_by(notification, *reached));
        };
        add(&notifications.wait()?, reached);
        thread::sleep(PAUSE);
        for _ in 0..BATCH {
            let marked = self.marked.load(Ordering::Acquire);
            match notifications.poll() {
                Ok(notification) => add(&notification, reached),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // What was lost with notifications does not come any more.
                    *reached = marked.max(*reached);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changes)
    }
}

/// Whether notifications are missing, because there was no room for them or because they can't be understood.
fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS) || error.kind() == io::ErrorKind::InvalidData
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    /// Something in the namespace with this ID has changed, after this mark.
    InNamespace {
        /// The ID.
        id: i32,
        /// The mark.
        mark: u32,
    },
    /// Something was removed from the socket's own namespace.
    OnHost,
    /// A filter was removed from the device with this index in the socket's own namespace.
    OnDevice(u32),
}

/// What has changed by a notification, as far as that is of interest: what it says beyond that does not matter.
fn changes_by(notification: &Notification, mark: u32) -> impl Iterator<Item = Change> {
    let change = move |message: &Raw| match notification.namespace {
        Some(id) => is_of_interest(message).then_some(Change::InNamespace { id, mark }),
        None => removes(message).then(|| match message.kind() {
            libc::RTM_DELQDISC | libc::RTM_DELTFILTER => Change::OnDevice(message.word(TCM_IFINDEX)),
            _ => Change::OnHost,
        }),
    };
    notification.messages.iter().filter_map(change)
}

/// Whether a message calls for a look at its namespace: any about a link, those about what is removed, and those about an address or
/// a route of the pod's own that is new: a route says of either. Enrollment itself sets `lo` up.
fn is_of_interest(message: &Raw) -> bool {
    let is_up = message.word(IFI_FLAGS) & libc::IFF_UP.cast_unsigned() != 0;
    match message.kind() {
        libc::RTM_NEWLINK => message.word(IFI_INDEX) != LOOPBACK_INDEX || !is_up,
        libc::RTM_NEWROUTE => netlink::is_of_interest(message),
        libc::RTM_DELROUTE => true,
        _ => removes(message),
    }
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

/// Where `struct ifinfomsg` has the index of the device.
const IFI_INDEX: usize = 4;
/// Where it has the device's flags.
const IFI_FLAGS: usize = 8;
/// Where `struct tcmsg` has the index of the device.
const TCM_IFINDEX: usize = 4;
/// Where `struct rtmsg` has the number of the table.
const RTM_TABLE: usize = 4;

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn namespace() -> Option<NetNs> {
        let thread = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).ok()?;
            Some(NetNs::current().unwrap())
        });
        thread.join().unwrap()
    }

    fn change(netns: &NetNs, work: impl FnOnce(&mut Netlink) -> io::Result<()> + Send) {
        netns.run(move || work(&mut Netlink::open().unwrap())).unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_changed_before_a_pod_was_followed_is_of_no_interest() {
        let (Some(pod), Some(other)) = (namespace(), namespace()) else {
            let name = "what_changed_before_a_pod_was_followed_is_of_no_interest";
            return redirect_testing::skip(name, "needs root");
        };
        let watch = Watch::new(false).unwrap();
        let mut events = watch.listen().unwrap();
        // Namespaces with IDs are heard of from then on.
        for netns in [&pod, &other] {
            watch.netlink.lock().namespace_id(netns).unwrap();
        }
        watch.follow("other", &other).unwrap();
        // What a CNI plugin does, and what enrollment does.
        change(&pod, |netlink| netlink.add_pair("eth0", "peer"));
        watch.follow("pod", &pod).unwrap();
        change(&pod, |netlink| netlink.set_up(LOOPBACK_INDEX));
        // All of that was said before this.
        let mut heard = Vec::new();
        for device in ["eth0", "eth1"] {
            change(&other, |netlink| netlink.add_pair(device, &format!("{device}-peer")));
            heard.push(events.recv().await.unwrap().unwrap());
        }
        assert!(heard.iter().all(|event| *event == Event::Changed("other".into())), "{heard:?}");

        for again in [false, true] {
            if again {
                // Whoever listens anew hears of pods that were followed before.
                events = watch.listen().unwrap();
            }
            let device = format!("net{}", u8::from(again));
            change(&pod, |netlink| netlink.add_pair(&device, &format!("{device}-peer")));
            while events.recv().await.unwrap().unwrap() != Event::Changed("pod".into()) {}
        }
    }
}
