//! System calls that no safe wrapper offers, each as a small safe function.
#![allow(unsafe_code)] // that is this module's purpose

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

fn check(result: impl Into<i64>) -> io::Result<i64> {
    match result.into() {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The caller, with the new process's id and a descriptor of it.
    Parent(Pid, OwnedFd),
}

/// Forks into `cgroup`, with `namespaces` (CLONE_NEW*) new for the child.
///
/// The agent has one thread, so the child may go on as an ordinary program (no lock is held by a thread
/// that doesn't exist in it). It must end with execve or [`exit`].
pub(crate) fn fork(namespaces: u64, cgroup: BorrowedFd<'_>) -> io::Result<Fork> {
    let mut pidfd: i32 = -1;
    // SAFETY: zeros are a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: like fork: no shared memory, no new stack; the struct's size is given.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of_val(&args)) })?;
    match Pid::from_raw(pid as i32) {
        None => Ok(Fork::Child),
        // SAFETY: the kernel stored an open descriptor, ours alone.
        Some(pid) => Ok(Fork::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Ends a forked child at once: no destructor, no buffer of the parent's is flushed twice.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: never returns.
    unsafe { libc::_exit(code) }
}

/// Moves the caller into namespaces of the process behind `pidfd`, or into the one namespace behind a file of nsfs.
pub(crate) fn setns(fd: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::setns(fd.as_raw_fd(), flags as i32) }).map(drop)
}

/// Leaves namespaces for new ones.
pub(crate) fn unshare(flags: u64) -> io::Result<()> {
    // SAFETY: the process has one thread; no CLONE_FILES or CLONE_FS among the flags.
    check(unsafe { libc::unshare(flags as i32) }).map(drop)
}

/// Makes `fd` number `to` (0 ..= 3 in a fresh child), close-on-exec if asked.
pub(crate) fn place(fd: BorrowedFd<'_>, to: i32, cloexec: bool) -> io::Result<()> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: only the forked child calls this; it uses no descriptor that is replaced.
    check(unsafe { libc::dup3(fd.as_raw_fd(), to, flags) }).map(drop)
}

/// Takes over descriptor `fd`, which [`place`] made.
pub(crate) fn adopt(fd: i32) -> OwnedFd {
    // SAFETY: the caller placed it just before and owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Closes every descriptor from `first` on, in a forked child.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the child's copies of the agent's objects are never dropped: it ends with execve or exit.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// Default dispositions and no blocked signal, as a new program expects.
pub(crate) fn reset_signals() -> io::Result<()> {
    // SAFETY: the set is initialised; SIG_DFL is a valid handler.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &set,
            std::ptr::null_mut(),
        ))
        .map(drop)
    }
}

/// Attributes for [`mount_setattr`] (`struct mount_attr`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns_fd: u64,
}

/// Changes the attributes of the mount `tree` (a mount's descriptor), of those below it too if `recursive`.
pub(crate) fn mount_setattr(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attr: &MountAttr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is empty, the struct's size is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const *attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Loads a seccomp filter for the caller.
pub(crate) fn seccomp(flags: u64, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    const SET_MODE_FILTER: i32 = 1;
    // SAFETY: the kernel copies the program during the call and doesn't write to it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
    .map(drop)
}

/// One eBPF instruction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BpfInsn {
    pub(crate) code: u8,
    /// Destination in the low four bits, source in the high.
    pub(crate) regs: u8,
    pub(crate) off: i16,
    pub(crate) imm: i32,
}

/// Loads a device-control program and makes it the one of `cgroup`; `replace` is the one before.
pub(crate) fn bpf_device(
    program: &[BpfInsn],
    cgroup: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    const PROG_LOAD: i32 = 5;
    const PROG_ATTACH: i32 = 8;
    const TYPE_CGROUP_DEVICE: u32 = 15;
    const ATTACH_CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    const REPLACE: u32 = 4;

    // The heads of union bpf_attr for the two commands; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
    }
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
        replace_bpf_fd: u32,
    }

    let load = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    // SAFETY: program and licence outlive the call; the attribute's size is given.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>())
    })?;
    // SAFETY: a new descriptor, ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: fd.as_raw_fd() as u32,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI | if replace.is_some() { REPLACE } else { 0 },
        replace_bpf_fd: replace.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    // SAFETY: as above.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    })?;
    Ok(fd)
}

/// Brings the loopback interface of the caller's network namespace up.
pub(crate) fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads an ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .map(drop)
}

/// A session keyring of the container's own, if the kernel has keyrings at all.
pub(crate) fn new_session_keyring(name: &CStr) -> io::Result<()> {
    const JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: the name is a C string.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        result => result.map(drop),
    }
}

/// Adds `entropy` to the kernel's pool and counts it as such: the host is what the guest trusts anyway.
pub(crate) fn add_entropy(
    random: BorrowedFd<'_>,
    entropy: &[u8; 64],
    length: usize,
) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: i32,
        bytes: i32,
        data: [u8; 64],
    }
    const RNDADDENTROPY: u64 = 0x4008_5203;
    let length = length.min(entropy.len()) as i32;
    let info = PoolInfo {
        bits: length * 8,
        bytes: length,
        data: *entropy,
    };
    // SAFETY: the kernel reads `bytes` bytes of data, which are there.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const info) }).map(drop)
}

/// I/O scheduling class and level of the caller.
pub(crate) fn set_io_priority(class: u32, level: u32) -> io::Result<()> {
    const WHO_PROCESS: i32 = 1;
    // SAFETY: plain system call.
    check(unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            WHO_PROCESS,
            0,
            (class << 13 | level) as i32,
        )
    })
    .map(drop)
}

/// `struct sched_attr`, its first version.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// Scheduling policy of the caller.
pub(crate) fn set_scheduler(mut attr: SchedAttr) -> io::Result<()> {
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: the struct states its size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) }).map(drop)
}

/// Execution domain of the caller.
pub(crate) fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::personality(persona as libc::c_ulong) }).map(drop)
}

/// Replaces the program; returns only on failure.
pub(crate) fn execve(
    path: &CStr,
    args: &[std::ffi::CString],
    env: &[std::ffi::CString],
) -> io::Error {
    let pointers = |strings: &[std::ffi::CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both arrays end with a null pointer and point to live C strings.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Sends `signal` (1 ..= 64, real-time ones too) to the process behind `pidfd`.
pub(crate) fn pidfd_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<u8>(),
            0,
        )
    })
    .map(drop)
}

/// Sends `signal` to `pid`; -1: to everyone but PID 1 and the caller.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sets the wall clock, in nanoseconds since the epoch.
pub(crate) fn set_realtime(ns: i64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: ns / 1_000_000_000,
        tv_nsec: ns % 1_000_000_000,
    };
    // SAFETY: plain system call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) }).map(drop)
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Standard stream 0, 1 or 2 of the caller, which it keeps open for its whole life.
pub(crate) fn standard(fd: i32) -> BorrowedFd<'static> {
    assert!((0..3).contains(&fd));
    // SAFETY: open for as long as the process runs (see above).
    unsafe { BorrowedFd::borrow_raw(fd) }
}
