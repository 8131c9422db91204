//! A VMM that runs a guest, looked at from outside. Needs a host that can run one.

use crate::observe::Process;
use crate::start::{Starter, inheriting};
use crate::{assert_every_thread_is_filtered, assert_limits_are_lowered, assert_shows_nothing};
use casemate_vmm::config::{Confinement, DiskConfig, VmConfig};
use casemate_vmm::exit_code;
use libtest_mimic::{Failed, Trial};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Names the guest's kernel, and by that says that this host can run it.
const KERNEL: &str = "CASEMATE_TEST_KERNEL";
/// Statically linked, the guest's only program.
const BUSYBOX: &str = "/bin/busybox";
/// Says that it is there, and goes on working: a disk, an interrupt, a timer.
const INIT: &str = "#!/busybox sh
/busybox mkdir /dev
/busybox mount -t devtmpfs none /dev
exec > /dev/ttyS0
echo the guest is up
while :; do /busybox usleep 10000; done
";
const UP: &str = "the guest is up";
/// Time for a boot, which a slow emulated host needs.
const PATIENCE: Duration = Duration::from_secs(60);

const STARTERS: [Starter; 4] = [
    Starter::Root,
    Starter::User,
    Starter::RootWithoutUnshare,
    Starter::UserWithoutUnshare,
];

pub(crate) fn trials() -> impl Iterator<Item = Trial> {
    let missing = missing();
    if let Some(reason) = &missing {
        eprintln!("running: can't be tested, {reason}");
    }
    let ignored = missing.is_some();
    STARTERS.into_iter().flat_map(move |starter| {
        let trial = |name: &str, test: fn(Starter) -> Result<(), Failed>| {
            let name = format!("running::{}::{name}", starter.name());
            Trial::test(name, move || test(starter))
                .with_ignored_flag(ignored || starter.missing().is_some())
        };
        [
            trial(
                "a_running_vmm_is_confined_and_ends_with_the_shim",
                is_confined,
            ),
            trial("a_forbidden_call_kills_a_running_vmm", forbidden_call_kills),
        ]
    })
}

fn missing() -> Option<String> {
    let kernel = std::env::var_os(KERNEL);
    if kernel.is_none() {
        Some(format!("no guest kernel is named by {KERNEL}"))
    } else if let Err(e) = File::open(BUSYBOX) {
        Some(format!("{BUSYBOX} (Debian's busybox-static): {e}"))
    } else {
        None
    }
}

fn is_confined(starter: Starter) -> Result<(), Failed> {
    let mut guest = Guest::start(starter);

    let vmm = guest.vmm();

    assert_shows_nothing(starter, &vmm);
    assert_limits_are_lowered(&vmm);
    let threads = vmm.threads();
    let names: BTreeSet<_> = threads.iter().map(|thread| thread.status("Name")).collect();
    assert!(names.is_superset(&["casemate-vmm", "vcpu0", "vcpu1"].map(str::to_owned).into()));
    assert_every_thread_is_filtered(&threads);
    for (number, target) in vmm.descriptor_targets() {
        assert!(
            guest.may_have(&target),
            "descriptor {number} is {target}, none of those that the VMM was given or needs"
        );
    }

    guest.control = None;

    assert_eq!(guest.wait().code(), Some(exit_code::STOPPED.into()));
    vmm.wait_until_gone()
}

/// Makes a thread of the VMM attempt a call, as a guest that took the thread over would.
fn forbidden_call_kills(starter: Starter) -> Result<(), Failed> {
    // The filters are the same for all: each kind of thread once will do.
    let threads: &[&str] = match starter {
        Starter::Root => &["casemate-vmm", "vcpu1", "blk"],
        _ => &["vcpu0"],
    };
    for name in threads {
        let guest = Guest::start(starter);
        let all = guest.vmm().threads();
        let Some(thread) = all.iter().find(|thread| thread.status("Name") == *name) else {
            return Err(format!("no thread {name}").into());
        };

        thread.inject_call(libc::SYS_socket)?;

        assert_eq!(guest.wait().signal(), Some(libc::SIGSYS), "{name}");
    }
    Ok(())
}

/// A VMM with a guest that is up.
struct Guest {
    starter: Starter,
    child: Child,
    control: Option<OwnedFd>,
    /// What it may hold, as its links in /proc/PID/fd show it.
    given: BTreeSet<String>,
    _console: BufReader<PipeReader>,
}

