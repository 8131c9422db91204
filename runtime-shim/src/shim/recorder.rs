//! Writes down in the sandbox's directory how its container is.

use super::container::Observer;
use super::process::Exit;
use crate::state::{SandboxDir, State, Status, now_ns};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::Notify;

/// The recorder of one container.
pub(super) struct Recorder {
    pub(super) dir: SandboxDir,
    /// The directory goes away with the container.
    discard: bool,
    status: Mutex<Status>,
    ended: Notify,
}

impl Recorder {
    /// For the container whose directory this is.
    pub(super) fn new(dir: SandboxDir, discard: bool) -> Self {
        Self {
            dir,
            discard,
            status: Mutex::default(),
            ended: Notify::new(),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut status = self.lock();
        change(&mut status);
        // The status is for people and for the tidying up: a full disk must not stop the container.
        let _ = self.dir.write_status(&status);
    }

    /// A poisoned lock holds the last status: always usable.
    fn lock(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Returns once the first process ended, for each of its ends.
    pub(super) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// How long the first process ran.
    pub(super) fn ran(&self) -> Duration {
        let status = self.lock();
        Duration::from_nanos(status.finished.saturating_sub(status.started))
    }

    /// Whether somebody asked the container to end, so that it shall not start again.
    pub(super) fn is_ending(&self) -> bool {
        self.dir.is_ending()
    }

    /// It waits to be started again.
    pub(super) fn restarting(&self) {
        self.update(|status| {
            status.state = State::Restarting;
            status.restarts += 1;
        });
    }

    /// It could not be started again.
    pub(super) fn failed(&self, error: &str) {
        self.update(|status| error.clone_into(&mut status.error));
    }

    /// Nobody looks after it any more: it doesn't wait to be started.
    pub(super) fn close(&self) {
        if self.lock().state == State::Restarting {
            self.update(|status| status.state = State::Exited);
        }
    }
}

impl Observer for Recorder {
    fn started(&self, pid: u32) {
        self.update(|status| {
            *status = Status {
                state: State::Running,
                pid,
                started: now_ns(),
                restarts: status.restarts,
                ..Status::default()
            };
        });
    }

    fn paused(&self, paused: bool) {
        self.update(|status| status.paused = paused);
    }

    fn exited(&self, exit: Exit, error: &str) {
        // A directory that is about to go needs to tell only what went wrong.
        let untold = self.discard && error.is_empty() && !exit.oom_killed;
        let ended = |status: &mut Status| {
            status.state = State::Exited;
            status.pid = 0;
            status.paused = false;
            status.exit_code = exit.status;
            status.finished = exit.at_ns;
            status.oom_killed = exit.oom_killed;
            status.error = error.to_owned();
        };
        match untold {
            true => ended(&mut self.lock()),
            false => self.update(ended),
        }
        self.ended.notify_one();
    }
}
