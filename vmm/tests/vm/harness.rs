//! Starts the real VMM without a shim, and talks to it and its guest.

use casemate_vmm::config::{Confinement, DiskConfig, Fd, VmConfig, VsockConfig, VsockPort};
use casemate_vmm::control::{Answer, Command, MAX_MESSAGE, Message, Phase, Request};
use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, PipeReader, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

/// An emulated host under load is slow; a stuck guest must not stop the tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A machine that is still being described.
pub(crate) struct Machine {
    config: VmConfig,
    handed: Vec<OwnedFd>,
    console: Option<PipeReader>,
}

impl Machine {
    /// One vCPU, 128 MiB, confined, without devices; its init does `steps`.
    pub(crate) fn new(steps: &str) -> Self {
        let mut machine = Self {
            config: VmConfig {
                kvm: -1,
                memory_mib: 128,
                vcpus: 1,
                kernel: -1,
                initrd: None,
                cmdline: format!("test={steps}"),
                disks: Vec::new(),
                nets: Vec::new(),
                shares: Vec::new(),
                vsock: None,
                balloon: false,
                console: None,
                control: None,
                confinement: Confinement::Full,
            },
            handed: Vec::new(),
            console: None,
        };
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        machine.config.kvm = machine.hand(kvm.expect("/dev/kvm: run these tests on a KVM host"));
        machine.config.kernel = machine.hand(from_env("CASEMATE_KERNEL"));
        let initrd = machine.hand(initrd(from_env("CASEMATE_GUEST_INIT")));
        machine.config.initrd = Some(initrd);
        machine
    }

    /// Changes the configuration.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut VmConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// A serial console without the kernel's chatter.
    pub(crate) fn console(mut self) -> Self {
        let (reader, writer) = std::io::pipe().expect("pipe");
        self.config.console = Some(self.hand(writer));
        self.config.cmdline += " quiet";
        self.console = Some(reader);
        self
    }

    /// A disk of these segments.
    pub(crate) fn disk(mut self, id: &str, read_only: bool, segments: Vec<File>) -> Self {
        let segments = segments.into_iter().map(|file| self.hand(file)).collect();
        self.config.disks.push(DiskConfig {
            id: id.into(),
            segments,
            read_only,
            volatile: false,
            limits: None,
        });
        self
    }

    /// A vsock device with one port.
    pub(crate) fn vsock(mut self, port: u32, socket: impl Into<OwnedFd>) -> Self {
        let fd = self.hand(socket);
        self.config.vsock = Some(VsockConfig {
            cid: 3,
            ports: vec![VsockPort { port, fd }],
        });
        self
    }

    /// Another kernel.
    pub(crate) fn kernel(mut self, file: File) -> Self {
        self.config.kernel = self.hand(file);
        self
    }

    /// Hands a descriptor to the VMM.
    pub(crate) fn hand(&mut self, file: impl Into<OwnedFd>) -> Fd {
        let file = file.into();
        rustix::io::fcntl_setfd(&file, FdFlags::empty()).expect("inheritable");
        let number = file.as_raw_fd();
        self.handed.push(file);
        number
    }

    /// Starts the VMM.
    pub(crate) fn start(mut self) -> Running {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("socketpair");
        let timeout = rustix::net::sockopt::Timeout::Recv;
        rustix::net::sockopt::set_socket_timeout(&ours, timeout, Some(PATIENCE)).expect("timeout");
        self.config.control = Some(self.hand(theirs));
        let mut document = memfd();
        let text = serde_json::to_vec(&self.config).expect("serializable");
        document.write_all(&text).expect("written");
        document.rewind().expect("rewound");
        let config_fd = self.hand(document);
        let child = Process::new(vmm())
            .args(["--config-fd", &config_fd.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("VMM starts");
        Running {
            child,
            control: Some(ours),
            console: self.console,
            printed: String::new(),
            next_id: 1,
            phases: Vec::new(),
            ended: None,
        }
    }
}

/// A VMM under way; killed when dropped.
pub(crate) struct Running {
    child: Child,
    control: Option<OwnedFd>,
    console: Option<PipeReader>,
    printed: String,
    next_id: u64,
    pub(crate) phases: Vec<(Phase, u64)>,
    ended: Option<(u8, String, String)>,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) code: u8,
    pub(crate) reason: String,
    pub(crate) guest_log: String,
    pub(crate) stderr: String,
}

impl Running {
    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, command: Command) -> Result<Answer, String> {
        self.ask_with(command, &[])
    }

