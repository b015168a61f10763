//! Passes the kernel side's drop log on to the agent's log. It is off, and the programs are loaded without it, unless the
//! agent's log enables [`TARGET`] at level debug when the agent starts.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use redirect_ebpf::diagnostics::TARGET;
use redirect_ebpf::flow::FlowState;
use tokio::io::unix::AsyncFd;
use tokio::time::{MissedTickBehavior, interval};
use tracing::Level;

use super::linux::Linux;
use crate::handle::DatapathHandle;

/// Whether the agent's log level enables the drop log.
pub fn is_wanted() -> bool {
    tracing::enabled!(target: TARGET, Level::DEBUG)
}

/// Forwards records while the agent runs, and periodically the number of lost ones.
pub async fn follow(every: Duration, kernel: DatapathHandle<Linux>) -> anyhow::Result<()> {
    let Some((logger, read)) = kernel.run(Linux::take_log).await? else {
        anyhow::bail!("there is no log, or somebody reads it")
    };
    // SAFETY: the ring buffer's descriptor never changes, and stays open as long as the buffer exists.
    let mut logger = unsafe { AsyncFd::register(logger) }?;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lost = Lost::default();
    loop {
        let counted = tokio::select! {
            ready = logger.readable_mut() => {
                ready?.clear_ready();
                None
            }
            _ = ticks.tick() => Some(kernel.run(|linux| linux.diagnostics()).await?.context("what was lost")?),
        };
        // Every record that is counted by now is in the buffer by now.
        logger.get_mut().flush();
        if let Some(counted) = counted {
            lost.tell(counted, read.load(Ordering::Relaxed));
        }
    }
}

/// Records lost, as last reported.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lost {
    /// To the limit.
    limit: u64,
    /// Because the ring buffer was full.
    full: u64,
}

impl Lost {
    fn tell(&mut self, counted: FlowState, read: u32) {
        let Self { limit, full } = self.grow(counted, read);
        if limit + full > 0 {
            tracing::debug!(target: TARGET, limit, full, "drop log entries lost");
        }
    }

    /// The losses since the last report. `read` is the number of records read after `counted` was taken.
    fn grow(&mut self, counted: FlowState, read: u32) -> Self {
        let written = counted.seen.wrapping_sub(counted.limited as u32);
        let unread = u64::try_from(written.wrapping_sub(read).cast_signed()).unwrap_or(0);
        let now = Self { limit: counted.limited, full: unread.max(self.full) };
        let before = std::mem::replace(self, now);
        Self { limit: self.limit - before.limit, full: self.full - before.full }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(seen: u32, limited: u64) -> FlowState {
        FlowState { seen, limited, ..FlowState::default() }
    }

    #[test]
    fn what_is_lost_is_told_once() {
        let mut lost = Lost::default();
        assert_eq!(lost.grow(state(5, 2), 3), Lost::default().with(2, 0), "all that was written was read");
        assert_eq!(lost.grow(state(9, 3), 4), Lost::default().with(1, 2), "of six that were written");
        assert_eq!(lost.grow(state(9, 3), 4), Lost::default());
        assert_eq!(lost.grow(state(9, 3), 5), Lost::default(), "written after it was counted");
        assert_eq!(lost.grow(state(11, 3), 5), Lost::default().with(0, 1));
    }

    #[test]
    fn counters_that_begin_anew_are_no_losses() {
        let mut lost = Lost::default();
        assert_eq!(lost.grow(state(u32::MAX, 0), u32::MAX), Lost::default());
        assert_eq!(lost.grow(state(4, 0), 4), Lost::default());
        assert_eq!(lost.grow(state(6, 0), 8), Lost::default(), "more was read than counted");
    }

    impl Lost {
        const fn with(self, limit: u64, full: u64) -> Self {
            Self { limit, full }
        }
    }
}
