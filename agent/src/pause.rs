//! The first process of a pod that has no image for one: it holds the pod's namespaces, reaps whatever is orphaned in them,
//! and ends when it is asked to.

#![allow(unsafe_code)] // signal sets have no safe wrapper

use std::io;

use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};

/// Returns once it is to end.
pub fn pause() -> io::Result<()> {
    let set = signals()?;
    loop {
        reap();
        let mut signal = 0;
        // SAFETY: both live across the call.
        match unsafe { libc::sigwait(&raw const set, &raw mut signal) } {
            0 if signal == libc::SIGCHLD => {}
            0 => return Ok(()),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Those that are waited for, and therefore blocked.
fn signals() -> io::Result<libc::sigset_t> {
    // SAFETY: the set is initialised before use; plain system calls.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM] {
            libc::sigaddset(&raw mut set, signal);
        }
        match libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
            0 => Ok(set),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn reap() {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return,
        }
    }
}
