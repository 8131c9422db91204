//! Open descriptors: those of the configuration stay, every other one is closed.

#![allow(unsafe_code)] // close_range(2) and borrowing descriptors by number

use super::ConfineError;
use rustix::fs::{FileType, fstat};
use rustix::stdio::{dup2_stdin, dup2_stdout, stderr};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};

/// Closes every descriptor but `keep` and standard error.
///
/// Standard input and output, unless kept, become further names of standard
/// error: were their numbers free, KVM's descriptors would take them and a stray print would hit one.
pub(super) fn keep_only(keep: &[RawFd]) -> Result<(), ConfineError> {
    for &fd in keep {
        check(fd)?;
    }
    if !keep.contains(&0) {
        dup2_stdin(stderr()).map_err(|e| ConfineError::step("dup2(2, 0)", e))?;
    }
    if !keep.contains(&1) {
        dup2_stdout(stderr()).map_err(|e| ConfineError::step("dup2(2, 1)", e))?;
    }
    let mut sorted: Vec<u32> = keep
        .iter()
        .map(|&fd| fd as u32)
        .filter(|&fd| fd > 2)
        .collect();
    sorted.sort_unstable();
    let mut free_from = 3;
    for fd in sorted {
        if fd > free_from {
            close_range(free_from, fd - 1)?;
        }
        free_from = fd + 1;
    }
    close_range(free_from, u32::MAX)
}

/// A directory would be a way out of the empty root.
fn check(fd: RawFd) -> Result<(), ConfineError> {
    let problem = |problem| ConfineError::Descriptor { fd, problem };
    if fd < 0 {
        return Err(problem("is negative"));
    }
    // SAFETY: borrowed for the one call; fstat on a number that isn't open fails with EBADF.
    let stat = fstat(unsafe { BorrowedFd::borrow_raw(fd) }).map_err(|_| problem("isn't open"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Err(problem("is a directory")),
        _ => Ok(()),
    }
}

/// Closes the descriptors from `first` to `last`, both included.
pub(super) fn close_range(first: u32, last: u32) -> Result<(), ConfineError> {
    // SAFETY: the caller owns the process and has listed every descriptor that anything still uses.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return Ok(());
    }
    Err(ConfineError::advised(
        "close_range",
        io::Error::last_os_error(),
        "; Linux 5.9 or newer is needed",
    ))
}
