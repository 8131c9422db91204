//! From a plan to a running guest whose agent has answered.

use super::agent::{Agent, CallError};
use super::bounds::Bounds;
use super::disks::{self, DiskError};
use super::network::Attaching;
use super::places::{PlaceError, Places};
use super::shares::{Server, ShareError, Watched};
use super::stdio::GuestEnds;
use super::vm::{Ended, Vm, VmError};
use crate::fds;
use crate::journal::Journal;
use crate::plan::Plan;
use crate::random;
use crate::settings::Settings;
use casemate_protocol::{CONTROL_PORT, FIRST_STREAM_PORT, GUEST_CID, NAMES_PORT, agent as proto};
use casemate_vmm::config::{Confinement, VmConfig, VsockConfig, VsockPort};
use casemate_vmm::control::{Command, Phase};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes kept of what a VMM prints: it says why it ends, and nothing else.
const MAX_WORDS: usize = 4096;

/// Why a sandbox didn't come up.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    /// A file of the installation or the image can't be opened.
    #[error("can't open {what} {path}")]
    Open {
        /// Kernel, initrd, disk …
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No KVM for us.
    #[error("can't open {path}; `casemate check` says what is missing and how to mend it")]
    Kvm {
        /// The device.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The VMM can't be started.
    #[error("can't start {path}")]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A disk can't be had.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A share of the host's files can't be had.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A socket or a memory file can't be had.
    #[error("can't set up the sandbox")]
    Setup(#[source] io::Error),
    /// A limit can't be kept.
    #[error("can't keep the sandbox to its limits")]
    Bounds(#[source] io::Error),
    /// The guest ended or stayed silent.
    #[error("the guest did not start (it got as far as: {phase}): {cause}{log}")]
    Guest {
        /// The last phase reached.
        phase: &'static str,
        /// What happened.
        cause: CallError,
        /// The guest's last lines, when the cause doesn't hold them.
        log: String,
    },
}

/// A running guest.
pub(super) struct Guest {
    /// Its VMM.
    pub(super) vm: Vm,
    /// Its agent.
    pub(super) agent: Agent,
    /// The agent's first answer.
    pub(super) hello: proto::HelloResponse,
    /// When the agent had answered: host CLOCK_MONOTONIC in ns.
    pub(super) hello_ns: u64,
    /// Something that it writes outlives it.
    lasting: bool,
    /// Who serves it the host's directories.
    shares: tokio::sync::Mutex<Vec<Watched>>,
}

/// What a launch needs besides the plan.
pub(super) struct Launch<'a> {
    /// Paths and times.
    pub(super) settings: &'a Settings,
    /// The sandbox's directory.
    pub(super) dir: &'a Path,
    /// Where processes are written down.
    pub(super) journal: &'a Journal,
    /// Nothing that the container writes is read after its end.
    pub(super) discard: bool,
    /// Where the guest's serial console goes; `None`: it has none.
    pub(super) console: Option<BorrowedFd<'a>>,
}

/// The first container's streams and their ports.
pub(super) struct FirstStreams {
    /// What the agent is told.
    pub(super) stdio: proto::Stdio,
    ports: Vec<(u32, OwnedFd)>,
}

impl FirstStreams {
    /// Gives each stream a port.
    pub(super) fn new(ends: GuestEnds, terminal: bool) -> Self {
        let mut stdio = proto::Stdio {
            terminal,
            ..Default::default()
        };
        let mut ports = Vec::new();
        let mut next = FIRST_STREAM_PORT;
        for (fd, port) in [
            (ends.stdin, &mut stdio.stdin_port),
            (ends.stdout, &mut stdio.stdout_port),
            (ends.stderr, &mut stdio.stderr_port),
        ] {
            if let Some(fd) = fd {
                *port = next;
                ports.push((next, fd));
                next += 1;
            }
        }
        Self { stdio, ports }
    }
}

/// One of two thousand million ports, none of them a first stream's.
fn unguessable_port() -> Result<u32, VmError> {
    let bytes = random::bytes().map_err(|e| VmError::Random(e.to_string()))?;
    Ok(u32::from_ne_bytes(bytes) | 1 << 31)
}

fn open(what: &'static str, path: &Path, flags: OFlags) -> Result<OwnedFd, LaunchError> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|e| LaunchError::Open {
        what,
        path: path.to_owned(),
        source: e.into(),
    })
}

