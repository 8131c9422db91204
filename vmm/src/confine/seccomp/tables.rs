//! The filters as data: which system calls each kind of thread may make, and why.
//!
//! To add one, name who needs it. Calls that open, create or name anything have
//! no place here: what the VMM needs is an open descriptor before it starts or
//! arrives over the control socket.

use super::compile::{Arg, Rule};

macro_rules! rule {
    ($name:ident, $why:literal) => {
        rule!($name, [], $why)
    };
    ($name:ident, [$($arg:expr),*], $why:literal) => {
        Rule { name: stringify!($name), number: libc::$name, args: &[$($arg),*], why: $why }
    };
}

/// Argument `index` is one of `any_of`.
const fn is(index: u8, any_of: &'static [u32]) -> Arg {
    Arg {
        index,
        mask: u32::MAX,
        any_of,
    }
}

/// The bits `mask` of argument `index` are one of `any_of`.
const fn bits(index: u8, mask: u32, any_of: &'static [u32]) -> Arg {
    Arg {
        index,
        mask,
        any_of,
    }
}

/// Neither mmap nor mprotect may make memory executable.
const NOT_EXECUTABLE: Arg = bits(2, libc::PROT_EXEC as u32, &[0]);

/// Without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME.
const FUTEX_OPERATION: u32 = !(128 | 256);

/// Stands for the process's own id until the filter is installed; no process can have it.
pub(super) const OWN_PID: u32 = 0xffff_fff0;
/// Stands for the VMM's id in [`WAITER`].
pub(super) const CHILD_PID: u32 = 0xffff_fff1;

/// What the allocator, the standard library's locks and a thread's end need.
pub(super) const COMMON: &[Rule] = &[
    rule!(
        SYS_futex,
        [bits(1, FUTEX_OPERATION, &[0, 1, 9])],
        "locks, condition variables, joins: WAIT, WAKE, WAIT_BITSET"
    ),
    rule!(
        SYS_mmap,
        [NOT_EXECUTABLE],
        "the allocator's large blocks and arenas"
    ),
    rule!(SYS_mprotect, [NOT_EXECUTABLE], "growth of a thread's arena"),
    rule!(SYS_munmap, "the allocator's large blocks"),
    rule!(SYS_mremap, "growth of a large vector"),
    rule!(SYS_brk, "the allocator's heap"),
    rule!(
        SYS_madvise,
        [is(
            2,
            &[libc::MADV_DONTNEED as u32, libc::MADV_REMOVE as u32,]
        )],
        "stacks of ended threads, trimmed arenas; guest pages that the balloon gives back, shared ones by REMOVE"
    ),
    rule!(SYS_read, "eventfds, timerfds, Unix sockets"),
    rule!(
        SYS_write,
        "eventfds (interrupts, wake-ups), Unix sockets, the log on stderr"
    ),
    rule!(
        SYS_close,
        "descriptors of ended vsock connections and swapped disks"
    ),
    rule!(
        SYS_fcntl,
        [is(1, &[libc::F_GETFD as u32])],
        "debug builds check what they close"
    ),
    rule!(
        SYS_clock_gettime,
        "the process's own time, which the throttle looks at; time stamps where the vDSO can't answer"
    ),
    rule!(
        SYS_restart_syscall,
        "a timed wait that SIGSTOP and SIGCONT interrupted"
    ),
    rule!(
        SYS_rt_sigprocmask,
        "glibc masks signals around pthread_kill, abort and a thread's end"
    ),
    rule!(
        SYS_rt_sigreturn,
        "return from the signal that takes a vCPU out of the guest, or from a stack overflow's"
    ),
    rule!(
        SYS_rt_sigaction,
        [is(
            0,
            &[
                libc::SIGABRT as u32,
                libc::SIGSEGV as u32,
                libc::SIGBUS as u32
            ]
        )],
        "abort() and the standard library's overflow handler reset a signal before they die of it"
    ),
    rule!(
        SYS_getpid,
        "pthread_kill and abort address their own process"
    ),
    rule!(SYS_gettid, "abort addresses its own thread"),
    rule!(
        SYS_tgkill,
        [is(0, &[OWN_PID]), is(2, &[SIGRTMIN, libc::SIGABRT as u32])],
        "SIGRTMIN takes a vCPU out of the guest; a panic aborts"
    ),
    rule!(
        SYS_sigaltstack,
        "a thread's end frees the stack of its overflow handler"
    ),
    rule!(SYS_sched_yield, "spinning before a lock's futex"),
    rule!(SYS_exit, "a thread's end"),
    rule!(SYS_exit_group, "the process's end"),
];

