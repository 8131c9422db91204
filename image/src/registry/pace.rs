//! How slowly bytes may come. A bound on silence alone lets a byte a minute hold us for years.

use std::time::Duration;

/// What the slowest honest link brings: bytes a second, on average.
const RATE: u64 = 1024;

/// Counts bytes against the time that was spent waiting for them. Time spent on other things (a slow disk) doesn't count.
pub(super) struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Small documents come in one go: as long as a silence may last, so long may a slow one be bad.
    pub(super) fn document(stall: Duration) -> Self {
        Self::new(stall)
    }

    /// Layers take long, and links have bad minutes: five times that.
    pub(super) fn layer(stall: Duration) -> Self {
        Self::new(stall * 5)
    }

    fn new(window: Duration) -> Self {
        Self {
            window,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Notes a wait and what it brought. `Err`: so few bytes came in so many seconds.
    pub(super) fn note(&mut self, waited: Duration, bytes: u64) -> Result<(), (u64, u64)> {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return Ok(());
        }
        let (seconds, bytes) = (self.waited.as_secs(), self.bytes);
        *self = Self::new(self.window);
        if bytes < seconds * RATE {
            return Err((bytes, seconds));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn note_a_byte_a_minute_is_too_slow() {
        let mut pace = Pace::document(MINUTE);
        let second = Duration::from_secs(59);
        assert_eq!(pace.note(second, 1), Ok(()));
        assert_eq!(pace.note(second, 1), Err((2, 118)));
    }

    #[test]
    fn note_slow_but_honest_link_is_left_alone() {
        let mut pace = Pace::layer(MINUTE);
        for minute in 0..600 {
            // Two kilobytes a second with every other minute silent.
            let bytes = if minute % 2 == 0 { 240_000 } else { 0 };
            assert_eq!(pace.note(MINUTE, bytes), Ok(()));
        }
    }

    #[test]
    fn note_good_start_is_no_credit_for_ever() {
        let mut pace = Pace::layer(MINUTE);
        assert_eq!(pace.note(Duration::ZERO, 1 << 40), Ok(()));
        assert_eq!(pace.note(MINUTE * 5, 0), Ok(()));
        assert_eq!(pace.note(MINUTE * 5, 5), Err((5, 300)));
    }
}
