//! `--restart`: whether a container that ended starts again, and when. The policies and times are Docker's.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The first wait; doubled from start to start.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);
/// A container that ran this long is not failing at its start: the waits begin anew.
const HEALTHY: Duration = Duration::from_secs(10);

/// What to do when a container ends by itself. One that was stopped stays so.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Policy {
    /// Nothing.
    #[default]
    No,
    /// Start it again if it failed, at most so many times in a row.
    OnFailure(Option<u32>),
    /// Start it again.
    Always,
    /// The same; the two differ only where an engine starts containers at boot.
    UnlessStopped,
}

/// What `--restart` takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no restart policy: it is no, always, unless-stopped or on-failure[:TIMES]")]
pub struct PolicyError(String);

impl Policy {
    /// Its name, without the bound.
    pub fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Always => "always",
            Self::UnlessStopped => "unless-stopped",
            Self::OnFailure(_) => "on-failure",
        }
    }

    /// Its bound; 0: none.
    pub fn times(self) -> u32 {
        match self {
            Self::OnFailure(times) => times.unwrap_or(0),
            _ => 0,
        }
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let error = || PolicyError(text.to_owned());
        match text.split_once(':') {
            None => match text {
                "" | "no" => Ok(Self::No),
                "always" => Ok(Self::Always),
                "unless-stopped" => Ok(Self::UnlessStopped),
                "on-failure" => Ok(Self::OnFailure(None)),
                _ => Err(error()),
            },
            Some(("on-failure", times)) => {
                let times: u32 = times.parse().map_err(|_| error())?;
                // As Docker has it: 0 is no bound.
                Ok(Self::OnFailure((times > 0).then_some(times)))
            }
            Some(_) => Err(error()),
        }
    }
}

impl TryFrom<String> for Policy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.to_string()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.times() {
            0 => f.write_str(self.name()),
            times => write!(f, "{}:{times}", self.name()),
        }
    }
}

/// The restarts of one container.
#[derive(Debug)]
pub struct Restarts {
    policy: Policy,
    /// Since it last ran for long.
    in_a_row: u32,
    wait: Duration,
}

impl Restarts {
    /// None so far.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            in_a_row: 0,
            wait: SHORTEST,
        }
    }

    /// From now on by another policy.
    pub fn follow(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// The container ended with `code` after `ran`: whether it starts again.
    pub fn again(&mut self, code: u32, ran: Duration) -> bool {
        if ran >= HEALTHY {
            self.in_a_row = 0;
        }
        let again = match self.policy {
            Policy::No => false,
            Policy::Always | Policy::UnlessStopped => true,
            Policy::OnFailure(None) => code != 0,
            Policy::OnFailure(Some(times)) => code != 0 && self.in_a_row < times,
        };
        if again {
            let wait = SHORTEST.saturating_mul(1 << self.in_a_row.min(20));
            self.wait = wait.min(LONGEST);
            self.in_a_row += 1;
        }
        again
    }

    /// How long to wait before the start that was last granted.
    pub fn wait(&self) -> Duration {
        self.wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Duration = Duration::ZERO;

    #[test]
    fn policy_is_written_as_it_is_read() {
        for text in [
            "no",
            "always",
            "unless-stopped",
            "on-failure",
            "on-failure:3",
        ] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        assert_eq!("on-failure:0".parse(), Ok(Policy::OnFailure(None)));
        for text in ["never", "always:3", "on-failure:x", "on-failure:-1", ":"] {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
    }

    #[test]
    fn on_failure_gives_up_after_so_many_in_a_row() {
        let mut restarts = Restarts::new(Policy::OnFailure(Some(2)));
        assert!(restarts.again(1, AT_ONCE));
        assert!(restarts.again(1, AT_ONCE));
        assert!(!restarts.again(1, AT_ONCE));
        assert!(restarts.again(1, HEALTHY));
        assert!(!restarts.again(0, AT_ONCE));
    }

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_healthy_run() {
        let mut restarts = Restarts::new(Policy::Always);
        let mut wait = |ran| {
            assert!(restarts.again(0, ran));
            restarts.wait()
        };
        let waits = [AT_ONCE; 3].map(|ran| wait(ran).as_millis());
        assert_eq!(waits, [100, 200, 400]);
        assert_eq!((0..100).map(|_| wait(AT_ONCE)).max(), Some(LONGEST));
        assert_eq!(wait(HEALTHY), SHORTEST);
    }

    #[test]
    fn no_means_no() {
        assert!(!Restarts::new(Policy::No).again(1, AT_ONCE));
    }
}
