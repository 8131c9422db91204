//! Keeps a VMM to a share of processor time where the host has no control group that does.
//!
//! Like the kernel's bandwidth control: so much time in each period, and once that is used the vCPUs wait at their gate
//! for the next one. The whole process is measured, as device threads work for the guest too. Time used beyond the
//! quota (a look comes late, a device's work isn't stopped) is taken from the periods that follow, so the mean holds
//! whatever the guest does. Here is only the arithmetic; the event loop looks at the clocks and moves the gate.

use crate::control::CpuLimit;
use std::time::{Duration, Instant};

/// Looks at least so far apart, in parts of a period: a look has a price, and a small quota has to pay for it.
const LOOKS_PER_PERIOD: u32 = 10;
/// The event loop's timeouts have no finer grain.
const LEAST_PAUSE: Duration = Duration::from_millis(1);

/// How much was used, and when to look again.
#[derive(Debug)]
pub struct Throttle {
    /// Nanoseconds in each period.
    quota: i128,
    period: Duration,
    /// How many can use time at once.
    vcpus: u32,
    /// The end of the current period.
    ends: Instant,
    /// The process's time at the last look.
    seen: Duration,
    /// Nanoseconds left of this period's quota; below 0: taken from the next.
    left: i128,
    next_look: Instant,
}

impl Throttle {
    /// The first period begins now; `used` is the process's processor time so far.
    pub fn new(limit: CpuLimit, vcpus: usize, now: Instant, used: Duration) -> Self {
        let period = Duration::from_micros(limit.period_us);
        let quota = i128::from(limit.quota_us) * 1000;
        let mut throttle = Self {
            quota,
            period,
            vcpus: vcpus.max(1) as u32,
            ends: now + period,
            seen: used,
            left: quota,
            next_look: now,
        };
        throttle.plan(now);
        throttle
    }

    /// Takes note of what was used. The vCPUs may run, or not, until the next look.
    pub fn look(&mut self, now: Instant, used: Duration) {
        self.left -= used.saturating_sub(self.seen).as_nanos() as i128;
        self.seen = self.seen.max(used);
        if now >= self.ends {
            let late = now.duration_since(self.ends);
            let begun = late.as_nanos() / self.period.as_nanos() + 1;
            self.left = (self.left + begun as i128 * self.quota).min(self.quota);
            // From the time that is: late looks don't add up, and no number of periods is too large.
            let into = late.as_nanos() % self.period.as_nanos();
            self.ends = now + self.period - Duration::from_nanos(into as u64);
        }
        self.plan(now);
    }

    /// Whether the quota leaves the vCPUs nothing for now.
    pub fn is_used_up(&self) -> bool {
        self.left <= 0
    }

    /// When to look next.
    pub fn next_look(&self) -> Instant {
        self.next_look
    }

