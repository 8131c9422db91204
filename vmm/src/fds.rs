//! Inherited descriptors become owned ones.
#![allow(unsafe_code)] // reason: taking a descriptor by its number is unsafe, and done here only

use crate::config::Fd;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Takes an inherited descriptor. Each number of a configuration is taken once:
/// `VmConfig::validate` has refused doubles.
pub(crate) fn take(fd: Fd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; a number that isn't open gives EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, was inherited for us, and no one else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The same as a file.
pub(crate) fn take_file(fd: Fd) -> io::Result<File> {
    take(fd).map(File::from)
}
