//! A sandbox from the command line's side: its directory, its shim, its Task API.

use crate::fds;
use crate::log;
use crate::restart::Policy;
use crate::rpc;
use crate::settings::Settings;
use crate::shim::FILL;
use crate::state::{SOCKET, SandboxDir};
use anyhow::{Context, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::Message;
use serde_json::Value;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The type of the Task API's limits.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// Calls that only move bits around.
const QUICK: Duration = Duration::from_secs(60);
/// On top of the guest's own bound: opening, mounting, creating.
const CREATE_MARGIN: Duration = Duration::from_secs(60);

/// A process as the Task API names it.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProcessId<'a> {
    /// The container's id.
    pub(super) container: &'a str,
    /// Empty: the container's first process.
    pub(super) exec: &'a str,
}

impl<'a> ProcessId<'a> {
    /// A container's first process.
    pub(super) fn first_of(container: &'a str) -> Self {
        let exec = "";
        Self { container, exec }
    }
}

/// A connection to a sandbox's Task API.
pub(super) struct Client {
    task: TaskClient,
}

/// A shim that serves one sandbox, and our connection to it.
pub(super) struct Shim {
    child: Child,
    client: Client,
    create_limit: Duration,
    /// The shim ends its sandbox once this is closed.
    _lifeline: OwnedFd,
}

/// How the shim shall treat the sandbox.
pub(super) struct ShimOptions<'a> {
    /// What the container writes needn't be kept.
    pub(super) discard: bool,
    /// For the guest's console.
    pub(super) console: Option<&'a OwnedFd>,
    /// Nobody attends the container once it runs: what to do when it ends.
    pub(super) unattended: Option<Policy>,
    /// What the container writes is logged.
    pub(super) log: Option<log::Limits>,
    /// Keeps the image's files, and is to be kept as long.
    pub(super) lease: &'a File,
    /// A volume may have to be filled from the image, which takes as long as it takes.
    pub(super) fills: bool,
}

impl Shim {
    /// Starts a shim for the sandbox and connects to it.
    pub(super) fn start(
        settings: &Settings,
        dir: &SandboxDir,
        options: &ShimOptions<'_>,
    ) -> anyhow::Result<Self> {
        let (listener, connection) = sockets(dir)?;
        let (lifeline, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let log = std::fs::File::create(dir.path().join("shim.log"))
            .context("can't make the shim's log")?;
        let mut passed = vec![listener.as_fd(), dir.lock_fd().as_fd(), lifeline.as_fd()];
        let mut command = Command::new(&settings.shim);
        let number = |fd: &dyn AsRawFd| fd.as_raw_fd().to_string();
        command.arg("--serve").arg("--dir").arg(dir.path());
        command.args(["--listen-fd", &number(&listener)]);
        command.args(["--lock-fd", &number(dir.lock_fd())]);
        command.args(["--lifeline-fd", &number(&lifeline)]);
        if options.discard {
            command.arg("--discard");
        }
        if let Some(policy) = options.unattended {
            command.args(["--unattended", &policy.to_string()]);
            command.args(["--hold-fd", &number(options.lease)]);
            passed.push(options.lease.as_fd());
        }
        if let Some(limits) = options.log {
            command.args(["--log", &limits.to_string()]);
        }
        if let Some(console) = options.console {
            command.args(["--console-fd", &number(console)]);
            passed.push(console.as_fd());
        }
        command
            // The terminal's signals are for us: we hand them on to the workload.
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = fds::spawn_with(&mut command, &passed)
            .with_context(|| format!("can't start {}", settings.shim.display()))?;
        // A shim that is gone already is noticed by the first call.
        let _ = dir.journal().record_process("shim", child.id() as i32);
        Ok(Self {
            child,
            client: Client::new(connection)?,
            create_limit: settings.start_timeout
                + CREATE_MARGIN
                + if options.fills { FILL } else { Duration::ZERO },
            _lifeline: ours,
        })
    }

    /// Leaves a shim to itself whose container was started unattended.
    pub(super) fn leave(self) {
        // It is nobody's child once we are gone; only its lifeline is closed here.
    }

    /// Its Task API.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Creates the container: boots the guest.
    pub(super) async fn create(&self, request: &api::CreateTaskRequest) -> ttrpc::Result<()> {
        let context = rpc::context(Some(self.create_limit));
        self.client.task.create(context, request).await.map(|_| ())
    }

    /// Ends the sandbox in order and waits until its shim is gone.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        let request = api::ShutdownRequest {
            now: true,
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        // The answer may be lost when the shim is quick to go.
        let _ = self.client.task.shutdown(context, &request).await;
        drop(self._lifeline);
        reap(&mut self.child)
    }
}

impl Client {
    fn new(connection: UnixStream) -> anyhow::Result<Self> {
        let task = TaskClient::new(rpc::client(connection)?);
        Ok(Self { task })
    }

