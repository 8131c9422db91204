//! One process of a container as the Task API sees it.

use super::stdio::{Paths, Streams};
use crate::state::now_ns;
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::watch;

/// The life of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Life {
    /// Known, not started.
    #[default]
    Created,
    /// Started.
    Running,
    /// Gone.
    Exited(Exit),
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exit {
    /// 128 + signal for a death by signal.
    pub(super) status: u32,
    /// Nanoseconds since the epoch.
    pub(super) at_ns: u64,
    /// The guest's kernel killed it for lack of memory.
    pub(super) oom_killed: bool,
}

impl Exit {
    /// It ended just now.
    pub(super) fn now(status: u32) -> Self {
        Self {
            status,
            at_ns: now_ns(),
            oom_killed: false,
        }
    }
}

/// What an added process does, as the agent is told.
#[derive(Debug, Clone, Default)]
pub(super) enum Work {
    /// The container's own plan.
    #[default]
    First,
    /// Executes an OCI process.
    Execute(Vec<u8>),
    /// Runs a tool of the agent's.
    Tool(Vec<u8>),
}

/// A container's first process, or one that was added.
#[derive(Debug)]
pub(super) struct Process {
    /// Empty for the first one.
    pub(super) exec_id: String,
    /// Where its streams go.
    pub(super) paths: Paths,
    /// What an added one does.
    pub(super) work: Work,
    life: watch::Sender<Life>,
    streams: Mutex<Option<Streams>>,
}

impl Process {
    /// A process that is known and not started.
    pub(super) fn new(exec_id: String, paths: Paths, work: Work) -> Self {
        Self {
            exec_id,
            paths,
            work,
            life: watch::Sender::new(Life::Created),
            streams: Mutex::new(None),
        }
    }

    /// It ended, and there was nobody who read what it wrote.
    pub(super) fn is_forgotten(&self) -> bool {
        let unread = self.paths.stdout.is_empty() && self.paths.stderr.is_empty();
        unread && matches!(self.life(), Life::Exited(_))
    }

    /// How it is now.
    pub(super) fn life(&self) -> Life {
        *self.life.borrow()
    }

    /// It started; false when it wasn't waiting for that.
    pub(super) fn set_running(&self) -> bool {
        self.life.send_if_modified(|life| {
            let waiting = *life == Life::Created;
            if waiting {
                *life = Life::Running;
            }
            waiting
        })
    }

    /// It ended; only the first end counts.
    pub(super) fn set_exited(&self, exit: Exit) {
        if let Some(streams) = &*self.lock() {
            streams.stop_stdin();
        }
        self.life.send_if_modified(|life| {
            let alive = !matches!(life, Life::Exited(_));
            if alive {
                *life = Life::Exited(exit);
            }
            alive
        });
    }

    /// Waits for its end.
    pub(super) async fn exited(&self) -> Exit {
        let mut life = self.life.subscribe();
        loop {
            if let Life::Exited(exit) = *life.borrow_and_update() {
                return exit;
            }
            // The sender is ours: it can't close before us.
            let _ = life.changed().await;
        }
    }

    /// Hands over its running pumps.
    pub(super) fn set_streams(&self, streams: Streams) {
        *self.lock() = Some(streams);
    }

    /// Standard input ends once all writers are gone.
    pub(super) fn close_stdin(&self) {
        if let Some(streams) = &*self.lock() {
            streams.close_stdin();
        }
    }

    /// Waits until its output has been passed on, but no longer than `limit`.
    pub(super) async fn drained(&self, limit: Duration) {
        let streams = self.lock().take();
        if let Some(streams) = streams {
            streams.drained(limit).await;
        }
    }

    /// A poisoned lock holds the streams as they are: always usable.
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Streams>> {
        self.streams.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn exited_with_two_ends_reports_the_first() {
        let process = Process::new(String::new(), Paths::default(), Work::First);
        assert!(process.set_running());
        assert!(!process.set_running());
        process.set_exited(Exit::now(3));
        process.set_exited(Exit::now(crate::rpc::KILLED));
        assert_eq!(process.exited().await.status, 3);
        assert!(!process.set_running());
    }
}
