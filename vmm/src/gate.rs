//! The gate that vCPU threads pass before they enter the guest: closed at
//! first, closed again to pause.

use crate::sync::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Longest a vCPU may take from a kick to the gate: it can only be inside a device's short work.
const PATIENCE: Duration = Duration::from_secs(5);

/// Counts the threads that wait in front of it.
pub struct Gate {
    /// Copy of `State::closed` for the fast path.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    closed: bool,
    /// Threads that are ready to enter for the first time.
    arrived: usize,
    /// Threads inside the guest or in an exit's work.
    running: usize,
}

/// A vCPU didn't come out of the guest.
#[derive(Debug, thiserror::Error)]
#[error("{0} vCPUs did not stop within {PATIENCE:?}")]
pub struct Stuck(usize);

impl Default for Gate {
    /// A closed gate with nobody behind it.
    fn default() -> Self {
        Self {
            closed: AtomicBool::new(true),
            state: Mutex::new(State {
                closed: true,
                arrived: 0,
                running: 0,
            }),
            changed: Condvar::new(),
        }
    }
}

impl Gate {
    /// A thread has done what comes before its first entry.
    pub fn arrive(&self) {
        lock(&self.state).arrived += 1;
        self.changed.notify_all();
    }

    /// Waits until so many threads have arrived.
    pub fn wait_for(&self, threads: usize) {
        let state = lock(&self.state);
        let _arrived = self
            .changed
            .wait_while(state, |state| state.arrived < threads)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
    }

    /// Waits until the gate is open and goes in.
    pub fn enter(&self) {
        let state = lock(&self.state);
        let mut state = self
            .changed
            .wait_while(state, |state| state.closed)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        state.running += 1;
    }

    /// Comes out again.
    pub fn leave(&self) {
        lock(&self.state).running -= 1;
        self.changed.notify_all();
    }

    /// Whether those inside should come out.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Lets everyone in.
    pub fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        lock(&self.state).closed = false;
        self.changed.notify_all();
    }

    /// Closes; `kick` makes those inside look at the gate. They come out soon: it doesn't wait for them.
    pub fn shut(&self, kick: impl FnOnce()) {
        lock(&self.state).closed = true;
        self.closed.store(true, Ordering::SeqCst);
        kick();
    }

    /// Closes; `kick` makes those inside look at the gate. Returns when nobody is inside.
    pub fn close(&self, kick: impl FnOnce()) -> Result<(), Stuck> {
        self.shut(kick);
        let (state, timeout) = self
            .changed
            .wait_timeout_while(lock(&self.state), PATIENCE, |state| state.running > 0)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match timeout.timed_out() {
            true => Err(Stuck(state.running)),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn enter_waits_until_open_and_close_waits_until_empty() {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (gate, inside) = (gate.clone(), inside.clone());
                std::thread::spawn(move || {
                    gate.arrive();
                    gate.enter();
                    inside.fetch_add(1, Ordering::SeqCst);
                    while !gate.is_closed() {
                        std::thread::yield_now();
                    }
                    inside.fetch_sub(1, Ordering::SeqCst);
                    gate.leave();
                })
            })
            .collect();
        gate.wait_for(4);
        assert_eq!(inside.load(Ordering::SeqCst), 0);

        gate.open();
        while inside.load(Ordering::SeqCst) < 4 {
            std::thread::yield_now();
        }
        gate.close(|| ()).expect("all come out");

        assert_eq!(inside.load(Ordering::SeqCst), 0);
        for thread in threads {
            thread.join().expect("no panic");
        }
    }
}
