//! Atomic operations on entries of maps.

use core::arch::asm;

/// Adds atomically, with wrap-around. `core` has no such operation for this target.
///
/// # Safety
///
/// The pointer is into an entry of a map.
#[inline(always)]
pub(super) unsafe fn add(counter: *mut u64, value: u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!("lock *(u64 *)({counter} + 0) += {value}", counter = in(reg) counter, value = in(reg) value);
    }
}
