//! Token buckets: how many bytes and operations a device may do each second.

use crate::config::RateLimit;
use std::time::{Duration, Instant};

/// One bucket; it holds at most what a second refills.
#[derive(Debug, Clone)]
struct Bucket {
    /// Tokens a second; 0: no limit.
    rate: u64,
    /// May be negative: one operation larger than the bucket passes when the bucket is full, and is paid off afterwards.
    tokens: i128,
    refilled: Instant,
}

impl Bucket {
    fn new(rate: u64, now: Instant) -> Self {
        Bucket {
            rate,
            tokens: i128::from(rate),
            refilled: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled);
        let added = i128::from(self.rate) * elapsed.as_nanos().min(u128::from(u64::MAX)) as i128
            / 1_000_000_000;
        // Time that was too short for a token is kept.
        if added > 0 {
            self.tokens = (self.tokens + added).min(i128::from(self.rate));
            self.refilled = now;
        }
    }

    /// How long until an operation may pass: one passes as soon as there is any token.
    fn wait(&self) -> Duration {
        if self.rate == 0 || self.tokens > 0 {
            return Duration::ZERO;
        }
        let nanos = (1 - self.tokens) * 1_000_000_000 / i128::from(self.rate) + 1;
        // A waiter asks again: an hour is as good as the truth.
        Duration::from_nanos(nanos.min(3_600_000_000_000) as u64)
    }
}

/// Limits bytes and operations together.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    bytes: Bucket,
    ops: Bucket,
}

impl RateLimiter {
    /// Full buckets; zeros mean no limit.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        RateLimiter {
            bytes: Bucket::new(limit.bytes_per_second, now),
            ops: Bucket::new(limit.ops_per_second, now),
        }
    }

    /// Whether an operation may pass now, or after how long to ask again.
    pub fn check(&mut self, now: Instant) -> Result<(), Duration> {
        let mut wait = Duration::ZERO;
        for bucket in [&mut self.bytes, &mut self.ops] {
            bucket.refill(now);
            wait = wait.max(bucket.wait());
        }
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }

    /// Pays for an operation of `bytes` that [`RateLimiter::check`] let pass; the debt of a large one delays the next.
    pub fn pay(&mut self, bytes: u64) {
        if self.bytes.rate > 0 {
            self.bytes.tokens -= i128::from(bytes);
        }
        if self.ops.rate > 0 {
            self.ops.tokens -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes_per_second: u64, ops_per_second: u64) -> (RateLimiter, Instant) {
        let now = Instant::now();
        (
            RateLimiter::new(
                RateLimit {
                    bytes_per_second,
                    ops_per_second,
                },
                now,
            ),
            now,
        )
    }

    #[test]
    fn no_limit_any_load_passes() {
        let (mut limiter, now) = limiter(0, 0);
        for _ in 0..1000 {
            assert_eq!(limiter.check(now), Ok(()));
            limiter.pay(u64::MAX);
        }
    }

    #[test]
    fn ops_spent_waits_for_one_refill() {
        let (mut limiter, now) = limiter(0, 10);
        for _ in 0..10 {
            assert_eq!(limiter.check(now), Ok(()));
            limiter.pay(1 << 40);
        }
        let wait = limiter.check(now).unwrap_err();
        assert!(
            wait >= Duration::from_millis(100) && wait < Duration::from_millis(101),
            "{wait:?}"
        );
        assert_eq!(limiter.check(now + wait), Ok(()));
    }

    #[test]
    fn operation_larger_than_bucket_passes_then_is_paid_off() {
        let (mut limiter, now) = limiter(1000, 0);
        assert_eq!(limiter.check(now), Ok(()));
        limiter.pay(5000);
        assert!(limiter.check(now + Duration::from_secs(3)).is_err());
        assert_eq!(limiter.check(now + Duration::from_millis(4002)), Ok(()));
    }

    #[test]
    fn long_idle_refills_one_second_only() {
        let (mut limiter, now) = limiter(0, 2);
        let later = now + Duration::from_secs(1000);
        for _ in 0..2 {
            assert_eq!(limiter.check(later), Ok(()));
            limiter.pay(0);
        }
        assert!(limiter.check(later).is_err());
    }

    #[test]
    fn steady_load_short_steps_keeps_the_rate() {
        let (mut limiter, start) = limiter(0, 100);
        let mut passed = 0;
        for step in 0..100_000u64 {
            if limiter
                .check(start + Duration::from_micros(step * 100))
                .is_ok()
            {
                limiter.pay(0);
                passed += 1;
            }
        }
        assert!(
            (1095..=1101).contains(&passed),
            "{passed} in 10 s and a full bucket"
        );
    }

    #[test]
    fn extreme_rate_and_time_no_overflow() {
        let (mut limiter, now) = limiter(u64::MAX, u64::MAX);
        for step in 0..10 {
            let _ = limiter.check(now + Duration::from_secs(step * 1_000_000_000));
            limiter.pay(u64::MAX);
        }
    }
}
