//! Named slots, each behind its own lock, so that work on one does not wait for work on another.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard};
use tokio::time::{Instant, timeout_at};

#[cfg(test)]
pub(super) mod scheduled;
#[cfg(test)]
use scheduled::give_way;

/// Where another thread may come in between, a test of schedules lets another task do so.
#[cfg(not(test))]
async fn give_way() {}

/// Longer than it takes to look after a thing; whoever waits for a proxy to let go of one takes much longer.
const MOMENT: Duration = Duration::from_millis(300);

type Slot<T> = Arc<Mutex<Option<T>>>;

/// Holds a thing, or the place where it will be. Nobody else removes the place meanwhile.
pub(super) type Guard<T> = OwnedMutexGuard<Option<T>>;

#[derive(Debug)]
pub(super) struct Slots<T>(Mutex<HashMap<String, Slot<T>>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Slots<T> {
    /// Waits for the place of this name, and makes it if there is none. [`Self::release`] it: it may be empty.
    pub(super) async fn lock(&self, name: &str) -> Guard<T> {
        loop {
            let slot = Arc::clone(self.all().await.entry(name.into()).or_default());
            if let Some(place) = self.hold(name, slot).await {
                return place;
            }
        }
    }

    /// Waits for the place of this name, if there is one.
    pub(super) async fn find(&self, name: &str) -> Option<Guard<T>> {
        loop {
            let slot = Arc::clone(self.all().await.get(name)?);
            if let Some(place) = self.hold(name, slot).await {
                return Some(place);
            }
        }
    }

    /// `None` if whoever had the place has removed it.
    async fn hold(&self, name: &str, slot: Slot<T>) -> Option<Guard<T>> {
        give_way().await;
        let place = Arc::clone(&slot).lock_owned().await;
        let is_there = self.all().await.get(name).is_some_and(|current| Arc::ptr_eq(current, &slot));
        is_there.then_some(place)
    }

    /// The place of this name, if there is one and nobody works on it.
    pub(super) async fn find_idle(&self, name: &str) -> Option<Guard<T>> {
        Arc::clone(self.all().await.get(name)?).try_lock_owned().ok()
    }

    /// Lets go of the place of this name, and removes it if it is empty.
    pub(super) async fn release(&self, name: &str, place: Guard<T>) {
        if place.is_none() {
            self.all().await.remove(name);
        }
    }

    async fn all(&self) -> MutexGuard<'_, HashMap<String, Slot<T>>> {
        give_way().await;
        self.0.lock().await
    }

    pub(super) async fn names(&self) -> Vec<String> {
        self.all().await.keys().cloned().collect()
    }

    /// Looks at everything that is not being worked on for longer than a moment, in the order of the names.
    pub(super) async fn each<R>(&self, mut look: impl FnMut(&str, &T) -> R) -> Vec<R> {
        let mut slots: Vec<(String, Slot<T>)> =
            self.all().await.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect();
        slots.sort_by(|a, b| a.0.cmp(&b.0));
        let patience = Instant::now() + MOMENT;
        let mut seen = Vec::new();
        for (name, slot) in &slots {
            give_way().await;
            if let Ok(guard) = timeout_at(patience, slot.lock()).await
                && let Some(thing) = &*guard
            {
                seen.push(look(name, thing));
            }
        }
        seen
    }

    /// Takes everything out, waiting for what is being worked on.
    pub(super) async fn drain(&self) -> Vec<T> {
        let slots: Vec<Slot<T>> = self.all().await.drain().map(|(_, slot)| slot).collect();
        let mut things = Vec::new();
        for slot in slots {
            things.extend(slot.lock().await.take());
        }
        things
    }
}
