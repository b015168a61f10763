//! A task of a schedule yields before it takes a lock, because another thread could run there.

use std::cell::Cell;
use std::future::poll_fn;
use std::task::Poll;

thread_local! {
    /// Whether this thread is polling a task of a schedule.
    pub(in crate::pods) static IN_SCHEDULE: Cell<bool> = const { Cell::new(false) };
}

pub(super) async fn give_way() {
    let mut given = !IN_SCHEDULE.get();
    poll_fn(|context| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
