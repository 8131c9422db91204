//! Network namespaces that have a name: a file that one is mounted on.
//!
//! A namespace belongs to a thread: whatever is done in one is done by a thread of its own that ends with it.

#![allow(unsafe_code)] // unshare(2), whose safe wrapper is gone

use crate::files::gone_is_fine;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// Runs `work` in a thread of its own and gives what it gives.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(work);
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the namespace's thread panicked")))
    })
}

/// Makes a network namespace and mounts it on `path`, which must not be there.
pub fn create(path: &Path) -> io::Result<()> {
    std::fs::File::create_new(path)?;
    in_thread(|| {
        // SAFETY: no file table is unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(mount_bind("/proc/thread-self/ns/net", path)?)
    })
}

/// Runs `work` within the namespace that is mounted on `path`, or of which it is a link in `/proc`.
pub fn enter<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    in_thread(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    })
}

/// Gives up the name; the namespace goes with its last process, and its interfaces with it.
pub fn remove(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // Not mounted yet, or gone.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    gone_is_fine(std::fs::remove_file(path))
}