    fn plan(&mut self, now: Instant) {
        self.next_look = if self.is_used_up() {
            // As many more periods as it takes to pay.
            let more = (-self.left / self.quota).min(i128::from(u32::MAX)) as u32;
            self.ends + self.period.saturating_mul(more)
        } else {
            let soonest = Duration::from_nanos(self.left as u64) / self.vcpus;
            let least = (self.period / LOOKS_PER_PERIOD).max(LEAST_PAUSE);
            now + soonest.max(least)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    /// A throttled process on a clock of our own.
    struct Simulated {
        throttle: Throttle,
        vcpus: u32,
        now: Instant,
        used: Duration,
    }

    impl Simulated {
        fn new(quota_ms: u64, vcpus: u32) -> Self {
            let limit = CpuLimit {
                quota_us: quota_ms * 1000,
                period_us: 100_000,
            };
            let (now, used) = (Instant::now(), 7 * MS);
            Self {
                throttle: Throttle::new(limit, vcpus as usize, now, used),
                vcpus,
                now,
                used,
            }
        }

        /// Lets `busy` vCPUs work whenever they may; each look comes so much too late. Returns the time used.
        fn run(&mut self, time: Duration, busy: u32, late: Duration) -> Duration {
            let (begun, before) = (self.now, self.used);
            while self.now < begun + time {
                let look = self.throttle.next_look() + late;
                if !self.throttle.is_used_up() {
                    self.used += (look - self.now) * busy.min(self.vcpus);
                }
                self.now = look;
                self.throttle.look(self.now, self.used);
            }
            self.used - before
        }
    }

    #[test]
    fn hog_gets_its_quota_in_each_period() {
        for (quota_ms, vcpus) in [(50, 1), (150, 2), (10, 1), (320, 4)] {
            let mut hog = Simulated::new(quota_ms, vcpus);
            let used = hog.run(1000 * MS, vcpus, Duration::ZERO);
            assert_eq!(used, quota_ms as u32 * 10 * MS, "{quota_ms} ms");
        }
    }

    #[test]
    fn late_looks_are_paid_for() {
        for (quota_ms, vcpus, late) in [(50, 1, 30), (1, 1, 0), (2, 1, 40), (150, 2, 250)] {
            let mut hog = Simulated::new(quota_ms, vcpus);
            let used = hog.run(100_000 * MS, vcpus, late * MS);
            let share = used.as_secs_f64() / 100.0;
            let given = quota_ms as f64 / 100.0;
            assert!(share <= given * 1.02 + 0.01, "{share} of {given}");
            assert!(share > given * 0.6, "{share} of {given}");
        }
    }

    #[test]
    fn worker_within_its_quota_never_waits() {
        let mut worker = Simulated::new(150, 2);
        for _ in 0..1000 {
            worker.run(MS, 1, Duration::ZERO);
            assert!(!worker.throttle.is_used_up());
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut box_ = Simulated::new(20, 1);
        box_.run(60_000 * MS, 0, Duration::ZERO);
        let used = box_.run(1000 * MS, 1, Duration::ZERO);
        assert!(used <= 240 * MS, "{used:?}");
    }

    #[test]
    fn idle_process_is_looked_at_a_few_times_a_second() {
        for (quota_ms, most) in [(50, 20), (1, 100), (200, 10)] {
            let mut idle = Simulated::new(quota_ms, 1);
            let mut looks = 0;
            let begun = idle.now;
            while idle.now < begun + 1000 * MS {
                idle.run(MS, 0, Duration::ZERO);
                looks += 1;
            }
            assert!(looks <= most, "{looks} looks with {quota_ms} ms");
        }
    }

    #[test]
    fn clock_that_stood_still_for_years_is_no_trouble() {
        let mut hog = Simulated::new(50, 1);
        hog.now += Duration::from_secs(1 << 31);
        hog.throttle.look(hog.now, hog.used);
        assert!(!hog.throttle.is_used_up());
        assert!(hog.throttle.next_look() <= hog.now + 50 * MS);
    }

    proptest! {
        #[test]
        fn share_is_never_exceeded_for_long(
            quota_us in 1_000u64..1_000_000,
            period_us in 1_000u64..1_000_000,
            vcpus in 1usize..32,
            steps in proptest::collection::vec((0u64..200_000, 0u64..100), 1..200),
        ) {
            let begun = Instant::now();
            let limit = CpuLimit { quota_us, period_us };
            let mut throttle = Throttle::new(limit, vcpus, begun, Duration::ZERO);
            let (mut now, mut used) = (begun, Duration::ZERO);
            let mut last_overrun = Duration::ZERO;
            for (late_us, percent) in steps {
                let look = throttle.next_look() + Duration::from_micros(late_us);
                prop_assert!(look >= now);
                if !throttle.is_used_up() {
                    last_overrun = (look - now) * vcpus as u32;
                    used += last_overrun * percent as u32 / 100;
                }
                now = look;
                throttle.look(now, used);
            }
            // What a whole number of periods gave, and what the last look could not stop.
            let periods = (now - begun).as_micros() / u128::from(period_us) + 1;
            let given = Duration::from_micros(periods as u64 * quota_us);
            prop_assert!(used <= given + last_overrun, "{used:?} of {given:?}");
        }
    }
}
