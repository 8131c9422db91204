//! The process outside the PID namespace, which stands for the VMM towards its starter.
//!
//! A process can't move itself into a new PID namespace, only its children. So the
//! original process stays, confined like the VMM but for the namespace, without a
//! descriptor and with three system calls: it waits, then ends as the VMM did. That
//! keeps the contract of a plain child: one pid to wait for and to kill.

#![allow(unsafe_code)] // fork(2)

use super::{ConfineError, fds, seccomp};
use crate::exit_code;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    PidfdFlags, Signal, WaitId, WaitIdOptions, getpid, kill_process, pidfd_open,
    set_parent_process_death_signal, waitid,
};

/// Returns in the child, PID 1 of the new namespace. Each process dies with the other.
pub(super) fn fork() -> Result<(), ConfineError> {
    let parent = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|e| ConfineError::step("pidfd_open", e))?;
    // SAFETY: the process has one thread (unshare would have failed otherwise), so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(ConfineError::advised(
            "fork",
            std::io::Error::last_os_error(),
            "; a process limit (RLIMIT_NPROC, pids.max) may be reached",
        )),
        0 => {
            set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(|e| ConfineError::step("prctl(PR_SET_PDEATHSIG)", e))?;
            // The signal isn't sent for a parent that died before it was asked for.
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let dead = poll(&mut [PollFd::new(&parent, PollFlags::IN)], Some(&now))
                .map_err(|e| ConfineError::step("poll(parent)", e))?;
            if dead != 0 {
                std::process::exit(exit_code::START_FAILED.into());
            }
            Ok(())
        }
        _ => wait(),
    }
}

/// Waits for the only child and ends as it ended.
fn wait() -> ! {
    // These have handlers or are ignored in Rust programs; the default is to die of them.
    for signal in [libc::SIGPIPE, libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: SIG_DFL is no handler of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let pid = getpid();
    let confined = fds::close_range(0, u32::MAX)
        .and_then(|()| seccomp::install_waiter(pid.as_raw_pid() as u32));
    if confined.is_err() {
        // Takes the child along; there is nowhere left to say why.
        exit(exit_code::START_FAILED.into());
    }
    let status = loop {
        match waitid(WaitId::All, WaitIdOptions::EXITED) {
            Ok(Some(status)) => break status,
            Ok(None) | Err(Errno::INTR) => {}
            Err(_) => exit(exit_code::VMM_FAILED.into()),
        }
    };
    if let Some(signal) = status.terminating_signal() {
        if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = kill_process(pid, signal);
        }
        exit(128 + signal);
    }
    exit(status.exit_status().unwrap_or(exit_code::VMM_FAILED.into()))
}

/// Ends at once: what the C library does at exit is the child's to do.
fn exit(code: i32) -> ! {
    // SAFETY: no memory is involved.
    unsafe { libc::_exit(code) }
}
