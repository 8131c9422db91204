//! A VMM with a guest, as the shim starts one.

use crate::observe::Process;
use crate::start::{Starter, inheriting};
use casemate_vmm::config::{
    Confinement, DiskConfig, NetConfig, RateLimit, VmConfig, VsockConfig, VsockPort,
};
use casemate_vmm::control::{Answer, Command as Order, MAX_MESSAGE, Message, Request};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, PipeReader, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Names the guest's kernel.
const KERNEL: &str = "CASEMATE_KERNEL";
/// Statically linked, the guest's only program.
const BUSYBOX: &str = "/bin/busybox";
/// What the guest does before anything else.
const PROLOGUE: &str = "#!/busybox sh
/busybox mkdir /bin /dev
/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
exec > /dev/ttyS0 2>&1
";
/// What it says when it is there.
pub(crate) const UP: &str = "the guest is up";
/// Time for a line, which a slow emulated host needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The file that an environment variable names.
pub(crate) fn named_by(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable);
    path.unwrap_or_else(|| panic!("{variable} is unset: vmm/tests/run sets it"))
        .into()
}

/// What a VMM is started with.
pub(crate) struct Launch {
    pub(crate) starter: Starter,
    /// A program that runs the VMM, with its arguments.
    pub(crate) under: Vec<String>,
    /// Shell commands of the guest, until it is up.
    pub(crate) script: &'static str,
    /// Instead of the shell.
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) tap: Option<OwnedFd>,
    /// Ends of the connections to vsock port 1024 and so on.
    pub(crate) vsock: Vec<UnixStream>,
    pub(crate) disk: File,
}

impl Launch {
    pub(crate) fn by(starter: Starter) -> Self {
        Self {
            starter,
            under: vec![],
            script: "",
            initrd: None,
            tap: None,
            vsock: vec![],
            disk: memory_file("disk", &[0; 1 << 20]).expect("a disk in memory"),
        }
    }
}

/// A running VMM and what the shim would have of it.
pub(crate) struct Guest {
    starter: Starter,
    child: Child,
    pub(crate) control: Option<OwnedFd>,
    /// What the VMM may hold, as its links in /proc/PID/fd show it.
    given: BTreeSet<String>,
    console: BufReader<PipeReader>,
}

impl Guest {
    pub(crate) fn start(launch: Launch) -> Self {
        let kernel = File::open(named_by(KERNEL)).expect("the guest's kernel");
        let initrd = match &launch.initrd {
            Some(path) => File::open(path),
            None => shell(launch.script),
        };
        let initrd = initrd.expect("an initrd");
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .expect("/dev/kvm");
        let (console, console_end) = io::pipe().expect("a pipe");
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (control, control_end) =
            socketpair(family, kind, SocketFlags::CLOEXEC, None).expect("a socket pair");
        let config = VmConfig {
            kvm: kvm.as_raw_fd(),
            memory_mib: 128,
            vcpus: 2,
            kernel: kernel.as_raw_fd(),
            initrd: Some(initrd.as_raw_fd()),
            cmdline: "quiet".into(),
            disks: vec![DiskConfig {
                id: "disk".into(),
                segments: vec![launch.disk.as_raw_fd()],
                read_only: false,
                volatile: false,
                limits: None,
            }],
            nets: launch.tap.iter().map(net).collect(),
            shares: Vec::new(),
            vsock: (!launch.vsock.is_empty()).then(|| vsock(&launch.vsock)),
            balloon: true,
            console: Some(console_end.as_raw_fd()),
            control: Some(control_end.as_raw_fd()),
            confinement: Confinement::Full,
        };
        let text = serde_json::to_vec(&config).expect("JSON");
        let text = memory_file("configuration", &text).expect("a configuration in memory");

        let mut words = launch.under.clone();
        words.extend([env!("CARGO_BIN_EXE_casemate-vmm"), "--config-fd"].map(str::to_owned));
        words.push(text.as_raw_fd().to_string());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut inherited = config.descriptors();
        inherited.push(text.as_raw_fd());
        let child = inheriting(launch.starter, &mut command, inherited)
            .spawn()
            .expect("casemate-vmm starts");

        let own = Process::own();
        let stderr = child.stderr.as_ref().unwrap().as_raw_fd();
        let loaded = [kernel.as_raw_fd(), initrd.as_raw_fd()]; // and closed, before the guest runs
        let given = config
            .descriptors()
            .into_iter()
            .filter(|fd| !loaded.contains(fd))
            .chain([stderr]);
        let mut guest = Self {
            starter: launch.starter,
            child,
            control: Some(control),
            given: given.map(|fd| own.descriptor_target(fd)).collect(),
            console: BufReader::new(console),
        };
        drop((console_end, control_end, launch.vsock)); // so that the VMM's are the only ones
        if launch.initrd.is_none() {
            guest.wait_for(UP);
        }
        guest
    }

