//! Rules that nothing needs: a VMM is traced while its guest and its shim do all they can, and
//! every rule must have been used, or be listed here with the reason why it wasn't.

#![allow(unsafe_code)] // a tap has no safe wrapper

use crate::guest::{Guest, Launch, PATIENCE};
use crate::start::Starter;
use casemate_vmm::confine::seccomp::ThreadKind;
use casemate_vmm::control::{Command as Order, Message, Phase};
use libtest_mimic::{Failed, Trial};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The agent's initrd, whose agent uses vsock.
const INITRD: &str = "CASEMATE_INITRD";

/// A tmpfs: a trace has many lines.
const MEMORY: &str = "/dev/shm";

/// What an ordinary run doesn't show, and why the rule is there all the same.
const UNSEEN: [(&str, &str); 10] = [
    ("SYS_mmap", "only for an allocation of more than 128 KiB"),
    (
        "SYS_mremap",
        "only if an allocation of more than 128 KiB grows",
    ),
    ("SYS_brk", "only if the heap grows after the start"),
    (
        "SYS_mprotect",
        "only if a thread's arena grows after the start",
    ),
    (
        "SYS_clock_gettime",
        "only with a limit of processor time, or on hosts whose clock source the vDSO can't read",
    ),
    ("SYS_restart_syscall", "only after SIGSTOP and SIGCONT"),
    ("SYS_rt_sigaction", "only when the process aborts"),
    ("SYS_gettid", "only when the process aborts"),
    ("SYS_sched_yield", "only when two threads meet at a lock"),
    (
        "SYS_poll",
        "only if the shim leaves vsock data unread at the end",
    ),
];
/// The same, of one kind of thread.
const UNSEEN_BY: [(ThreadKind, &str, &str); 4] = [
    (
        ThreadKind::Vcpu,
        "SYS_sendmsg",
        "only with a share of the host's files",
    ),
    (
        ThreadKind::Vcpu,
        "SYS_recvmsg",
        "only with a share of the host's files",
    ),
    (
        ThreadKind::Vcpu,
        "SYS_shutdown",
        "only if the guest restarts its vsock driver with connections open",
    ),
    (
        ThreadKind::Vcpu,
        "SYS_recvfrom",
        "only if the guest restarts its vsock driver with connections open",
    ),
];
/// The same, of one value of an argument.
const UNSEEN_VALUES: [(&str, u32, &str); 9] = [
    (
        "SYS_futex",
        0,
        "a wait without a time limit, as glibc makes it: the standard library's is WAIT_BITSET",
    ),
    (
        "SYS_madvise",
        libc::MADV_REMOVE as u32,
        "only if guest memory is shared",
    ),
    ("SYS_fcntl", libc::F_GETFD as u32, "debug builds"),
    (
        "SYS_ioctl",
        0x8090_ae81,
        "KVM_GET_REGS: only if KVM gives up",
    ),
    (
        "SYS_tgkill",
        libc::SIGABRT as u32,
        "only when the process aborts",
    ),
    (
        "SYS_rt_sigaction",
        libc::SIGABRT as u32,
        "only when the process aborts",
    ),
    (
        "SYS_rt_sigaction",
        libc::SIGSEGV as u32,
        "only when the stack overflows",
    ),
    (
        "SYS_rt_sigaction",
        libc::SIGBUS as u32,
        "only when the stack overflows",
    ),
    (
        "SYS_fallocate",
        (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u32,
        "only where holes can't be punched, or the guest wants its blocks kept",
    ),
];

/// Uses disk, network and random numbers.
const BUSY: &str = "
dd if=/dev/vda of=/dev/null bs=64k count=4
dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync
blkdiscard /dev/vda
dd if=/dev/hwrng of=/dev/null bs=64 count=1
ip link set eth0 up
ip addr add 192.0.2.2/24 dev eth0
ping -c 3 -W 2 192.0.2.1
";

pub(crate) fn trial() -> Trial {
    Trial::test(
        "kvm::rules::every_rule_of_the_filters_is_needed",
        every_rule_is_needed,
    )
}

fn every_rule_is_needed() -> Result<(), Failed> {
    let mut used = Used::default();
    let trace = Trace::new("devices")?;
    use_devices(&trace)?;
    used.add(&trace.read()?);
    let trace = Trace::new("vsock")?;
    use_vsock(&trace)?;
    used.add(&trace.read()?);

    let unneeded = used.unneeded();

    let seen: BTreeMap<_, _> = used
        .calls
        .iter()
        .map(|(kind, calls)| (kind, calls.keys()))
        .collect();
    assert!(
        unneeded.is_empty(),
        "nothing needed {unneeded:#?}\nseen: {seen:#?}"
    );
    Ok(())
}

/// Everything that the shim can ask for, and a busy guest.
fn use_devices(trace: &Trace) -> Result<(), Failed> {
    let tap = tap("casemate-test")?;
    let disk = tempfile::tempfile_in(MEMORY)?; // where holes can be punched
    disk.set_len(1 << 20)?;
    let mut guest = Guest::start(Launch {
        under: trace.tracer(),
        script: BUSY,
        tap: Some(tap.as_fd().try_clone_to_owned()?),
        disk,
        ..Launch::by(Starter::Root)
    });
    let other = tempfile::tempfile_in(MEMORY)?;
    other.set_len(2 << 20)?;
    guest.ask(Order::Statistics, &[])?;
    guest.ask(Order::Pause, &[])?;
    guest.ask(Order::Resume, &[])?;
    guest.ask(
        Order::SwapDisk {
            disk: "disk".into(),
        },
        &[other.as_fd()],
    )?;
    guest.ask(Order::Balloon { mib: 16 }, &[])?;
    std::thread::sleep(std::time::Duration::from_secs(1)); // in which the guest gives memory
    guest.ask(Order::Statistics, &[])?;
    guest.ask(Order::Stop, &[])?;
    guest.wait();
    Ok(())
}

/// An agent that connects and loses its shim.
fn use_vsock(trace: &Trace) -> Result<(), Failed> {
    let (end, mut shim) = UnixStream::pair()?;
    let initrd: PathBuf = crate::guest::named_by(INITRD);
    let mut guest = Guest::start(Launch {
        under: trace.tracer(),
        initrd: Some(initrd),
        vsock: vec![end],
        ..Launch::by(Starter::Root)
    });
    while !matches!(
        guest.message(),
        Message::Phase {
            phase: Phase::AgentConnected,
            ..
        }
    ) {}
    // A request of ttrpc for service x, method y: the agent refuses it.
    shim.write_all(b"\0\0\0\x06\0\0\0\x01\x01\0\x0a\x01x\x12\x01y")?;
    shim.set_read_timeout(Some(PATIENCE))?;
    assert_ne!(shim.read(&mut [0; 64])?, 0, "the agent doesn't answer");
    shim.shutdown(std::net::Shutdown::Write)?;
    let _ = shim.read_to_end(&mut Vec::new());
    drop(shim);
    guest.wait();
    Ok(())
}

/// A network device of this host that a guest can have.
fn tap(name: &str) -> io::Result<File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeros is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for words in [
        &["addr", "add", "192.0.2.1/24", "dev", name][..],
        &["link", "set", name, "up"],
    ] {
        let done = std::process::Command::new("/bin/busybox")
            .arg("ip")
            .args(words)
            .status()?;
        assert!(done.success(), "ip {words:?}: {done}");
    }
    Ok(tap)
}

