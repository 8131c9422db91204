//! Starts the process that confines itself: as root or as a user, on hosts that allow more or less.

#![allow(unsafe_code)] // what a child does between fork and exec

use crate::observe::Process;
use casemate_vmm::confine::UNPRIVILEGED_ID;
use libtest_mimic::Failed;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

/// A user that is nobody in particular.
const USER: u32 = 65534;

/// Who starts the process, and what the host denies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Starter {
    Root,
    User,
    /// Root in a rootless container: only that one id exists there.
    RootOfUserNamespace,
    /// unshare(2) fails with EPERM, as in an unprivileged container.
    RootWithoutUnshare,
    UserWithoutUnshare,
    /// CLONE_NEWUSER fails with EPERM, the other namespaces can be had.
    RootWithoutUserNamespaces,
    /// Neither unshare(2) nor Landlock.
    UserWithNothing,
}

impl Starter {
    pub(crate) const ALL: [Starter; 6] = [
        Self::Root,
        Self::User,
        Self::RootOfUserNamespace,
        Self::RootWithoutUnshare,
        Self::UserWithoutUnshare,
        Self::RootWithoutUserNamespaces,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::User => "user",
            Self::RootOfUserNamespace => "root_of_user_namespace",
            Self::RootWithoutUnshare => "root_without_unshare",
            Self::UserWithoutUnshare => "user_without_unshare",
            Self::RootWithoutUserNamespaces => "root_without_user_namespaces",
            Self::UserWithNothing => "user_with_nothing",
        }
    }

    /// What this machine lacks for the test.
    pub(crate) fn missing(self) -> Option<&'static str> {
        // SAFETY: neither call touches memory; this form of landlock_create_ruleset asks for the version.
        let (root, landlock) = unsafe {
            (
                libc::geteuid() == 0,
                libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) > 0,
            )
        };
        if !root {
            Some("only root can become another user and look into a process that isn't dumpable")
        } else if !self.has_namespaces() && !landlock {
            Some("this kernel has no Landlock")
        } else {
            None
        }
    }

    pub(crate) fn has_namespaces(self) -> bool {
        matches!(
            self,
            Self::Root | Self::User | Self::RootOfUserNamespace | Self::RootWithoutUserNamespaces
        )
    }

    fn is_root(self) -> bool {
        matches!(
            self,
            Self::Root | Self::RootWithoutUnshare | Self::RootWithoutUserNamespaces
        )
    }

    pub(crate) fn namespaces(self) -> &'static [&'static str] {
        match self {
            Self::RootWithoutUserNamespaces => &["mnt", "pid", "net", "ipc", "uts", "cgroup"],
            _ => &["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"],
        }
    }

    pub(crate) fn isolation(self) -> &'static str {
        match self {
            Self::Root | Self::User | Self::RootOfUserNamespace => "Namespaces",
            Self::RootWithoutUserNamespaces => "NamespacesWithoutUser",
            _ => "Landlock",
        }
    }

    /// A user without a user namespace lacks CAP_SETPCAP.
    pub(crate) fn can_empty_bounding_set(self) -> bool {
        self != Self::UserWithoutUnshare
    }

    /// The host's id that the process runs with.
    pub(crate) fn uid_within(self) -> u32 {
        if self.is_root() {
            UNPRIVILEGED_ID
        } else {
            USER
        }
    }

    /// To whom a process that can't be dumped belongs in /proc: the root of where it was started.
    pub(crate) fn root(self) -> u32 {
        match self {
            Self::RootOfUserNamespace => USER,
            _ => 0,
        }
    }

    pub(crate) fn id_map(self) -> Vec<String> {
        match self {
            Self::RootWithoutUserNamespaces => vec!["0 0 4294967295".into()],
            _ => vec![],
        }
    }
}

/// The process that was started, and what it says on standard output.
pub(crate) struct Subject {
    starter: Starter,
    child: RefCell<Child>,
    output: RefCell<BufReader<std::process::ChildStdout>>,
}

impl Subject {
    pub(crate) fn start(starter: Starter, order: &str) -> Self {
        let mut command = Command::new("/proc/self/exe");
        command.arg(format!("subject:{order}"));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = inheriting(starter, &mut command, vec![])
            .spawn()
            .expect("the test's own program starts");
        let output = child.stdout.take().expect("a pipe");
        Self {
            starter,
            child: child.into(),
            output: BufReader::new(output).into(),
        }
    }

    /// Waits until the process is confined; what it reports.
    pub(crate) fn ready(&self) -> Result<HashMap<String, String>, Failed> {
        let mut line = String::new();
        self.output
            .borrow_mut()
            .read_line(&mut line)
            .map_err(|e| e.to_string())?;
        if !line.starts_with("ready ") {
            return Err(format!("not ready: {line:?} {}", self.errors()).into());
        }
        let pairs = line
            .split_whitespace()
            .filter_map(|word| word.split_once('='));
        Ok(pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect())
    }

