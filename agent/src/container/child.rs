//! The forked child's way from a copy of the agent to a process of the container.
//!
//! It runs as an ordinary program (see [`crate::sys::fork`]) but never returns into the agent's code.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::termios::{Winsize, tcsetwinsize};

use super::become_user::{execute, prepare};
use super::namespaces::{NEWNET, NEWPID, NEWUSER};
use super::process::Plan;
use super::root::{self, Layout};
use super::tool::Job;
use super::wire;
use crate::error::{Attempt, Error, Result};
use crate::seccomp::Filter;
use crate::sys;

/// Descriptor of the socket to the agent.
const SYNC: i32 = 3;

/// What the child needs; all of it made before the fork.
pub(super) struct Child<'a> {
    /// Socket to the agent.
    pub(super) sync: &'a OwnedFd,
    /// Standard streams, unless there is a terminal.
    pub(super) streams: [Option<&'a OwnedFd>; 3],
    pub(super) size: Option<Winsize>,
    pub(super) plan: &'a Plan,
    pub(super) filter: Option<&'a Filter>,
    pub(super) role: Role<'a>,
    /// Instead of executing anything.
    pub(super) job: Option<&'a Job>,
}

/// How the child gets into its container.
pub(super) enum Role<'a> {
    /// Builds it.
    First(First<'a>),
    /// Joins these namespaces of the process behind the descriptor.
    Joins { first: &'a OwnedFd, namespaces: u64 },
    /// Not at all.
    Stays,
}

/// What the first process does.
pub(super) struct First<'a> {
    pub(super) id: &'a str,
    /// Namespaces to join by path, a user namespace first; no pid namespace.
    pub(super) join: Vec<(u64, &'a PathBuf)>,
    /// Namespaces to make now; those of the fork are made already.
    pub(super) unshare: u64,
    /// All namespaces new for the container.
    pub(super) new: u64,
    pub(super) layout: &'a Layout,
    pub(super) hostname: Option<&'a str>,
    pub(super) domainname: Option<&'a str>,
    pub(super) time_offsets: &'a str,
    pub(super) personality: Option<u64>,
}

/// Runs the child. It ends in an execve, or tells the agent why not and exits.
pub(super) fn run(child: Child<'_>) -> ! {
    // Whoever shares a pid namespace with this copy of the agent must not look into its memory.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    let sync = match take_descriptors(&child) {
        Ok(sync) => sync,
        Err(error) => {
            let _ = wire::send_error(child.sync, &error);
            sys::exit(1);
        }
    };
    let error = match (enter(&child, &sync), child.job) {
        (Ok(Some(ready)), _) => execute(child.plan, &ready, child.filter),
        (Ok(None), Some(job)) => {
            // As an execve would.
            drop(sync);
            sys::exit(job.run());
        }
        (Ok(None), None) => Error::invalid("there is nothing to run"),
        (Err(error), _) => error,
    };
    let _ = wire::send_error(&sync, &error);
    sys::exit(1);
}

fn take_descriptors(child: &Child<'_>) -> Result<OwnedFd> {
    let what = || "arrange the process's descriptors".to_string();
    sys::reset_signals().attempt(what)?;
    // The guest's, before any namespace is joined: a container's could be anything.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .attempt(|| "open /dev/null".into())?;
    if let Role::Joins { first, namespaces } = child.role {
        // The pid namespace is the fork's matter.
        sys::setns(first.as_fd(), namespaces & !NEWPID)
            .attempt(|| "join the container's namespaces".into())?;
    }
    for (number, stream) in child.streams.iter().enumerate() {
        sys::place(stream.unwrap_or(&null).as_fd(), number as i32, false).attempt(what)?;
    }
    std::mem::forget(null); // closed with all else below
    if std::os::fd::AsRawFd::as_raw_fd(child.sync) != SYNC {
        sys::place(child.sync.as_fd(), SYNC, true).attempt(what)?;
    }
    sys::close_from(SYNC as u32 + 1).attempt(what)?;
    Ok(sys::adopt(SYNC))
}