impl Guest {
    /// Opens everything, starts the VMM and waits for the agent.
    pub(super) async fn start(
        plan: &Plan,
        streams: FirstStreams,
        mut network: Option<&mut Attaching>,
        bounds: &Bounds,
        launch: &Launch<'_>,
    ) -> Result<(Self, proto::Stdio), LaunchError> {
        let settings = launch.settings;
        let kvm = rustix::fs::open(&settings.kvm, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| LaunchError::Kvm {
                path: settings.kvm.clone(),
                source: e.into(),
            })?;
        let kernel = open("the guest's kernel", &settings.kernel, OFlags::RDONLY)?;
        let initrd = open("the guest's initrd", &settings.initrd, OFlags::RDONLY)?;
        let disks = disks::open(plan, settings)?;
        let servers = plan
            .shares
            .iter()
            .map(|share| Server::start(share, settings, launch.dir, bounds, launch.journal))
            .collect::<Result<Vec<_>, _>>()?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(LaunchError::Setup)?;
        theirs.set_nonblocking(true).map_err(LaunchError::Setup)?;
        let control_end = OwnedFd::from(theirs);

        let mut ports = vec![(CONTROL_PORT, control_end)];
        ports.extend(streams.ports);
        if let Some(names) = network.as_mut().and_then(|network| network.names()) {
            ports.push((NAMES_PORT, names));
        }
        let network = network.as_deref();
        let config = VmConfig {
            kvm: kvm.as_raw_fd(),
            memory_mib: plan.memory_mib,
            vcpus: plan.vcpus,
            kernel: kernel.as_raw_fd(),
            initrd: Some(initrd.as_raw_fd()),
            cmdline: plan.kernel_args.to_owned(),
            disks: disks::configs(plan, &disks, launch.discard),
            nets: network.map(|n| n.configs(&plan.limits)).unwrap_or_default(),
            shares: servers.iter().map(Server::config).collect(),
            vsock: Some(VsockConfig {
                cid: GUEST_CID,
                ports: ports
                    .iter()
                    .map(|(port, fd)| VsockPort {
                        port: *port,
                        fd: fd.as_raw_fd(),
                    })
                    .collect(),
            }),
            balloon: true,
            console: launch.console.map(|c| c.as_raw_fd()),
            control: None,
            confinement: Confinement::Full,
        };
        let passed: Vec<BorrowedFd<'_>> = [&kvm, &kernel, &initrd]
            .into_iter()
            .chain(disks.iter().flat_map(|disk| &disk.fds))
            .chain(ports.iter().map(|(_, fd)| fd))
            .chain(network.into_iter().flat_map(Attaching::descriptors))
            .chain(servers.iter().map(Server::socket))
            .map(AsFd::as_fd)
            .chain(launch.console)
            .collect();
        let said = fds::bounded_file("vmm-stderr", MAX_WORDS as u64).map_err(LaunchError::Setup)?;
        let said_by_vmm = said.try_clone().map_err(LaunchError::Setup)?;
        let journal = launch.journal;
        let vm = Vm::start(&settings.vmm, config, &passed, said_by_vmm, bounds, journal).map_err(
            |source| LaunchError::Spawn {
                path: settings.vmm.clone(),
                source,
            },
        )?;
        drop((kvm, kernel, initrd, disks));
        drop(ports);
        let shares = servers
            .into_iter()
            .map(|server| server.watch(vm.killer()?, vm.ended()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(LaunchError::Setup)?;

        let agent = Agent::new(ours, vm.ended()).map_err(LaunchError::Setup)?;
        let hello = match agent.hello(&hello_request(), settings.start_timeout).await {
            Ok(hello) => hello,
            Err(cause) => return Err(failed(&vm, cause, &said, &shares).await),
        };
        if let Err(error) = bounds.limit_cpu(&plan.limits, &vm).await {
            vm.kill();
            return Err(LaunchError::Bounds(error));
        }
        let guest = Self {
            vm,
            agent,
            hello,
            hello_ns: monotonic_ns(),
            lasting: plan.is_lasting(),
            shares: shares.into(),
        };
        if plan.vcpus > 1 {
            let request = proto::OnlineCpusRequest {
                vcpus: plan.vcpus.into(),
                ..Default::default()
            };
            if let Err(cause) = guest.agent.online_cpus(&request).await {
                let shares = guest.shares.lock().await;
                return Err(failed(&guest.vm, cause, &said, &shares).await);
            }
        }
        Ok((guest, streams.stdio))
    }

    /// The places in its pod's share, if it has one.
    pub(super) async fn places(&self) -> Result<Option<Places>, PlaceError> {
        let shares = self.shares.lock().await;
        shares.iter().find_map(Watched::places).transpose()
    }

    /// Opens a port for each stream of a further process. The first to connect gets the stream, and the container
    /// could: it runs already. So only the agent is told the numbers.
    pub(super) async fn listen(
        &self,
        ends: GuestEnds,
        terminal: bool,
    ) -> Result<proto::Stdio, VmError> {
        let mut stdio = proto::Stdio {
            terminal,
            ..Default::default()
        };
        for (fd, slot) in [
            (ends.stdin, &mut stdio.stdin_port),
            (ends.stdout, &mut stdio.stdout_port),
            (ends.stderr, &mut stdio.stderr_port),
        ] {
            if let Some(fd) = fd {
                *slot = self.offer(&fd).await?;
            }
        }
        Ok(stdio)
    }

    /// Opens a port for one stream.
    pub(super) async fn offer(&self, stream: &OwnedFd) -> Result<u32, VmError> {
        let port = unguessable_port()?;
        let command = Command::VsockListen { port };
        self.vm.request(command, &[stream.as_fd()]).await?;
        Ok(port)
    }

    /// Ends the guest in order: disks synced, or at once when `discard` and nothing that it wrote outlives it.
    pub(super) async fn stop(&self, discard: bool) {
        const PATIENCE: Duration = Duration::from_secs(10);
        let discard = discard && !self.lasting;
        if !discard && self.vm.ended().borrow().is_none() {
            let _ = self.agent.shutdown().await;
            let stop = self.vm.request(Command::Stop, &[]);
            let _ = tokio::time::timeout(PATIENCE, stop).await;
            let _ = tokio::time::timeout(PATIENCE, self.vm.wait()).await;
        }
        self.vm.kill();
        let _ = tokio::time::timeout(PATIENCE, self.vm.wait()).await;
        for share in self.shares.lock().await.iter_mut() {
            let _ = tokio::time::timeout(PATIENCE, share.gone()).await;
        }
    }
}

fn hello_request() -> proto::HelloRequest {
    let mut entropy = vec![0; 64];
    let flags = rustix::rand::GetRandomFlags::empty();
    let got = rustix::rand::getrandom(&mut entropy[..], flags).unwrap_or(0);
    entropy.truncate(got);
    proto::HelloRequest {
        realtime_ns: crate::state::now_ns() as i64,
        entropy,
        ..Default::default()
    }
}

/// Ends a guest that failed to start and gathers what can be said about it.
async fn failed(vm: &Vm, cause: CallError, said: &File, shares: &[Watched]) -> LaunchError {
    const LAST_WORDS: Duration = Duration::from_secs(3);
    let phase = phase_name(vm.phases().last().map(|(phase, _)| *phase));
    let mut text = String::new();
    match &cause {
        CallError::Ended(end) if end.guest_log.is_empty() => text = vmm_words(said),
        CallError::Ended(_) => {}
        _ => {
            // Stopped rather than killed, the VMM still tells the guest's last lines.
            let _ = tokio::time::timeout(LAST_WORDS, vm.request(Command::Stop, &[])).await;
            if let Ok(Ended { guest_log, .. }) = tokio::time::timeout(LAST_WORDS, vm.wait()).await
                && !guest_log.is_empty()
            {
                text = format!("\nthe guest's last lines:\n{}", guest_log.trim_end());
            }
        }
    }
    vm.kill();
    let _ = tokio::time::timeout(LAST_WORDS, vm.wait()).await;
    let told = cause.to_string();
    let complaints = shares.iter().filter_map(|share| share.complaint(&told));
    text.extend(complaints);
    LaunchError::Guest {
        phase,
        cause,
        log: text,
    }
}

/// What the VMM itself printed.
fn vmm_words(said: &File) -> String {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; MAX_WORDS];
    let got = said.read_at(&mut bytes, 0).unwrap_or(0);
    let end = bytes[..got].iter().position(|b| *b == 0).unwrap_or(got);
    let text = super::vm::printable(&String::from_utf8_lossy(&bytes[..end]), MAX_WORDS);
    match text.trim() {
        "" => String::new(),
        words => format!("\nthe VMM said: {words}"),
    }
}

fn phase_name(phase: Option<Phase>) -> &'static str {
    match phase {
        None => "start of the VMM",
        Some(Phase::Main) => "confinement",
        Some(Phase::Confined) => "KVM setup",
        Some(Phase::KvmReady) => "kernel load",
        Some(Phase::KernelLoaded) => "first instruction",
        Some(Phase::FirstRun) => "kernel boot",
        Some(Phase::AgentConnected) => "agent",
    }
}

/// Host CLOCK_MONOTONIC in ns.
pub(super) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
