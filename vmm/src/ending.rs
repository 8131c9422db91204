//! How a VM ends: whoever knows first says it, the event loop acts on it.

use std::io;
use std::iter;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The end of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// One of [`crate::exit_code`].
    pub code: u8,
    /// For a person.
    pub reason: String,
}

impl Outcome {
    /// An outcome with its reason.
    pub fn new(code: u8, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Keeps the first outcome and wakes the event loop.
#[derive(Debug)]
pub struct Ending {
    first: OnceLock<Outcome>,
    wake: EventFd,
}

impl Ending {
    /// Nothing has ended yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            first: OnceLock::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Ends the VM, unless it is ending already.
    pub fn end(&self, outcome: Outcome) {
        let _ = self.first.set(outcome);
        let _ = self.wake.write(1); // can't fail: the counter is far from full
    }

    /// What was said first.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.first.get()
    }
}

impl AsRawFd for Ending {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_twice_keeps_the_first() {
        let ending = Ending::new().expect("eventfd");

        ending.end(Outcome::new(10, "reset"));
        ending.end(Outcome::new(13, "stopped"));

        assert_eq!(ending.outcome(), Some(&Outcome::new(10, "reset")));
    }
}