    /// The process that was started, which may be the one that waits.
    pub(crate) fn started(&self) -> Process {
        Process::new(self.child.borrow().id() as i32)
    }

    /// The process that holds the guest.
    pub(crate) fn vmm(&self) -> Process {
        if self.starter.has_namespaces() {
            self.started().only_child()
        } else {
            self.started()
        }
    }

    /// Lets the process end by itself.
    pub(crate) fn end(&self) -> ExitStatus {
        drop(self.child.borrow_mut().stdin.take());
        self.wait()
    }

    pub(crate) fn wait(&self) -> ExitStatus {
        let mut child = self.child.borrow_mut();
        let _open = child.stdin.take(); // which `Child::wait` would close, and so end the process
        child.wait().expect("a child can be waited for")
    }

    /// What it says on standard error when it refuses to start.
    pub(crate) fn refusal(&self) -> String {
        let end = self.end();
        let errors = self.errors();
        assert_eq!(end.code(), Some(1), "{end}: {errors}");
        errors
    }

    fn errors(&self) -> String {
        let mut errors = String::new();
        if let Some(mut pipe) = self.child.borrow_mut().stderr.take() {
            let _ = pipe.read_to_string(&mut errors);
        }
        errors
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Runs the VMM's own probe to its end.
pub(crate) fn probe(starter: Starter) -> Output {
    let vmm = File::open(env!("CARGO_BIN_EXE_casemate-vmm")).expect("the VMM");
    // By a descriptor: another user may not enter the directory.
    let mut command = Command::new(format!("/proc/self/fd/{}", vmm.as_raw_fd()));
    command.arg("--probe-confinement").stdin(Stdio::piped());
    let command = inheriting(starter, &mut command, vec![vmm.as_raw_fd()]);
    command.output().expect("the VMM starts")
}

/// Prepares a command to be run by `starter`, with these descriptors left open.
pub(crate) fn inheriting(
    starter: Starter,
    command: &mut Command,
    descriptors: Vec<RawFd>,
) -> &mut Command {
    if !starter.is_root() {
        command.uid(USER).gid(USER);
    }
    let keep_open = move || {
        let results = descriptors.iter().map(|&fd| {
            // SAFETY: no memory is involved.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }
        });
        match results.min() {
            Some(-1) => Err(io::Error::last_os_error()),
            _ => before_exec(starter),
        }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(keep_open) }
}

/// Leaks descriptors into the process and takes from it what the host is to deny.
fn before_exec(starter: Starter) -> io::Result<()> {
    for fd in [500, 533, 700] {
        // SAFETY: no memory is involved.
        if unsafe { libc::dup2(1, fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    match starter {
        Starter::Root | Starter::User => Ok(()),
        Starter::RootOfUserNamespace => become_root_of_user_namespace(),
        Starter::RootWithoutUnshare | Starter::UserWithoutUnshare => {
            deny(&[(libc::SYS_unshare, 0, libc::EPERM)])
        }
        Starter::RootWithoutUserNamespaces => {
            deny(&[(libc::SYS_unshare, libc::CLONE_NEWUSER as u32, libc::EPERM)])
        }
        Starter::UserWithNothing => deny(&[
            (libc::SYS_unshare, 0, libc::EPERM),
            (libc::SYS_landlock_create_ruleset, 0, libc::EOPNOTSUPP),
        ]),
    }
}

fn become_root_of_user_namespace() -> io::Result<()> {
    // SAFETY: no memory is involved; the process has one thread.
    let done = unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 1); // or the files below belong to the host's root
        libc::unshare(libc::CLONE_NEWUSER)
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {USER} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {USER} 1"))
}

/// Lets calls fail whose first argument has all of the given bits.
fn deny(calls: &[(libc::c_long, u32, i32)]) -> io::Result<()> {
    let statement = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut code = [statement(0x06, 0, 0, libc::SECCOMP_RET_ALLOW); 16];
    let mut at = 0;
    for &(number, bits, errno) in calls {
        let denial = libc::SECCOMP_RET_ERRNO | errno as u32;
        let block = [
            statement(0x20, 0, 0, 0),
            statement(0x15, 0, 4, number as u32),
            statement(0x20, 0, 0, 16),
            statement(0x54, 0, 0, bits),
            statement(0x15, 0, 1, bits),
            statement(0x06, 0, 0, denial),
        ];
        code[at..][..block.len()].copy_from_slice(&block);
        at += block.len();
    }
    let program = libc::sock_fprog {
        len: code.len() as u16,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
