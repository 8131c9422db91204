//! Locks.
//!
//! Lock order: a transport's registers, then its device, then the poller's
//! table. The event loop takes a device alone; nothing waits while it holds one.

use std::sync::{Mutex, MutexGuard};

/// Locks. A panic aborts the process, so no lock is ever poisoned where it matters.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
