//! The locks of the state directory.

use super::{StateError, io_error};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The file that is locked.
const LOCK: &str = "lock";

/// Who looks after a sandbox's directory.
pub(super) enum Lock {
    /// We do from now on.
    Ours(OwnedFd),
    /// Somebody else.
    Theirs,
    /// There is nothing to lock.
    Missing,
}

/// Whether somebody holds the lock of this directory.
pub fn is_locked(dir: &Path) -> bool {
    matches!(lock(dir), Ok(Lock::Theirs))
}

pub(super) fn open_lock(path: &Path, flags: OFlags) -> Result<OwnedFd, StateError> {
    let flags = flags | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| io_error("open", path)(e.into()))
}

/// Makes and takes the lock of a directory that nobody else knows yet.
pub(super) fn new_lock(dir: &Path) -> Result<OwnedFd, StateError> {
    let path = dir.join(LOCK);
    let fd = open_lock(&path, OFlags::CREATE | OFlags::EXCL)?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)
        .map_err(|e| io_error("lock", &path)(e.into()))?;
    Ok(fd)
}

/// Takes the lock of a sandbox's directory if nobody has it.
pub(super) fn lock(dir: &Path) -> Result<Lock, StateError> {
    let path = dir.join(LOCK);
    let fd = match open_lock(&path, OFlags::empty()) {
        Ok(fd) => fd,
        Err(StateError::Io { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Lock::Missing);
        }
        Err(e) => return Err(e),
    };
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Lock::Theirs),
        Err(e) => return Err(io_error("lock", &path)(e.into())),
    }
    // Another one may have removed the directory between open and lock.
    let same = match (rustix::fs::fstat(&fd), rustix::fs::stat(&path)) {
        (Ok(a), Ok(b)) => a.st_ino == b.st_ino && a.st_dev == b.st_dev,
        _ => false,
    };
    Ok(if same { Lock::Ours(fd) } else { Lock::Missing })
}
