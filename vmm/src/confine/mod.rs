//! Confinement: what the VMM keeps of the host before the guest's first instruction.
//!
//! [`enter`] is called once, single-threaded, right after the configuration was
//! read: from then on the process has open descriptors and nothing else, in
//! namespaces of its own, without a capability, in an empty root. [`seccomp`]
//! follows thread by thread, right before each goes to work.
//!
//! Where namespaces can't be had (a container without unshare(2), a hardened
//! kernel), Landlock denies every access to files instead. Where neither can be
//! had, [`enter`] fails and says what to change.

mod fds;
mod landlock;
mod namespaces;
mod privileges;
mod rlimits;
pub mod seccomp;
mod waiter;

use crate::config::Confinement;
use std::io;
use std::os::fd::RawFd;

/// The host user and group that a VMM started by root becomes.
///
/// From a range that neither distributions nor systemd hand out (see systemd's
/// "Users, Groups, UIDs and GIDs"), so nothing on the host belongs to it.
pub const UNPRIVILEGED_ID: u32 = 0x7000_0000;

/// What [`enter`] is to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// All or nothing.
    pub level: Confinement,
    /// Descriptors to keep, in any order; standard error stays besides. Every other one is closed.
    pub keep_fds: &'a [RawFd],
    /// RLIMIT_NOFILE: kept descriptors, those KVM and the devices will open, those the control socket may bring.
    pub max_open_files: u32,
}

/// What confines the process's view of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// Own user, mount, PID, network, IPC, UTS and cgroup namespaces; an empty root.
    Namespaces,
    /// The same but for the user namespace, which the host forbids even to root.
    NamespacesWithoutUser,
    /// Landlock denies every file, TCP port and, from Linux 6.12 on, signals and abstract sockets.
    Landlock,
    /// Nothing: [`Confinement::Off`].
    Off,
}

/// Why the process could not be confined. Nothing was started, the process should end.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A step that no fallback stands in for.
    #[error("confinement failed at {step}: {source}{advice}")]
    Step {
        /// The system call, with what matters of its arguments.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// What the user can do; empty or with its own separator.
        advice: &'static str,
    },
    /// A descriptor that was to be kept isn't fit for it.
    #[error("descriptor {fd} of the configuration {problem}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// Why it can't be kept.
        problem: &'static str,
    },
    /// Neither way of keeping the process from the host's files works.
    #[error("can't be confined: no namespaces ({namespaces}), and no Landlock either ({landlock})")]
    Nothing {
        /// What stood in the way of namespaces.
        namespaces: Box<ConfineError>,
        /// What stood in the way of Landlock.
        landlock: String,
    },
}

impl ConfineError {
    pub(crate) fn step(step: &'static str, source: impl Into<io::Error>) -> Self {
        Self::advised(step, source, "")
    }

    fn advised(step: &'static str, source: impl Into<io::Error>, advice: &'static str) -> Self {
        Self::Step {
            step,
            source: source.into(),
            advice,
        }
    }
}

/// Confines the process. Call it before any other thread exists.
///
/// With namespaces it returns in a child, PID 1 of its PID namespace; the
/// original process waits outside, does nothing else, and ends as the child ends. Each
/// dies with the other.
///
/// The order is forced: descriptors first (the rest opens and closes its own),
/// root becomes nobody while it still may, namespaces and root need the capabilities
/// that are then dropped, and the parent-death signal doesn't survive a change of identity.
pub fn enter(plan: &Plan<'_>) -> Result<Isolation, ConfineError> {
    if plan.level == Confinement::Off {
        return Ok(Isolation::Off);
    }
    fds::keep_only(plan.keep_fds)?;
    privileges::become_unprivileged()?;
    let namespaces = namespaces::enter();
    privileges::drop_all()?;
    let (isolation, new_pid_namespace) = match namespaces {
        Ok(isolation) => (isolation, true),
        Err(failure) => {
            landlock::deny_all().map_err(|landlock| ConfineError::Nothing {
                namespaces: Box::new(failure.reason),
                landlock,
            })?;
            (Isolation::Landlock, failure.unshared)
        }
    };
    rlimits::lower(plan.max_open_files)?;
    if new_pid_namespace {
        waiter::fork()?;
    }
    Ok(isolation)
}
