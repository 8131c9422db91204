//! A disk's limits: reads and writes each have their own.

use super::request::HEADER;
use crate::config::DiskLimits;
use crate::rate_limit::RateLimiter;
use std::time::{Duration, Instant};

/// Limits both directions. The queue is worked in order: where one direction has to wait, what comes behind waits too.
#[derive(Debug)]
pub(super) struct Limiter {
    read: RateLimiter,
    write: RateLimiter,
}

impl Limiter {
    /// Full buckets.
    pub(super) fn new(limits: DiskLimits) -> Self {
        let now = Instant::now();
        Self {
            read: RateLimiter::new(limits.read, now),
            write: RateLimiter::new(limits.write, now),
        }
    }

    /// Whether a request may pass now, or after how long to ask again.
    pub(super) fn check(&mut self, now: Instant) -> Result<(), Duration> {
        match (self.read.check(now), self.write.check(now)) {
            (Ok(()), Ok(())) => Ok(()),
            (read, write) => Err(read.err().max(write.err()).unwrap_or_default()),
        }
    }

    /// Pays for a request that passed, by the bytes of its chain in each direction.
    pub(super) fn pay(&mut self, to_disk: usize, to_guest: usize) {
        // More than the status. A chain may have both, whatever its request is.
        let read = to_guest.saturating_sub(1);
        let written = to_disk.saturating_sub(HEADER);
        if read > 0 {
            self.read.pay(read as u64);
        }
        // A flush counts as a write of nothing.
        if written > 0 || read == 0 {
            self.write.pay(written as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RateLimit;

    #[test]
    fn limits_of_one_direction_leave_the_other_alone() {
        let write = RateLimit {
            bytes_per_second: 1000,
            ops_per_second: 0,
        };
        let read = RateLimit::default();
        let mut limiter = Limiter::new(DiskLimits { read, write });
        let now = Instant::now();
        for _ in 0..100 {
            limiter.pay(HEADER, 1 << 20);
            limiter.pay(HEADER, 1);
            assert_eq!(limiter.check(now), Ok(()));
        }
        limiter.pay(HEADER + 4096, 1);
        let wait = limiter.check(now).unwrap_err();
        assert!(wait > Duration::from_secs(3), "{wait:?}");
    }

    #[test]
    fn read_that_looks_like_a_write_is_paid_as_both() {
        let read = RateLimit {
            bytes_per_second: 1000,
            ops_per_second: 0,
        };
        let write = RateLimit::default();
        let mut limiter = Limiter::new(DiskLimits { read, write });
        limiter.pay(HEADER + 1, 4097);
        assert!(limiter.check(Instant::now()).is_err());
    }
}