    /// Waits for a line of the guest's console; returns what came with it.
    pub(crate) fn wait_for(&mut self, line: &str) -> String {
        let _patience = self.patience();
        let mut log = String::new();
        while !log.contains(line) {
            if self
                .console
                .read_line(&mut log)
                .expect("the console's output")
                == 0
            {
                let errors = self.errors();
                panic!("the guest didn't say {line:?} within {PATIENCE:?}: {errors}\n{log}");
            }
        }
        log
    }

    /// Makes a request over the control socket, with descriptors, and takes its answer.
    pub(crate) fn ask(
        &mut self,
        command: Order,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, String> {
        let control = self.control.as_ref().expect("the control socket");
        let request = serde_json::to_vec(&Request { id: 1, command }).expect("JSON");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(
            control,
            &[IoSlice::new(&request)],
            &mut ancillary,
            SendFlags::empty(),
        )
        .expect("the VMM takes requests");
        loop {
            if let Message::Reply { result, .. } = self.message() {
                return result;
            }
        }
    }

    /// What the VMM says next.
    pub(crate) fn message(&mut self) -> Message {
        let _patience = self.patience();
        let control = self.control.as_ref().expect("the control socket");
        let mut packet = vec![0; MAX_MESSAGE];
        match recv(control, &mut packet[..], RecvFlags::empty()) {
            Ok((len, _)) if len > 0 => {
                serde_json::from_slice(&packet[..len]).expect("a message in JSON")
            }
            other => panic!("{other:?} instead of a message: {}", self.errors()),
        }
    }

    /// Until it is dropped, the VMM has so long: one that hangs must not hang the test.
    fn patience(&self) -> Sender<()> {
        let (done, waiting) = channel();
        let started = Process::new(self.child.id() as i32);
        std::thread::spawn(move || {
            if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                started.kill(libc::SIGKILL);
            }
        });
        done
    }

    /// What the VMM, at its end, has said on standard error.
    fn errors(&mut self) -> String {
        let mut errors = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut errors);
        }
        errors
    }

    /// The process that holds the guest.
    pub(crate) fn vmm(&self) -> Process {
        let started = Process::new(self.child.id() as i32);
        if self.starter.has_namespaces() {
            started.only_child()
        } else {
            started
        }
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("a child can be waited for")
    }

    /// What it was given, and KVM's and the kernel's objects without a name.
    pub(crate) fn may_have(&self, target: &str) -> bool {
        const NAMELESS: [&str; 6] = [
            "kvm-vm",
            "kvm-vcpu:0",
            "kvm-vcpu:1",
            "[eventfd]",
            "[eventpoll]",
            "[signalfd]",
        ];
        let nameless = |kind| NAMELESS.contains(&kind);
        self.given.contains(target) || target.strip_prefix("anon_inode:").is_some_and(nameless)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn net(tap: &OwnedFd) -> NetConfig {
    NetConfig {
        tap: tap.as_fd().as_raw_fd(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        // So low that frames have to wait for it.
        rate_limit: Some(RateLimit {
            bytes_per_second: 0,
            ops_per_second: 2,
        }),
    }
}

fn vsock(ends: &[UnixStream]) -> VsockConfig {
    let ports = ends.iter().zip(1024..).map(|(end, port)| VsockPort {
        port,
        fd: end.as_raw_fd(),
    });
    VsockConfig {
        cid: 3,
        ports: ports.collect(),
    }
}

pub(crate) fn memory_file(name: &str, content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// An initramfs with a shell that runs `script`, says that it is up, and stays.
fn shell(script: &str) -> io::Result<File> {
    let init = format!("{PROLOGUE}{script}\necho {UP}\nwhile :; do usleep 10000; done\n");
    let mut archive = Vec::new();
    let busybox = std::fs::read(BUSYBOX).expect("Debian's busybox-static");
    add(&mut archive, "busybox", 0o100_755, &busybox);
    add(&mut archive, "init", 0o100_755, init.as_bytes());
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
