//! Health checks: a command in the container, run now and then, whose exit code tells how the container is. The rules
//! and figures are Docker's (docs.docker.com, Dockerfile reference, `HEALTHCHECK`).

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Longer outputs are cut.
pub const MAX_OUTPUT: usize = 4096;
/// So many results are kept.
const MAX_RESULTS: usize = 5;

/// A container's health check; times in nanoseconds, 0: the default. An image's configuration has the same shape.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Check {
    /// `NONE`, `CMD` and a command line, or `CMD-SHELL` and a line for the shell; empty: as the image says.
    pub test: Vec<String>,
    /// From the end of one to the start of the next.
    pub interval: u64,
    /// One that takes longer failed.
    pub timeout: u64,
    /// Failures this soon after the start don't count.
    pub start_period: u64,
    /// The interval until the first success within the start period.
    pub start_interval: u64,
    /// So many failures in a row make it unhealthy.
    pub retries: u32,
}

impl Check {
    /// What is executed; `None`: nothing is to be checked.
    pub fn command(&self) -> Option<Vec<String>> {
        let (kind, words) = self.test.split_first()?;
        match (kind.as_str(), words) {
            ("CMD", [_, ..]) => Some(words.to_vec()),
            ("CMD-SHELL", [line]) => Some(["/bin/sh", "-c", line].map(str::to_owned).into()),
            _ => None,
        }
    }

    /// This one, and where it says nothing what `other` says.
    pub fn or(self, other: Self) -> Self {
        let either = |a: u64, b: u64| if a == 0 { b } else { a };
        Self {
            test: match self.test.is_empty() {
                true => other.test,
                false => self.test,
            },
            interval: either(self.interval, other.interval),
            timeout: either(self.timeout, other.timeout),
            start_period: either(self.start_period, other.start_period),
            start_interval: either(self.start_interval, other.start_interval),
            retries: either(self.retries.into(), other.retries.into()) as u32,
        }
    }

    /// How long one may take.
    pub fn patience(&self) -> Duration {
        or_default(self.timeout, 30)
    }

    /// How long to wait for the next, `age` nanoseconds after the start.
    pub fn wait(&self, health: &Health, age: u64) -> Duration {
        match health.status {
            Status::Starting if age < self.start_period => or_default(self.start_interval, 5),
            _ => or_default(self.interval, 30),
        }
    }
}

fn or_default(ns: u64, seconds: u64) -> Duration {
    match ns {
        0 => Duration::from_secs(seconds),
        ns => Duration::from_nanos(ns),
    }
}

/// How a container is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not known yet.
    #[default]
    Starting,
    /// The last check succeeded.
    Healthy,
    /// Too many in a row failed.
    Unhealthy,
}

impl Status {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// What one check came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Nanoseconds since the epoch.
    pub start: u64,
    /// Nanoseconds since the epoch.
    pub end: u64,
    /// 0: healthy; -1: it took too long or could not be run.
    pub exit_code: i32,
    /// What it wrote.
    pub output: String,
}

/// What the checks of a container came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// All in all.
    pub status: Status,
    /// In a row, up to now.
    pub failing_streak: u32,
    /// The last ones, the newest last.
    pub log: Vec<Outcome>,
}

impl Health {
    /// Takes another outcome, of a container that started at `started`.
    pub fn take(&mut self, outcome: Outcome, check: &Check, started: u64) {
        let young = outcome.start.saturating_sub(started) < check.start_period;
        if outcome.exit_code == 0 {
            self.failing_streak = 0;
            self.status = Status::Healthy;
        } else if !(young && self.status == Status::Starting) {
            self.failing_streak += 1;
            let retries = match check.retries {
                0 => 3,
                retries => retries,
            };
            if self.failing_streak >= retries {
                self.status = Status::Unhealthy;
            }
        }
        self.log.push(outcome);
        let surplus = self.log.len().saturating_sub(MAX_RESULTS);
        self.log.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start: u64, exit_code: i32) -> Outcome {
        Outcome {
            start,
            exit_code,
            ..Outcome::default()
        }
    }

    #[test]
    fn take_makes_unhealthy_after_the_retries_and_healthy_at_once() {
        let check = Check {
            retries: 2,
            start_period: 100,
            ..Check::default()
        };
        let mut health = Health::default();
        let mut after = |start, code| {
            health.take(outcome(start, code), &check, 0);
            (health.status, health.failing_streak)
        };
        assert_eq!(after(10, 1), (Status::Starting, 0));
        assert_eq!(after(110, 1), (Status::Starting, 1));
        assert_eq!(after(120, -1), (Status::Unhealthy, 2));
        assert_eq!(after(130, 0), (Status::Healthy, 0));
        assert_eq!(after(140, 1), (Status::Healthy, 1));
        assert_eq!(after(150, 1), (Status::Unhealthy, 2));
        assert_eq!(after(160, 1).1, 3);
        assert_eq!(health.log.len(), MAX_RESULTS);
        assert_eq!(health.log.last().unwrap().start, 160);
    }

    #[test]
    fn take_counts_failures_of_a_young_container_that_was_healthy() {
        let check = Check {
            retries: 1,
            start_period: 100,
            ..Check::default()
        };
        let mut health = Health::default();
        health.take(outcome(1, 0), &check, 0);
        health.take(outcome(2, 1), &check, 0);
        assert_eq!(health.status, Status::Unhealthy);
    }

    #[test]
    fn command_of_each_kind() {
        let command = |words: &[&str]| {
            let test = words.iter().map(|&w| w.to_owned()).collect();
            let check = Check {
                test,
                ..Check::default()
            };
            check.command().map(|words| words.join(" "))
        };
        assert_eq!(command(&["CMD", "a", "b"]).unwrap(), "a b");
        assert_eq!(
            command(&["CMD-SHELL", "a | b"]).unwrap(),
            "/bin/sh -c a | b"
        );
        for words in [&["NONE"][..], &[], &["CMD"], &["CMD-SHELL"], &["RUN", "x"]] {
            assert_eq!(command(words), None, "{words:?}");
        }
    }

    #[test]
    fn or_takes_what_is_missing_from_the_image() {
        let own = Check {
            interval: 5,
            ..Check::default()
        };
        let image = Check {
            test: vec!["CMD".into(), "x".into()],
            interval: 9,
            retries: 2,
            ..Check::default()
        };
        let both = own.or(image.clone());
        assert_eq!((both.test, both.interval, both.retries), (image.test, 5, 2));
    }
}
