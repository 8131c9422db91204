//! Reaps every child of PID 1, orphans of containers included, and tells who waits for one.
#![allow(unsafe_code)] // signalfd

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, WaitOptions, wait};
use tokio::sync::oneshot;

use crate::conn::Conn;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub(crate) status: u32,
    /// Wall clock, since the epoch.
    pub(crate) at: Duration,
}

/// The agent's children that someone waits for.
#[derive(Debug, Default, Clone)]
pub(crate) struct Reaper(Arc<Mutex<HashMap<Pid, oneshot::Sender<Exit>>>>);

impl Reaper {
    /// Blocks SIGCHLD, and reaps in a task of its own from now on.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let signals = Conn::new(child_signals()?)?;
        let task = reaper.clone();
        tokio::spawn(async move {
            let mut info = [0; 128]; // struct signalfd_siginfo, of which only the arrival counts
            while signals.read(&mut info).await.is_ok() {
                task.reap();
            }
        });
        Ok(reaper)
    }

    /// Resolves when `pid` ended. Call it before anything else runs after the fork.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, signal) => 128 + signal.unwrap_or_default(),
            };
            let at = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            if let Some(waiter) = self.lock().remove(&pid) {
                // Nobody may listen any more: the container was deleted.
                let _ = waiter.send(Exit {
                    status: code as u32,
                    at,
                });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, oneshot::Sender<Exit>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before use; plain system calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}
