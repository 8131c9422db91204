//! Handing open descriptors to a child process: those named and no others.
//!
//! Everything we open is close-on-exec, and what our own parent left open becomes
//! so. For the one `spawn` that shall pass a descriptor on, the flag is taken off
//! it and put back right after; a lock keeps another such `spawn` from passing it
//! on too.

use rustix::io::FdFlags;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Starts `command` with `passed` open in it, under the numbers they have here.
pub fn spawn_with(command: &mut Command, passed: &[BorrowedFd<'_>]) -> io::Result<Child> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let set_all = |flags| -> io::Result<()> {
        for fd in passed {
            rustix::io::fcntl_setfd(fd, flags)?;
        }
        Ok(())
    };
    close_the_rest_on_exec()?;
    let spawned = set_all(FdFlags::empty()).and_then(|()| command.spawn());
    set_all(FdFlags::CLOEXEC)?;
    spawned
}

/// Marks every descriptor but the standard streams close-on-exec (close_range(2)).
#[allow(unsafe_code)] // no safe wrapper has it
fn close_the_rest_on_exec() -> io::Result<()> {
    // SAFETY: CLOSE_RANGE_CLOEXEC closes nothing and touches no memory.
    match unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes over a descriptor that the parent process passed by its number.
///
/// Fails when nothing is open under that number.
#[allow(unsafe_code)] // a number from the command line becomes an owned descriptor
pub fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::other(format!(
            "descriptor {number} can't be handed over"
        )));
    }
    // SAFETY: the number is only borrowed for a call that fails cleanly if it isn't open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by the contract of the command line it is ours alone from now on.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// An anonymous file that holds `bytes`, for a child to read from its start.
pub fn memory_file(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut written = 0;
    while written < bytes.len() {
        written += rustix::io::pwrite(&fd, &bytes[written..], written as u64)?;
    }
    Ok(fd)
}

/// An anonymous file of `size` bytes, all zero, that can't be made larger: a child writes to it what fits.
pub fn bounded_file(name: &str, size: u64) -> io::Result<std::fs::File> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals)?;
    Ok(fd.into())
}

/// Registers a descriptor with the event loop.
#[allow(unsafe_code)] // tokio asks for a promise about the descriptor's life
pub fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` gives the same open descriptor for as long as it lives, and nothing
    // but the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// The numbers of descriptors, for a configuration.
pub fn numbers<'a>(fds: impl IntoIterator<Item = &'a OwnedFd>) -> Vec<RawFd> {
    fds.into_iter().map(AsRawFd::as_raw_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn spawn_with_one_descriptor_passes_that_one() {
        let file = memory_file("test", b"hello").unwrap();
        let mut command = Command::new("cat");
        command
            .arg(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .stdout(std::process::Stdio::piped());
        let child = spawn_with(&mut command, &[file.as_fd()]).unwrap();
        assert_eq!(child.wait_with_output().unwrap().stdout, b"hello");
        let flags = rustix::io::fcntl_getfd(&file).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn bounded_file_takes_what_fits_and_no_more() {
        use std::io::Write;
        use std::os::unix::fs::FileExt;
        let mut file = bounded_file("test", 8).unwrap();
        file.write_all(b"12345678").unwrap();
        assert!(file.write_all(b"9").is_err());
        assert!(file.set_len(9).is_err());
        let mut back = [0; 8];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(&back, b"12345678");
    }

    #[test]
    fn inherit_of_a_closed_number_fails() {
        assert!(inherit(98_765).is_err());
        assert!(inherit(1).is_err());
    }
}