    /// Connects to the shim that serves the sandbox in `dir`.
    pub(super) fn connect(dir: &Path) -> anyhow::Result<Self> {
        let socket = SocketPath::in_dir(dir)?;
        let connection = UnixStream::connect(&socket.path)
            .with_context(|| format!("nobody serves the sandbox in {}", dir.display()))?;
        Self::new(connection)
    }

    /// Changes limits (`linux.resources` of the runtime spec).
    pub(super) async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let request = api::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(Any {
                type_url: RESOURCES_TYPE.to_owned(),
                value: resources.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.task.update(quick(), &request).await.map(|_| ())
    }

    /// Starts a process.
    pub(super) async fn start(&self, process: ProcessId<'_>) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            ..Default::default()
        };
        self.task.start(quick(), &request).await.map(|_| ())
    }

    /// Adds a process; its container's id and its own come from `process`.
    pub(super) async fn exec(
        &self,
        process: ProcessId<'_>,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<()> {
        let request = api::ExecProcessRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            ..request
        };
        self.task.exec(quick(), &request).await.map(|_| ())
    }

    /// Waits for a process's end and gives its exit status.
    pub(super) async fn wait(&self, process: ProcessId<'_>) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            ..Default::default()
        };
        let answer = self.task.wait(rpc::context(None), &request).await?;
        Ok(answer.exit_status)
    }

    /// Sends a signal to a process.
    pub(super) async fn kill(&self, process: ProcessId<'_>, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            signal,
            ..Default::default()
        };
        self.task.kill(quick(), &request).await.map(|_| ())
    }

    /// Tells the new size of the terminal.
    pub(super) async fn resize(
        &self,
        process: ProcessId<'_>,
        rows: u16,
        columns: u16,
    ) -> ttrpc::Result<()> {
        let request = api::ResizePtyRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.task.resize_pty(quick(), &request).await.map(|_| ())
    }

    /// Ends standard input.
    pub(super) async fn close_stdin(&self, process: ProcessId<'_>) -> ttrpc::Result<()> {
        let request = api::CloseIORequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            stdin: true,
            ..Default::default()
        };
        self.task.close_io(quick(), &request).await.map(|_| ())
    }

    /// Forgets a process that ended, once its output was passed on.
    pub(super) async fn delete(&self, process: ProcessId<'_>) -> ttrpc::Result<()> {
        let request = api::DeleteRequest {
            id: process.container.to_owned(),
            exec_id: process.exec.to_owned(),
            ..Default::default()
        };
        self.task.delete(quick(), &request).await.map(|_| ())
    }

    /// The counters of the container's cgroup.
    pub(super) async fn stats(&self, container: &str) -> ttrpc::Result<Metrics> {
        let request = api::StatsRequest {
            id: container.to_owned(),
            ..Default::default()
        };
        let answer = self.task.stats(quick(), &request).await?;
        let packed = answer.stats.into_option().unwrap_or_default();
        Metrics::parse_from_bytes(&packed.value)
            .map_err(|e| ttrpc::Error::Others(format!("the counters can't be read: {e}")))
    }

    /// Freezes the container's processes.
    pub(super) async fn pause(&self, container: &str) -> ttrpc::Result<()> {
        let request = api::PauseRequest {
            id: container.to_owned(),
            ..Default::default()
        };
        self.task.pause(quick(), &request).await.map(|_| ())
    }

    /// Lets them go on.
    pub(super) async fn resume(&self, container: &str) -> ttrpc::Result<()> {
        let request = api::ResumeRequest {
            id: container.to_owned(),
            ..Default::default()
        };
        self.task.resume(quick(), &request).await.map(|_| ())
    }
}

fn quick() -> ttrpc::context::Context {
    rpc::context(Some(QUICK))
}

/// The shim's last work is done when it answered: it is gone in no time, or it hangs.
fn reap(child: &mut Child) -> anyhow::Result<()> {
    const PATIENCE: rustix::time::Timespec = rustix::time::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut fds = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    let ended = rustix::event::poll(&mut fds, Some(&PATIENCE))? > 0;
    if !ended {
        child.kill()?;
    }
    child.wait()?;
    if !ended {
        bail!("the shim did not end and was killed");
    }
    Ok(())
}

/// The Task socket of a sandbox, by way of its directory's descriptor: a socket's path has room for 107 bytes only.
struct SocketPath {
    path: String,
    _dir: OwnedFd,
}

impl SocketPath {
    fn in_dir(dir: &Path) -> anyhow::Result<Self> {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let opened = rustix::fs::open(dir, flags, rustix::fs::Mode::empty())
            .with_context(|| format!("can't open {}", dir.display()))?;
        Ok(Self {
            path: format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd()),
            _dir: opened,
        })
    }
}

/// The Task socket in the sandbox's directory, and a connection to it.
fn sockets(dir: &SandboxDir) -> anyhow::Result<(OwnedFd, UnixStream)> {
    let socket = SocketPath::in_dir(dir.path())?;
    let listener = UnixListener::bind(&socket.path).context("can't make the sandbox's socket")?;
    let connection =
        UnixStream::connect(&socket.path).context("can't connect to the sandbox's socket")?;
    Ok((listener.into(), connection))
}
