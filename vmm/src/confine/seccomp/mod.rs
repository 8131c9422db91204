//! Seccomp filters, one for each kind of thread: what isn't in its table kills the process.
//!
//! [`tables`] is the data, [`compile`] turns it into BPF when the crate is
//! built; here it is handed to the kernel.

#![allow(unsafe_code)] // seccomp(2) has no safe wrapper that takes a program made beforehand

mod compile;
mod tables;

#[cfg(test)]
mod tests;

use super::ConfineError;
use compile::{Program, compile};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::io;

pub use compile::{Arg, Rule};

/// What a thread is for, and with that what it may ask of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread: control socket, timers, every device but disks.
    EventLoop,
    /// Runs one vCPU.
    Vcpu,
    /// Reads and writes a disk's files.
    BlockWorker,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [ThreadKind; 3] = [Self::EventLoop, Self::Vcpu, Self::BlockWorker];

    /// The rules of this kind, for tests and tools; [`install`] uses their compiled form.
    pub fn rules(self) -> impl Iterator<Item = &'static Rule> {
        self.tables().iter().copied().flatten()
    }

    const fn tables(self) -> &'static [&'static [Rule]] {
        match self {
            Self::EventLoop => &[tables::COMMON, tables::EVENT_LOOP],
            Self::Vcpu => &[tables::COMMON, tables::VCPU],
            Self::BlockWorker => &[tables::COMMON, tables::BLOCK_WORKER],
        }
    }

    fn program(self) -> &'static Program {
        static EVENT_LOOP: Program = compile(ThreadKind::EventLoop.tables());
        static VCPU: Program = compile(ThreadKind::Vcpu.tables());
        static BLOCK_WORKER: Program = compile(ThreadKind::BlockWorker.tables());
        match self {
            Self::EventLoop => &EVENT_LOOP,
            Self::Vcpu => &VCPU,
            Self::BlockWorker => &BLOCK_WORKER,
        }
    }
}

/// Filters the calling thread for good.
///
/// Each thread calls this right before it goes to work. The event loop comes
/// last: no thread can be created after it, neither by the filters nor by RLIMIT_NPROC,
/// which it sets to zero. (Earlier than that the limit would hit the threads
/// themselves, and before Linux 5.14 count the user's other processes.)
pub fn install(kind: ThreadKind) -> Result<(), ConfineError> {
    if kind == ThreadKind::EventLoop {
        setrlimit(
            Resource::Nproc,
            Rlimit {
                current: Some(0),
                maximum: Some(0),
            },
        )
        .map_err(|e| ConfineError::step("setrlimit(RLIMIT_NPROC, 0)", e))?;
    }
    load(kind.program(), 0)
}

/// Filters the process that waits for the VMM outside its PID namespace.
pub(super) fn install_waiter(child: u32) -> Result<(), ConfineError> {
    static WAITER: Program = compile(&[tables::WAITER]);
    load(&WAITER, child)
}

fn load(program: &Program, child: u32) -> Result<(), ConfineError> {
    let mut program = *program;
    for instruction in program.code_mut() {
        match instruction.k {
            tables::OWN_PID => instruction.k = std::process::id(),
            tables::CHILD_PID => instruction.k = child,
            _ => {}
        }
    }
    let code = program.code_mut();
    let fprog = libc::sock_fprog {
        len: code.len() as u16, // at most MAX_CODE
        filter: code.as_mut_ptr(),
    };
    // SAFETY: `fprog` points at `len` instructions that live through the call; the kernel copies them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const fprog,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(ConfineError::step(
            "seccomp(SET_MODE_FILTER)",
            io::Error::last_os_error(),
        ))
    }
}
