//! Writes down in the sandbox's directory how its container is.

use super::container::Observer;
use super::process::Exit;
use crate::containerd::events::{Publisher, timestamp};
use crate::health::{self, Health};
use crate::restart::{Policy, Restarts};
use crate::state::{SandboxDir, State, Status, now_ns};
use containerd_shim_protos::events::task;
use containerd_shim_protos::topics;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

/// The recorder of one container.
pub(super) struct Recorder {
    pub(super) dir: SandboxDir,
    /// The directory goes away with the container.
    discard: bool,
    /// It is ours to start it again.
    unattended: bool,
    status: Mutex<Status>,
    /// Tells containerd, if it is containerd's.
    pub(super) publisher: Option<Publisher>,
    /// For a container that starts again by itself.
    restarts: Mutex<Restarts>,
    ended: Notify,
}

impl Recorder {
    /// For the container whose directory this is.
    pub(super) fn new(
        dir: SandboxDir,
        discard: bool,
        unattended: Option<Policy>,
        publisher: Option<Publisher>,
    ) -> Self {
        Self {
            dir,
            discard,
            unattended: unattended.is_some(),
            status: Mutex::default(),
            publisher,
            restarts: Mutex::new(Restarts::new(unattended.unwrap_or_default())),
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

    /// Returns once the first process ended, for each of its ends: how long to wait before it starts again, if it shall.
    pub(super) async fn ended(&self) -> Option<Duration> {
        self.ended.notified().await;
        let status = self.lock();
        (status.state == State::Restarting).then(|| self.restarts().wait())
    }

    /// The health check, if there is one.
    pub(super) fn check(&self) -> Option<health::Check> {
        self.dir.meta()?.health
    }

    /// Writes down how healthy the container is.
    pub(super) fn health(&self, health: &Health) {
        let before = self.lock().health.replace(health.clone());
        self.update(|_| {});
        if before.is_none_or(|before| before.status != health.status) {
            let action = format!("health_status: {}", health.status.name());
            self.dir.tell(&action, []);
        }
    }

    /// Whether somebody asked the container to end, so that it shall not start again.
    pub(super) fn is_ending(&self) -> bool {
        self.dir.is_ending()
    }

    /// The policy may have been changed meanwhile.
    fn starts_again(&self, status: u32, ran: Duration) -> bool {
        let mut restarts = self.restarts();
        if let (true, Some(meta)) = (self.unattended, self.dir.meta()) {
            restarts.follow(meta.restart);
        }
        restarts.again(status, ran)
    }

    fn restarts(&self) -> std::sync::MutexGuard<'_, Restarts> {
        self.restarts.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// It could not be started again.
    pub(super) fn failed(&self, error: &str) {
        self.update(|status| {
            status.state = State::Exited;
            error.clone_into(&mut status.error);
        });
    }

    /// Nobody looks after it any more: it doesn't wait to be started.
    pub(super) fn close(&self) {
        if self.lock().state == State::Restarting {
            self.update(|status| status.state = State::Exited);
        }
    }
}

/// For a container that joined another's sandbox: what the directory tells is the other's.
pub(super) struct Member(pub(super) Arc<Recorder>);

impl Observer for Member {
    fn started(&self, _: u32) {}

    fn paused(&self, _: bool) {}

    fn exited(&self, _: Exit, _: &str) {}

    fn process_exited(&self, container: &str, exec_id: &str, pid: u32, exit: Exit) {
        self.0.process_exited(container, exec_id, pid, exit);
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
        self.dir.tell("start", []);
    }

    fn paused(&self, paused: bool) {
        self.update(|status| status.paused = paused);
        self.dir.tell(if paused { "pause" } else { "unpause" }, []);
    }

    fn exited(&self, exit: Exit, error: &str) {
        if exit.oom_killed {
            self.dir.tell("oom", []);
        }
        self.dir
            .tell("die", [("exitCode", exit.status.to_string())]);
        // A directory that is about to go needs to tell only what went wrong.
        let untold = self.discard && error.is_empty() && !exit.oom_killed;
        // Decided before the end is told: whoever looks never sees a container ended that starts again.
        let ran = Duration::from_nanos(exit.at_ns.saturating_sub(self.lock().started));
        let again = !self.is_ending() && self.starts_again(exit.status, ran);
        let ended = |status: &mut Status| {
            status.state = match again {
                true => State::Restarting,
                false => State::Exited,
            };
            status.restarts += u32::from(again);
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

    fn process_exited(&self, container: &str, exec_id: &str, pid: u32, exit: Exit) {
        let Some(publisher) = &self.publisher else {
            return;
        };
        if exit.oom_killed && exec_id.is_empty() {
            let event = task::TaskOOM {
                container_id: container.to_owned(),
                ..Default::default()
            };
            publisher.tell(topics::TASK_OOM_EVENT_TOPIC, &event);
        }
        let id = if exec_id.is_empty() {
            container
        } else {
            exec_id
        };
        let event = task::TaskExit {
            container_id: container.to_owned(),
            id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..Default::default()
        };
        publisher.tell(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }
}
