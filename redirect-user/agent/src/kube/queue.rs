//! A work queue of pods: each is processed once at a time, however often it is queued, now or after a delay.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Notify,
    idle: Notify,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<String>,
    queued: HashSet<String>,
    running: BTreeSet<String>,
    /// Queued while they were being processed.
    again: HashSet<String>,
    later: HashMap<String, Instant>,
}

impl State {
    fn add(&mut self, uid: &str) {
        self.later.remove(uid);
        if self.running.contains(uid) {
            self.again.insert(uid.into());
        } else if self.queued.insert(uid.into()) {
            self.ready.push_back(uid.into());
        }
    }

    fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.running.is_empty()
    }
}

impl Queue {
    /// Queues a pod.
    pub(super) fn add(&self, uid: &str) {
        self.state().add(uid);
        self.changed.notify_one();
    }

    /// Queues a pod after a delay, unless it is due sooner anyway.
    pub(super) fn add_later(&self, uid: &str, delay: Duration) {
        let due = Instant::now() + delay;
        let mut state = self.state();
        if !state.queued.contains(uid) && !state.again.contains(uid) {
            let at = state.later.entry(uid.into()).or_insert(due);
            *at = due.min(*at);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Waits for the next pod. No other worker gets it until [`Self::done`].
    pub(super) async fn next(&self) -> String {
        loop {
            let due = {
                let mut state = self.state();
                let now = Instant::now();
                let due: Vec<String> =
                    state.later.iter().filter(|(_, at)| **at <= now).map(|(uid, _)| uid.clone()).collect();
                for uid in due {
                    state.add(&uid);
                }
                if let Some(uid) = state.ready.pop_front() {
                    state.queued.remove(&uid);
                    state.running.insert(uid.clone());
                    // Another worker may have missed a second one.
                    self.changed.notify_one();
                    return uid;
                }
                state.later.values().min().copied()
            };
            let timer = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = timer => {}
            }
        }
    }

    pub(super) fn done(&self, uid: &str) {
        let mut state = self.state();
        state.running.remove(uid);
        if state.again.remove(uid) {
            state.add(uid);
        }
        let idle = state.is_idle();
        drop(state);
        self.changed.notify_one();
        if idle {
            self.idle.notify_waiters();
        }
    }

    /// Waits until no pod is due now.
    pub(super) async fn idle(&self) {
        loop {
            let mut notified = std::pin::pin!(self.idle.notified());
            // Registered before the check, so that no change in between is missed.
            notified.as_mut().enable();
            if self.state().is_idle() {
                return;
            }
            notified.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test(start_paused = true)]
    async fn each_pod_is_looked_at_by_one_at_a_time_and_again_if_asked() {
        let queue = Queue::default();
        queue.add("a");
        queue.add("b");
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert_eq!(queue.next().await, "b");
        assert!(timeout(SHORT, queue.next()).await.is_err(), "a is being looked at");
        queue.done("a");
        assert_eq!(queue.next().await, "a");
        queue.done("a");
        assert!(timeout(SHORT, queue.idle()).await.is_err());
        queue.done("b");
        queue.idle().await;
        assert!(timeout(SHORT, queue.next()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn later_comes_when_it_is_due_and_not_twice() {
        let queue = Queue::default();
        let began = Instant::now();
        queue.add_later("a", Duration::from_secs(60));
        queue.add_later("a", Duration::from_secs(30));
        queue.add_later("b", Duration::from_secs(60));
        queue.add("b");
        assert_eq!(queue.next().await, "b");
        queue.done("b");
        queue.idle().await;
        assert_eq!(queue.next().await, "a");
        assert_eq!(began.elapsed().as_secs(), 30);
        queue.done("a");
        assert!(timeout(Duration::from_secs(100), queue.next()).await.is_err());
    }
}
