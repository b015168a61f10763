//! Watches for interfaces, addresses and routes that appear in enrolled pods, and for rules, routes and TC filters that other
//! software removes there; in placement `node`, on the host.
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

/// The watched namespaces.
pub(crate) struct Watch {
    netlink: Mutex<Netlink>,
    /// Whether to report removals on the host.
    host: bool,
    /// Pods by namespace ID.
    followed: Mutex<HashMap<i32, Followed>>,
    /// The current listener's marker.
    marker: Mutex<Option<Marker>>,
    /// The number of the latest mark.
    marks: AtomicU32,
    /// The number of the latest mark that was inserted.
    marked: AtomicU32,
}

struct Followed {
    uid: String,
    /// The mark between the notifications from before the pod was followed and those from after. Earlier ones do not matter:
    /// the caller observes the namespace after it follows the pod.
    since: u32,
}

/// The reported events.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The namespace of the pod with this UID has changed.
    Changed(String),
    /// An object was removed on the host.
    Host,
    /// A filter was removed from the host's device with this index.
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

/// The socket's buffer, for notifications while the thread is not running, in bytes.
const BUFFER: i32 = 1 << 20;

/// How long to let messages accumulate.
const PAUSE: Duration = Duration::from_millis(5);

/// How many messages to read before reporting their changes.
const BATCH: usize = 1024;

/// The capacity of the event queue; an overflow counts as lost events.
const QUEUE: usize = 256;

impl Watch {
    /// Watches pods, and optionally the host, from the first listener on.
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

    /// Watches a pod's namespace for changes from now on. To be called before the pod is observed.
    pub(super) fn follow(&self, uid: &str, netns: &NetNs) -> io::Result<()> {
        let id = self.netlink.lock().namespace_id(netns)?;
        let since = self.mark();
        let mut followed = self.followed();
        // An older sandbox of the pod may have had another ID.
        followed.retain(|_, known| known.uid != uid);
        followed.insert(id, Followed { uid: uid.to_owned(), since });
        Ok(())
    }

    /// Inserts a mark into the notifications at this moment.
    fn mark(&self) -> u32 {
        let marker = self.marker.lock();
        let number = self.marks.fetch_add(1, Ordering::Relaxed) + 1;
        match marker.as_ref().map(|marker| marker.mark(number)) {
            Some(Ok(())) => {
                self.marked.fetch_max(number, Ordering::Release);
                number
            }
            // All notifications are after it.
            Some(Err(_)) | None => 0,
        }
    }

    /// Stops watching it.
    pub(super) fn unfollow(&self, uid: &str) {
        self.followed().retain(|_, followed| followed.uid != uid);
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<i32, Followed>> {
        self.followed.lock()
    }

    fn read(&self, notifications: &mut Notifications, events: &mpsc::Sender<io::Result<Event>>) {
        // Marks from before this thread listened are not among its notifications.
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
                    // The receiver is gone, or ends by this error.
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

    /// Waits for a message, and returns the changes of this one and of those that follow shortly. `reached` is the latest mark
    /// before them.
    ///
    /// Enrollments send dozens of messages, and each sender pays for waking a waiting thread. So this thread does not wait for
    /// each message.
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
                    // Marks that were lost with other notifications never arrive.
                    *reached = marked.max(*reached);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changes)
    }
}

/// Whether notifications were lost, because the buffer was full or because they can't be parsed.
fn is_lost(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS) || error.kind() == io::ErrorKind::InvalidData
}

/// The change that a message reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    /// The namespace with this ID has changed, after this mark.
    InNamespace {
        /// The ID.
        id: i32,
        /// The mark.
        mark: u32,
    },
    /// An object was removed from the socket's own namespace.
    OnHost,
    /// A filter was removed from the device with this index in the socket's own namespace.
    OnDevice(u32),
}

/// The relevant changes of a notification; its details do not matter.
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

/// Whether a message requires observing its namespace: any about a link, removals, and new addresses or routes of the pod itself
/// (a route indicates either). Enrollment itself sets `lo` up.
fn is_of_interest(message: &Raw) -> bool {
    let is_up = message.word(IFI_FLAGS) & libc::IFF_UP.cast_unsigned() != 0;
    match message.kind() {
        libc::RTM_NEWLINK => message.word(IFI_INDEX) != LOOPBACK_INDEX || !is_up,
        libc::RTM_NEWROUTE => netlink::is_of_interest(message),
        libc::RTM_DELROUTE => true,
        _ => removes(message),
    }
}

/// Whether a message reports a removal that may concern us on the host, where routes of other software come and go.
fn removes(message: &Raw) -> bool {
    match message.kind() {
        libc::RTM_DELLINK | libc::RTM_DELRULE | libc::RTM_DELQDISC | libc::RTM_DELTFILTER => true,
        // Tables with large numbers have this one.
        libc::RTM_DELROUTE => message.byte(RTM_TABLE) == libc::RT_TABLE_COMPAT,
        _ => false,
    }
}

/// The offset of the device's index in `struct ifinfomsg`.
const IFI_INDEX: usize = 4;
/// The offset of the device's flags.
const IFI_FLAGS: usize = 8;
/// The offset of the device's index in `struct tcmsg`.
const TCM_IFINDEX: usize = 4;
/// The offset of the table's number in `struct rtmsg`.
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
        // Namespaces with IDs are reported from then on.
        for netns in [&pod, &other] {
            watch.netlink.lock().namespace_id(netns).unwrap();
        }
        watch.follow("other", &other).unwrap();
        // Changes that a CNI plugin makes, and changes by enrollment.
        change(&pod, |netlink| netlink.add_pair("eth0", "peer"));
        watch.follow("pod", &pod).unwrap();
        change(&pod, |netlink| netlink.set_up(LOOPBACK_INDEX));
        // All of those come before this mark.
        let mut heard = Vec::new();
        for device in ["eth0", "eth1"] {
            change(&other, |netlink| netlink.add_pair(device, &format!("{device}-peer")));
            heard.push(events.recv().await.unwrap().unwrap());
        }
        assert!(heard.iter().all(|event| *event == Event::Changed("other".into())), "{heard:?}");

        for again in [false, true] {
            if again {
                // A new listener also gets changes of pods that were followed before.
                events = watch.listen().unwrap();
            }
            let device = format!("net{}", u8::from(again));
            change(&pod, |netlink| netlink.add_pair(&device, &format!("{device}-peer")));
            while events.recv().await.unwrap().unwrap() != Event::Changed("pod".into()) {}
        }
    }
}