/// The main thread.
pub(super) const EVENT_LOOP: &[Rule] = &[
    rule!(SYS_epoll_wait, "the event loop"),
    rule!(SYS_epoll_ctl, "devices watch and unwatch their descriptors"),
    rule!(
        SYS_poll,
        "at the end, unread vsock data gets a last chance to be taken"
    ),
    rule!(SYS_timerfd_settime, "rate limits of virtio-net"),
    rule!(SYS_readv, "virtio-net receives from the tap"),
    rule!(SYS_writev, "virtio-net sends to the tap"),
    rule!(
        SYS_ioctl,
        [is(1, &[TUNSETOFFLOAD])],
        "virtio-net tells the tap what the guest takes"
    ),
    rule!(
        SYS_recvmsg,
        "vsock reads from Unix sockets; control messages with descriptors"
    ),
    rule!(SYS_sendmsg, "vsock writes to Unix sockets without SIGPIPE"),
    rule!(
        SYS_recvfrom,
        "what a closed vsock connection left unread is thrown away"
    ),
    rule!(SYS_sendto, "control replies"),
    rule!(SYS_shutdown, "half-close of a vsock connection"),
    rule!(SYS_getrandom, "virtio-rng"),
    rule!(SYS_lseek, "size of a swapped-in disk"),
];

/// A vCPU thread; it also runs what a device does in the guest's register writes.
pub(super) const VCPU: &[Rule] = &[
    rule!(
        SYS_ioctl,
        [is(1, &[KVM_RUN, KVM_SET_GSI_ROUTING, KVM_GET_REGS])],
        "enters the guest; the guest programs the IO-APIC; where the guest was when KVM gave up"
    ),
    rule!(
        SYS_epoll_ctl,
        "a device's activation watches its queues, its reset unwatches them"
    ),
    rule!(
        SYS_shutdown,
        "a vsock driver that starts anew ends its old connections"
    ),
    rule!(SYS_recvfrom, "their unread input is thrown away"),
    rule!(
        SYS_sendmsg,
        "virtio-fs tells who serves a share where its queues are, or that they are gone"
    ),
    rule!(SYS_recvmsg, "the answers"),
];

/// A disk's worker thread.
pub(super) const BLOCK_WORKER: &[Rule] = &[
    rule!(SYS_epoll_wait, "waits for kicks, rate limits and commands"),
    rule!(SYS_epoll_ctl, "watches its queue"),
    rule!(SYS_preadv2, "guest reads"),
    rule!(SYS_pwritev2, "guest writes"),
    rule!(
        SYS_fdatasync,
        "guest flushes; a swapped-out disk, and every disk at the end"
    ),
    rule!(
        SYS_fallocate,
        [is(1, &[PUNCH_HOLE, ZERO_RANGE])],
        "guest discards and write-zeroes"
    ),
];

/// The process that stays outside the PID namespace: it waits and passes signals and the end on.
pub(super) const WAITER: &[Rule] = &[
    rule!(
        SYS_rt_sigtimedwait,
        "waits for the VMM's end and for SIGTERM and SIGINT"
    ),
    rule!(SYS_waitid, "takes the VMM's exit status"),
    rule!(
        SYS_kill,
        [is(0, &[OWN_PID, CHILD_PID])],
        "hands signals to the VMM, dies of the VMM's signal"
    ),
    rule!(SYS_exit_group, "ends with the VMM's exit code"),
];

/// The first real-time signal that the C library leaves to programs.
const SIGRTMIN: u32 = 34;

const PUNCH_HOLE: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
const ZERO_RANGE: u32 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u32;

/// `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// `_IOW(KVMIO, 0x6a, struct kvm_irq_routing)`.
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`.
const KVM_GET_REGS: u32 = 0x8090_ae81;
