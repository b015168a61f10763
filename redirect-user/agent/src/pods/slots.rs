//! Named slots, each behind its own lock, so that work on one does not wait for work on another.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout_at};

/// Longer than it takes to look after a thing; whoever waits for a proxy to let go of one takes much longer.
const MOMENT: Duration = Duration::from_millis(300);

type Slot<T> = Arc<Mutex<Option<T>>>;

/// Holds a thing, or the place where it will be.
pub(super) type Guard<T> = OwnedMutexGuard<Option<T>>;

#[derive(Debug)]
pub(super) struct Slots<T>(Mutex<HashMap<String, Slot<T>>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Slots<T> {
    /// Waits for the place of this name, and makes it if there is none. [`Self::tidy`] once it is left empty.
    pub(super) async fn lock(&self, name: &str) -> Guard<T> {
        loop {
            let slot = Arc::clone(self.0.lock().await.entry(name.into()).or_default());
            let guard = Arc::clone(&slot).lock_owned().await;
            // While this waited, the place may have been tidied away.
            if self.0.lock().await.get(name).is_some_and(|current| Arc::ptr_eq(current, &slot)) {
                return guard;
            }
        }
    }

    /// Waits for the place of this name, if there is one.
    pub(super) async fn find(&self, name: &str) -> Option<Guard<T>> {
        let slot = Arc::clone(self.0.lock().await.get(name)?);
        Some(slot.lock_owned().await)
    }

    /// The place of this name, if there is one and nobody works on it.
    pub(super) async fn find_idle(&self, name: &str) -> Option<Guard<T>> {
        Arc::clone(self.0.lock().await.get(name)?).try_lock_owned().ok()
    }

    /// Removes an empty place. Returns whether nothing of this name is left.
    pub(super) async fn tidy(&self, name: &str) -> bool {
        let mut slots = self.0.lock().await;
        if slots.get(name).is_some_and(|slot| slot.try_lock().is_ok_and(|slot| slot.is_none())) {
            slots.remove(name);
        }
        !slots.contains_key(name)
    }

    pub(super) async fn names(&self) -> Vec<String> {
        self.0.lock().await.keys().cloned().collect()
    }

    /// Looks at everything that is not being worked on for longer than a moment, in the order of the names.
    pub(super) async fn each<R>(&self, mut look: impl FnMut(&str, &T) -> R) -> Vec<R> {
        let mut slots: Vec<(String, Slot<T>)> =
            self.0.lock().await.iter().map(|(name, slot)| (name.clone(), Arc::clone(slot))).collect();
        slots.sort_by(|a, b| a.0.cmp(&b.0));
        let patience = Instant::now() + MOMENT;
        let mut seen = Vec::new();
        for (name, slot) in &slots {
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
        let slots: Vec<Slot<T>> = self.0.lock().await.drain().map(|(_, slot)| slot).collect();
        let mut things = Vec::new();
        for slot in slots {
            things.extend(slot.lock().await.take());
        }
        things
    }
}
