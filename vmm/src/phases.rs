//! Times of a start's phases.

use crate::control::{Message, Phase};
use std::time::Duration;

/// Phases reached so far, told to the shim in one go so that telling costs the start little.
#[derive(Debug, Default)]
pub struct Phases(Vec<(Phase, u64)>);

impl Phases {
    /// Notes the present moment.
    pub fn reached(&mut self, phase: Phase) {
        self.0.push((phase, monotonic_ns()));
    }

    /// The messages that are still to be sent.
    pub fn take(&mut self) -> impl Iterator<Item = Message> + '_ {
        self.0
            .drain(..)
            .map(|(phase, at_ns)| Message::Phase { phase, at_ns })
    }
}

/// CLOCK_MONOTONIC, the clock that the shim and the bench use too.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since_boot = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32);
    since_boot.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_gives_each_phase_once_in_order() {
        let mut phases = Phases::default();
        phases.reached(Phase::Main);
        phases.reached(Phase::Confined);

        let times: Vec<u64> = phases
            .take()
            .map(|message| match message {
                Message::Phase { at_ns, .. } => at_ns,
                other => panic!("{other:?}"),
            })
            .collect();

        assert_eq!(times.len(), 2);
        assert!(times[0] > 0 && times[0] <= times[1]);
        assert_eq!(phases.take().count(), 0);
    }
}