impl Guest {
    fn start(starter: Starter) -> Self {
        let kernel = File::open(std::env::var_os(KERNEL).unwrap()).expect("the guest's kernel");
        let initrd = initrd().expect("an initrd in memory");
        let disk = memory_file("disk", &[0; 1 << 20]).expect("a disk in memory");
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm");
        let (console, console_end) = io::pipe().expect("a pipe");
        let (control, control_end) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket pair");
        let config = VmConfig {
            kvm: kvm.as_raw_fd(),
            memory_mib: 128,
            vcpus: 2,
            kernel: kernel.as_raw_fd(),
            initrd: Some(initrd.as_raw_fd()),
            cmdline: "quiet".into(),
            disks: vec![DiskConfig {
                id: "disk".into(),
                segments: vec![disk.as_raw_fd()],
                read_only: false,
                rate_limit: None,
            }],
            nets: vec![],
            vsock: None,
            balloon: true,
            console: Some(console_end.as_raw_fd()),
            control: Some(control_end.as_raw_fd()),
            confinement: Confinement::Full,
        };
        let text = serde_json::to_vec(&config).expect("JSON");
        let text = memory_file("configuration", &text).expect("a configuration in memory");

        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate-vmm"));
        command.args(["--config-fd", &text.as_raw_fd().to_string()]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut inherited = config.descriptors();
        inherited.push(text.as_raw_fd());
        let child = inheriting(starter, &mut command, inherited)
            .spawn()
            .expect("casemate-vmm starts");
        let own = Process::own();
        let mut given: BTreeSet<_> = [
            kvm.as_raw_fd(),
            disk.as_raw_fd(),
            console_end.as_raw_fd(),
            control_end.as_raw_fd(),
        ]
        .map(|fd| own.descriptor_target(fd))
        .into();
        let vmm = Process::new(child.id() as i32);
        given.insert(own.descriptor_target(child.stderr.as_ref().unwrap().as_raw_fd()));
        drop((console_end, control_end));
        let mut guest = Self {
            starter,
            child,
            control: Some(control),
            given,
            _console: BufReader::new(console),
        };
        guest.wait_until_up(vmm);
        guest
    }

    fn wait_until_up(&mut self, vmm: Process) {
        // A guest that hangs must not hang the test: its console ends with it.
        let (up, late) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if late
                .recv_timeout(PATIENCE)
                .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                vmm.kill(libc::SIGKILL);
            }
        });
        let mut log = String::new();
        while !log.contains(UP) {
            if self
                ._console
                .read_line(&mut log)
                .expect("the console's output")
                == 0
            {
                let mut errors = String::new();
                let _ = self
                    .child
                    .stderr
                    .take()
                    .unwrap()
                    .read_to_string(&mut errors);
                panic!("the guest did not come up within {PATIENCE:?}: {errors}\n{log}");
            }
        }
        drop(up);
    }

    fn vmm(&self) -> Process {
        let started = Process::new(self.child.id() as i32);
        if self.starter.has_namespaces() {
            started.only_child()
        } else {
            started
        }
    }

    fn wait(mut self) -> ExitStatus {
        self.child.wait().expect("a child can be waited for")
    }

    /// What it was given, and KVM's and the kernel's objects without a name.
    fn may_have(&self, target: &str) -> bool {
        const NAMELESS: [&str; 6] = [
            "kvm-vm",
            "kvm-vcpu:0",
            "kvm-vcpu:1",
            "[eventfd]",
            "[eventpoll]",
            "[signalfd]",
        ];
        self.given.contains(target)
            || target
                .strip_prefix("anon_inode:")
                .is_some_and(|kind| NAMELESS.contains(&kind))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn memory_file(name: &str, content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// An initramfs with a shell that runs [`INIT`].
fn initrd() -> io::Result<File> {
    let mut archive = Vec::new();
    add(&mut archive, "busybox", 0o100_755, &std::fs::read(BUSYBOX)?);
    add(&mut archive, "init", 0o100_755, INIT.as_bytes());
    add(&mut archive, "TRAILER!!!", 0, &[]);
    memory_file("initrd", &archive)
}

/// One file of a newc archive.
fn add(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let (inode, size, name_size) = (archive.len(), content.len(), name.len() + 1);
    // Magic; inode, mode, uid, gid, links, mtime, size, device ×2, special device ×2, name's size, checksum.
    let header = format!(
        "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
        0, 1
    );
    archive.extend(header.as_bytes());
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
