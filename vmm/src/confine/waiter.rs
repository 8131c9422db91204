//! The process outside the PID namespace, which stands for the VMM towards its starter.
//!
//! A process can't move itself into a new PID namespace, only its children. So the
//! original process stays, confined like the VMM but for the namespace, without a
//! descriptor and with four system calls: it waits, hands SIGTERM and SIGINT on, and ends as
//! the VMM did. That keeps the contract of a plain child: one pid to wait for and to kill.

#![allow(unsafe_code)] // fork(2) and waiting for signals

use super::{ConfineError, fds, seccomp};
use crate::exit_code;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
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
        child => wait(child),
    }
}

/// Waits for the child and ends as it ended.
fn wait(child: libc::pid_t) -> ! {
    let pid = getpid();
    let signals = take_signals();
    let confined =
        fds::close_range(0, u32::MAX).and_then(|()| seccomp::install_waiter(child as u32));
    if confined.is_err() {
        // Takes the child along; there is nowhere left to say why.
        exit(exit_code::START_FAILED.into());
    }
    let status = loop {
        // Before each wait for a signal: SIGCHLD may have come before it was blocked.
        match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => break status,
            Ok(None) => {}
            Err(_) => exit(exit_code::VMM_FAILED.into()),
        }
        let mut signal = 0;
        // SAFETY: both pointers are to locals.
        let taken = unsafe { libc::sigwait(&raw const signals, &raw mut signal) } == 0;
        if taken && signal != libc::SIGCHLD {
            // SAFETY: no memory is involved; the child isn't reaped yet, so the id is its own.
            unsafe { libc::kill(child, signal) };
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

/// Blocks the signals that are waited for; the deadly ones lose Rust's handlers.
fn take_signals() -> libc::sigset_t {
    // SAFETY: all zeros is a valid, empty set; the calls read and write locals, and SIG_DFL is no handler of ours.
    unsafe {
        for signal in [libc::SIGPIPE, libc::SIGSEGV, libc::SIGBUS] {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut signals: libc::sigset_t = std::mem::zeroed();
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT] {
            libc::sigaddset(&raw mut signals, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
        signals
    }
}

/// Ends at once: what the C library does at exit is the child's to do.
fn exit(code: i32) -> ! {
    // SAFETY: no memory is involved.
    unsafe { libc::_exit(code) }
}
