//! What holds a sandbox's processes on the host: a control group (cgroup v2) and the processors that they may run on.
//!
//! Both are there before a process's program begins, so that nothing that it starts is left out. Only a limit that was
//! asked for makes a group: without one a start pays for none, and the size of the VM is the bound.

use crate::cgroup;
use crate::journal::{self, Journal, Taken};
use crate::plan::Limits;
use rustix::thread::CpuSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Gives a sandbox's group back.
pub(super) fn release(journal: &Journal) {
    if let Err(error) = cgroup::release(journal) {
        // It stays in the journal: the next command tries again, and tells.
        eprintln!("casemate shim: {}", crate::rpc::chain(&error));
    }
}

/// The bounds of one sandbox.
#[derive(Debug)]
pub(super) struct Bounds {
    group: Option<Group>,
    cpus: Option<CpuSet>,
}

#[derive(Debug)]
struct Group {
    path: PathBuf,
    /// Its `cgroup.procs`, open for writing.
    members: OwnedFd,
}

impl Group {
    fn new(path: PathBuf, limits: &Limits, journal: &Journal) -> io::Result<Self> {
        journal.record(&Taken::Cgroup { path: path.clone() })?;
        cgroup::create(&path)?;
        cgroup::limit_memory(&path, limits)?;
        let members = cgroup::members(&path)?;
        Ok(Self { path, members })
    }
}

impl Bounds {
    /// Makes what the limits of container `id` need and this user can have.
    pub(super) fn new(id: &str, limits: &Limits, journal: &Journal) -> io::Result<Self> {
        let path = match limits.need_group() {
            true => cgroup::path_for(id),
            false => None,
        };
        let group = path.map(|path| Group::new(path, limits, journal));
        let cpus = (!limits.cpus.is_empty()).then(|| {
            let mut set = CpuSet::new();
            for cpu in &limits.cpus {
                if (*cpu as usize) < CpuSet::MAX_CPU {
                    set.set(*cpu as usize);
                }
            }
            set
        });
        let group = group.transpose()?;
        Ok(Self { group, cpus })
    }

    /// The process that `command` starts will be held.
    #[allow(unsafe_code)] // runs between fork and exec
    pub(super) fn hold(&self, command: &mut Command) {
        let members = self.group.as_ref().map(|group| group.members.as_raw_fd());
        let cpus = self.cpus;
        if members.is_none() && cpus.is_none() {
            return;
        }
        let hold = move || {
            if let Some(members) = members {
                // SAFETY: the parent has it open, and the child has all that its parent has until it executes.
                let members = unsafe { std::os::fd::BorrowedFd::borrow_raw(members) };
                rustix::io::write(members, b"0")?;
            }
            if let Some(cpus) = &cpus {
                rustix::thread::sched_setaffinity(None, cpus)?;
            }
            Ok(())
        };
        // SAFETY: two system calls, nothing allocated, no lock taken.
        unsafe { command.pre_exec(hold) };
    }

    /// Keeps a sandbox whose VMM runs to another share of the processors. Its memory stays that of its VM. One that had
    /// no group gets one for its VMM: what serves its shares was started before, and stays where it is.
    pub(super) fn change(
        &mut self,
        id: &str,
        limits: &Limits,
        vmm: u32,
        journal: &Journal,
    ) -> io::Result<()> {
        if self.group.is_none()
            && limits.need_group()
            && let Some(path) = cgroup::path_for(id)
        {
            let group = Group::new(path, limits, journal)?;
            for process in journal::with_children(vmm) {
                rustix::io::write(&group.members, process.to_string().as_bytes())?;
            }
            self.group = Some(group);
        }
        self.limit_cpu(limits)
    }

    /// Whether there is a group to give back.
    pub(super) fn has_group(&self) -> bool {
        self.group.is_some()
    }

    /// Limits the processor time from now on. Not before: a guest that is booting does its own work slowly enough.
    pub(super) fn limit_cpu(&self, limits: &Limits) -> io::Result<()> {
        match &self.group {
            Some(group) => cgroup::limit_cpu(&group.path, limits),
            None => Ok(()),
        }
    }
}