    /// The same with descriptors.
    pub(crate) fn ask_with(
        &mut self,
        command: Command,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, String> {
        let id = self.next_id;
        self.next_id += 1;
        let packet = serde_json::to_vec(&Request { id, command }).expect("serializable");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let control = self.control.as_ref().expect("control socket");
        let flags = SendFlags::NOSIGNAL;
        sendmsg(control, &[IoSlice::new(&packet)], &mut ancillary, flags).expect("sent");
        loop {
            match self.receive() {
                Some(Message::Reply { id: of, result }) if of == id => return result,
                Some(_) => {}
                None => panic!("the VMM ended: {:?}", self.ended),
            }
        }
    }

    /// The VMM's counters.
    pub(crate) fn statistics(&mut self) -> BTreeMap<String, u64> {
        match self.ask(Command::Statistics) {
            Ok(Answer::Statistics(counters)) => counters,
            other => panic!("{other:?}"),
        }
    }

    /// The next message; `None` once the socket is closed.
    fn receive(&mut self) -> Option<Message> {
        let mut packet = vec![0; MAX_MESSAGE];
        let control = self.control.as_ref()?;
        let received = match recv(control, &mut packet[..], RecvFlags::empty()) {
            // The VMM ended with a request unread: said once, before what it had sent.
            Err(rustix::io::Errno::CONNRESET) => recv(control, &mut packet[..], RecvFlags::empty()),
            other => other,
        };
        let (length, _) = received.expect("an answer in time");
        if length == 0 {
            return None;
        }
        let message = serde_json::from_slice(&packet[..length]).expect("a message");
        match &message {
            Message::Phase { phase, at_ns } => self.phases.push((*phase, *at_ns)),
            Message::Ended {
                code,
                reason,
                guest_log,
            } => self.ended = Some((*code, reason.clone(), guest_log.clone())),
            Message::Reply { .. } => {}
        }
        Some(message)
    }

    /// Reads the console until `text` is there; what was read before counts too.
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let console = self.console.as_mut().expect("a console");
        let mut buffer = [0; 4096];
        while !self.printed.contains(text) {
            assert!(
                Instant::now() < deadline,
                "no {text:?} in {:?}",
                self.printed
            );
            match console.read(&mut buffer).expect("console") {
                0 => panic!("the console ended without {text:?}: {:?}", self.printed),
                n => self.printed += &String::from_utf8_lossy(&buffer[..n]),
            }
        }
        self.printed.clone()
    }

    /// Takes what the console has within this time.
    pub(crate) fn console_for(&mut self, time: Duration) -> String {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let deadline = Instant::now() + time;
        let console = self.console.as_mut().expect("a console");
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let left = Timespec::try_from(left).expect("short");
            let ready = poll(&mut [PollFd::new(console, PollFlags::IN)], Some(&left));
            if ready.expect("poll") == 0 {
                break;
            }
            let n = console.read(&mut buffer).expect("console");
            text += &String::from_utf8_lossy(&buffer[..n]);
        }
        text
    }

    /// Sends the VMM a signal.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    /// The shim goes away.
    pub(crate) fn close_control(&mut self) {
        self.control = None;
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> End {
        while self.receive().is_some() {}
        let status = self.child.wait().expect("waited");
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().expect("piped");
        pipe.read_to_string(&mut stderr).expect("read");
        let code = status
            .code()
            .unwrap_or_else(|| panic!("{status}: {stderr}")) as u8;
        let (said, reason, guest_log) =
            self.ended
                .take()
                .unwrap_or((code, String::new(), String::new()));
        assert_eq!(said, code, "the message and the exit code differ");
        End {
            code,
            reason,
            guest_log,
            stderr,
        }
    }

    /// All phases in their order, with the guest's console read meanwhile.
    pub(crate) fn phase_names(&self) -> Vec<Phase> {
        self.phases.iter().map(|(phase, _)| *phase).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An unnamed file with this content.
pub(crate) fn file_of(content: &[u8]) -> File {
    let mut file = memfd();
    file.write_all(content).expect("written");
    file.rewind().expect("rewound");
    file
}

fn memfd() -> File {
    rustix::fs::memfd_create("casemate-test", MemfdFlags::CLOEXEC)
        .expect("memfd")
        .into()
}

fn vmm() -> String {
    std::env::var("CASEMATE_VMM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_casemate-vmm").into())
}

fn from_env(name: &str) -> File {
    let path =
        std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: use vmm/tests/run"));
    File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A newc archive with `/init` and what a kernel needs before it.
fn initrd(mut init: File) -> File {
    let mut program = Vec::new();
    init.read_to_end(&mut program).expect("init");
    let mut archive = Vec::new();
    for directory in ["dev", "proc", "sys"] {
        entry(&mut archive, directory, 0o40755, (0, 0), &[]);
    }
    entry(&mut archive, "dev/console", 0o20600, (5, 1), &[]);
    entry(&mut archive, "dev/null", 0o20666, (1, 3), &[]);
    entry(&mut archive, "init", 0o100755, (0, 0), &program);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    file_of(&archive)
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let inode = archive.len() as u32 + 1;
    let (major, minor) = device;
    let (size, length) = (data.len() as u32, name.len() as u32 + 1);
    let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, length, 0];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A descriptor of something that is borrowed for a call.
pub(crate) fn fd_of(file: &File) -> BorrowedFd<'_> {
    file.as_fd()
}