/// A file that strace writes.
struct Trace(tempfile::TempDir, &'static str);

impl Trace {
    fn new(name: &'static str) -> io::Result<Self> {
        Ok(Self(tempfile::tempdir_in(MEMORY)?, name))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join(self.1)
    }

    fn tracer(&self) -> Vec<String> {
        // Numbers instead of names; no signals; threads and children too.
        let words = [
            "/usr/bin/strace",
            "-f",
            "-qq",
            "-X",
            "raw",
            "-e",
            "signal=none",
            "-o",
        ];
        let mut words: Vec<_> = words.map(str::to_owned).into();
        words.push(self.path().to_str().unwrap().to_owned());
        words
    }

    fn read(&self) -> io::Result<String> {
        std::fs::read_to_string(self.path())
    }
}

/// What was called by each kind of thread, once it was filtered: the calls with their first arguments.
#[derive(Default)]
struct Used {
    calls: BTreeMap<&'static str, BTreeMap<String, BTreeSet<Vec<u32>>>>,
}

impl Used {
    /// Takes in the lines of a trace, `PID name(arguments) = result`.
    fn add(&mut self, trace: &str) {
        let mut names = BTreeMap::new();
        let mut filtered = BTreeSet::new();
        let first = trace.split_whitespace().next();
        for line in trace.lines() {
            let Some((pid, call)) = line.split_once(' ') else {
                continue;
            };
            let Some((name, arguments)) = call.trim_start().split_once('(') else {
                continue;
            };
            if name.starts_with("<...") {
                continue; // the rest of a call that began on another line
            }
            if filtered.contains(pid) {
                let kind = kind_of(names.get(pid).copied());
                let calls = self
                    .calls
                    .entry(kind)
                    .or_default()
                    .entry(format!("SYS_{name}"));
                calls.or_default().insert(numbers(arguments));
            } else if name == "prctl" && arguments.starts_with("0xf, \"") {
                names.insert(pid, arguments.split('"').nth(1).unwrap());
            } else if name == "seccomp" && Some(pid) != first {
                filtered.insert(pid);
            }
        }
    }

    /// Rules that were not used and don't say why.
    fn unneeded(&self) -> Vec<String> {
        let mut unneeded = Vec::new();
        let common: BTreeSet<_> = ThreadKind::ALL
            .map(|kind| kind.rules().map(|rule| rule.name).collect::<BTreeSet<_>>())
            .into_iter()
            .reduce(|a, b| &a & &b)
            .unwrap();
        for kind in ThreadKind::ALL {
            for rule in kind.rules() {
                // What all have is needed if any needs it.
                let by: Vec<_> = match common.contains(rule.name) && rule.name != "SYS_epoll_ctl" {
                    true => self
                        .calls
                        .values()
                        .filter_map(|calls| calls.get(rule.name))
                        .collect(),
                    false => self
                        .calls
                        .get(name_of(kind))
                        .and_then(|calls| calls.get(rule.name))
                        .into_iter()
                        .collect(),
                };
                let excused = UNSEEN.iter().any(|(name, _)| *name == rule.name)
                    || UNSEEN_BY
                        .iter()
                        .any(|(k, name, _)| *k == kind && *name == rule.name);
                if by.is_empty() && !excused {
                    unneeded.push(format!("{kind:?} {} ({})", rule.name, rule.why));
                }
                for arg in rule.args.iter().filter(|_| !by.is_empty()) {
                    for value in arg.any_of {
                        let seen = by.iter().copied().flatten().any(|numbers| {
                            numbers
                                .get(usize::from(arg.index))
                                .is_some_and(|n| n & arg.mask == *value)
                        });
                        // The process's own id is only known when the filter is installed.
                        let excused = *value > 0xffff_ff00
                            || UNSEEN_VALUES
                                .iter()
                                .any(|(name, v, _)| *name == rule.name && v == value);
                        if !seen && !excused {
                            unneeded.push(format!("{kind:?} {} with {value:#x}", rule.name));
                        }
                    }
                }
            }
        }
        unneeded.sort();
        unneeded.dedup();
        unneeded
    }
}

fn name_of(kind: ThreadKind) -> &'static str {
    match kind {
        ThreadKind::EventLoop => "main",
        ThreadKind::Vcpu => "vcpu",
        ThreadKind::BlockWorker => "blk",
    }
}

fn kind_of(thread: Option<&str>) -> &'static str {
    match thread {
        None => "main",
        Some("blk") => "blk",
        Some(name) if name.starts_with("vcpu") => "vcpu",
        Some(_) => "other",
    }
}

/// The arguments up to the first that isn't a number, with unknown ones as 0.
fn numbers(arguments: &str) -> Vec<u32> {
    let end = arguments
        .find(['"', '[', '{', ')'])
        .unwrap_or(arguments.len());
    let words = arguments[..end]
        .split([',', ' '])
        .filter(|word| !word.is_empty());
    words
        .take(6)
        .map(|word| match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap_or(0) as u32,
            None => word.parse::<i64>().unwrap_or(0) as u32,
        })
        .collect()
}
