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

/// Marks a point where another thread may run; tests of schedules run another task there.
#[cfg(not(test))]
async fn give_way() {}

/// Longer than most operations take; one that waits for a proxy takes much longer.
const MOMENT: Duration = Duration::from_millis(300);

type Slot<T> = Arc<Mutex<Option<T>>>;

/// Locks a value, or the empty slot for it. No other task removes the slot in the meantime.
pub(super) type Guard<T> = OwnedMutexGuard<Option<T>>;

#[derive(Debug)]
pub(super) struct Slots<T>(Mutex<HashMap<String, Slot<T>>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Slots<T> {
    /// Waits for the slot of this name, and creates it if there is none. The caller has to [`Self::release`] it, because it may
    /// be empty.
    pub(super) async fn lock(&self, name: &str) -> Guard<T> {
        loop {
            let slot = Arc::clone(self.all().await.entry(name.into()).or_default());
            if let Some(place) = self.hold(name, slot).await {
                return place;
            }
        }
    }

    /// Waits for the slot of this name, if there is one.
    pub(super) async fn find(&self, name: &str) -> Option<Guard<T>> {
        loop {
            let slot = Arc::clone(self.all().await.get(name)?);
            if let Some(place) = self.hold(name, slot).await {
                return Some(place);
            }
        }
    }

    /// `None` if the previous holder has removed the slot.
    async fn hold(&self, name: &str, slot: Slot<T>) -> Option<Guard<T>> {
        give_way().await;
        let place = Arc::clone(&slot).lock_owned().await;
        let is_there = self.all().await.get(name).is_some_and(|current| Arc::ptr_eq(current, &slot));
        is_there.then_some(place)
    }

    /// The slot of this name, if there is one and no operation holds it.
    pub(super) async fn find_idle(&self, name: &str) -> Option<Guard<T>> {
        Arc::clone(self.all().await.get(name)?).try_lock_owned().ok()
    }

    /// Releases the slot of this name, and removes it if it is empty.
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

    /// Visits all values in the order of their names, except those that an operation holds for longer than a moment.
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

    /// Removes all values and returns them. Waits for operations in progress.
    pub(super) async fn drain(&self) -> Vec<T> {
        let slots: Vec<Slot<T>> = self.all().await.drain().map(|(_, slot)| slot).collect();
        let mut things = Vec::new();
        for slot in slots {
            things.extend(slot.lock().await.take());
        }
        things
    }
}
