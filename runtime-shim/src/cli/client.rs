//! A sandbox from the command line's side: its directory, its shim, its Task API.

use crate::fds;
use crate::rpc;
use crate::settings::Settings;
use crate::state::SandboxDir;
use anyhow::{Context, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::TaskClient;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Calls that only move bits around.
const QUICK: Duration = Duration::from_secs(60);
/// On top of the guest's own bound: opening, mounting, creating.
const CREATE_MARGIN: Duration = Duration::from_secs(60);

/// A shim that serves one sandbox, and our connection to it.
pub(super) struct Shim {
    child: Child,
    task: TaskClient,
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
        if let Some(console) = options.console {
            command.args(["--console-fd", &number(console)]);
            passed.push(console.as_fd());
        }
        command
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
            task: TaskClient::new(rpc::client(connection)?),
            create_limit: settings.start_timeout + CREATE_MARGIN,
            _lifeline: ours,
        })
    }

    /// Creates the container: boots the guest.
    pub(super) async fn create(&self, request: &api::CreateTaskRequest) -> ttrpc::Result<()> {
        let context = rpc::context(Some(self.create_limit));
        self.task.create(context, request).await.map(|_| ())
    }

    /// Starts the container.
    pub(super) async fn start_task(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        self.task.start(context, &request).await.map(|_| ())
    }

    /// Waits for the container's end and gives its exit status.
    pub(super) async fn wait(&self, id: &str) -> ttrpc::Result<u32> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.task.wait(rpc::context(None), &request).await?;
        Ok(answer.exit_status)
    }

    /// Sends a signal to the container's first process.
    pub(super) async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest {
            id: id.to_owned(),
            signal,
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        self.task.kill(context, &request).await.map(|_| ())
    }

    /// Tells the new size of the terminal.
    pub(super) async fn resize(&self, id: &str, rows: u16, columns: u16) -> ttrpc::Result<()> {
        let request = api::ResizePtyRequest {
            id: id.to_owned(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        self.task.resize_pty(context, &request).await.map(|_| ())
    }

    /// Ends standard input.
    pub(super) async fn close_stdin(&self, id: &str) -> ttrpc::Result<()> {
        let request = api::CloseIORequest {
            id: id.to_owned(),
            stdin: true,
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        self.task.close_io(context, &request).await.map(|_| ())
    }

    /// Ends the sandbox in order and waits until its shim is gone.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        let request = api::ShutdownRequest {
            now: true,
            ..Default::default()
        };
        let context = rpc::context(Some(QUICK));
        // The answer may be lost when the shim is quick to go.
        let _ = self.task.shutdown(context, &request).await;
        drop(self._lifeline);
        reap(&mut self.child)
    }
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

/// The Task socket in the sandbox's directory, and a connection to it.
///
/// By way of the directory's descriptor: a socket's path has room for 107 bytes only.
fn sockets(dir: &SandboxDir) -> anyhow::Result<(OwnedFd, UnixStream)> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let opened = rustix::fs::open(dir.path(), flags, rustix::fs::Mode::empty())?;
    let path = format!("/proc/self/fd/{}/task.sock", opened.as_raw_fd());
    let listener = UnixListener::bind(&path).context("can't make the sandbox's socket")?;
    let connection = UnixStream::connect(&path).context("can't connect to the sandbox's socket")?;
    Ok((listener.into(), connection))
}