/// `None`: a tool is to be run.
fn enter(child: &Child<'_>, sync: &OwnedFd) -> Result<Option<super::become_user::Ready>> {
    let terminal = match &child.role {
        Role::First(first) => build(child, first, sync)?,
        Role::Joins { .. } | Role::Stays => {
            rustix::process::setsid().attempt(|| "start a session".into())?;
            if child.plan.terminal {
                Some(root::open_terminal(false)?)
            } else {
                None
            }
        }
    };
    if let Some(terminal) = &terminal {
        take_terminal(child, terminal)?;
    }
    let make_cwd = matches!(child.role, Role::First(_));
    let ready = match child.job {
        Some(_) => {
            rustix::process::umask(Mode::empty());
            None
        }
        None => Some(prepare(child.plan, child.filter, make_cwd)?),
    };
    wire::send_ready(sync, terminal.as_ref().map(|t| &t.master))
        .attempt(|| "report to the agent".into())?;
    wire::await_go(sync).attempt(|| "wait for the start".into())?;
    drop(terminal); // the agent has taken its end by now
    Ok(ready)
}

fn build(child: &Child<'_>, first: &First<'_>, sync: &OwnedFd) -> Result<Option<root::Terminal>> {
    // The guest's own, in reach whatever the container mounts.
    let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .attempt(|| "open /proc".into())?;
    for (flag, path) in &first.join {
        let what = || format!("join namespace {}", path.display());
        let file = rustix::fs::open(
            path.as_path(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .attempt(what)?;
        sys::setns(file.as_fd(), *flag).attempt(what)?;
    }
    if first.new & NEWUSER != 0 {
        // Nobody until the agent has written the id maps.
        wire::await_go(sync).attempt(|| "wait for the id maps".into())?;
    }
    if (first.new | first.unshare) & NEWUSER != 0
        || first.join.iter().any(|(flag, _)| *flag == NEWUSER)
    {
        become_root()?;
    }
    sys::unshare(first.unshare).attempt(|| format!("make namespaces {:#x}", first.unshare))?;
    if !first.time_offsets.is_empty() {
        let file = rustix::fs::openat(
            &proc,
            "self/timens_offsets",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        file.and_then(|file| rustix::io::write(file, first.time_offsets.as_bytes()))
            .attempt(|| "set linux.timeOffsets".into())?;
    }
    rustix::process::setsid().attempt(|| "start a session".into())?;
    let keyring =
        std::ffi::CString::new(first.id).map_err(|_| Error::invalid("the id holds a NUL"))?;
    sys::new_session_keyring(&keyring).attempt(|| "make a session keyring".into())?;
    if first.new & NEWNET != 0 {
        sys::loopback_up().attempt(|| "bring the loopback interface up".into())?;
    }
    if let Some(name) = first.hostname {
        rustix::system::sethostname(name.as_bytes())
            .attempt(|| format!("set the host name to {name:?}"))?;
    }
    if let Some(name) = first.domainname {
        rustix::system::setdomainname(name.as_bytes())
            .attempt(|| format!("set the domain name to {name:?}"))?;
    }
    let terminal = root::enter(first.layout, &proc, child.plan.terminal)?;
    if let Some(persona) = first.personality {
        sys::set_personality(persona).attempt(|| "apply linux.personality".into())?;
    }
    Ok(terminal)
}

/// Root of the user namespace.
fn become_root() -> Result<()> {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let what = || "become root of the user namespace (is id 0 mapped?)".to_string();
    set_thread_groups(&[]).attempt(what)?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).attempt(what)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).attempt(what)
}

fn take_terminal(child: &Child<'_>, terminal: &root::Terminal) -> Result<()> {
    let what = || "make the terminal the process's own".to_string();
    rustix::process::ioctl_tiocsctty(&terminal.slave).attempt(what)?;
    if let Some(size) = child.size {
        tcsetwinsize(&terminal.slave, size).attempt(what)?;
    }
    for number in 0..3 {
        sys::place(terminal.slave.as_fd(), number, false).attempt(what)?;
    }
    Ok(())
}
