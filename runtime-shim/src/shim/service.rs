//! containerd's Task service for the one container of a sandbox.

use super::agent::CallError;
use super::bounds;
use super::container::{Container, ContainerError, Create, Observer};
use super::health;
use super::launch::Launch;
use super::network;
use super::passt;
use super::process::{Exit, Life, Process, Work};
use super::recorder::Recorder;
use super::shares;
use super::stats;
use super::stdio::{Paths, SharedLog};
use crate::journal::{Journal, VMM_ROLE};
use crate::plan::RootfsMount;
use crate::rpc::{KILLED, SIGKILL, chain, status};
use crate::settings::Settings;
use crate::update;
use async_trait::async_trait;
use casemate_protocol::{agent as proto, tool};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::{empty::Empty, timestamp::Timestamp};
use containerd_shim_protos::shim_async::Task;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::Code;

type Reply<T> = ttrpc::Result<T>;

/// containerd's own bound on identifiers.
const MAX_ID: usize = 76;
/// A process's output reaches its FIFO within this time after a Delete, or is dropped.
const DRAIN: Duration = Duration::from_secs(10);

/// The service's state.
pub(super) struct Service {
    pub(super) settings: Settings,
    /// The sandbox's directory.
    pub(super) dir: PathBuf,
    pub(super) journal: Journal,
    /// For the guest's serial console.
    pub(super) console: Option<OwnedFd>,
    /// What the container wrote needn't be kept.
    pub(super) discard: bool,
    pub(super) shim_main: u64,
    pub(super) recorder: Arc<Recorder>,
    /// Set when it is time to go.
    pub(super) leave: watch::Sender<bool>,
    /// Held while a container is made, so that two calls at once make one.
    pub(super) container: Mutex<Option<Arc<Container>>>,
    /// For what the container writes.
    pub(super) log: Option<SharedLog>,
    pub(super) asked: Asked,
    /// Set when a container that is being made is not wanted any more.
    pub(super) unwanted: watch::Sender<bool>,
}

/// What was asked of the container, for those who look after it when nobody attends.
#[derive(Default)]
pub(super) struct Asked {
    /// How it was created, to do so again.
    create: std::sync::Mutex<Option<api::CreateTaskRequest>>,
    /// It was started.
    pub(super) start: AtomicBool,
}

fn code_of(error: &ContainerError) -> Code {
    match error {
        ContainerError::Bundle { source, .. } if source.kind() == io::ErrorKind::FileTooLarge => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::Bundle { .. } => Code::FAILED_PRECONDITION,
        ContainerError::Spec { .. } | ContainerError::Plan(_) | ContainerError::Stdio(_) => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::Call(CallError::Refused { code, .. }) => *code,
        ContainerError::Call(CallError::Timeout { .. }) => Code::DEADLINE_EXCEEDED,
        ContainerError::TooManyExecs => Code::RESOURCE_EXHAUSTED,
        ContainerError::ExecExists(_) => Code::ALREADY_EXISTS,
        ContainerError::Resources(_) => Code::INVALID_ARGUMENT,
        ContainerError::Fixed => Code::FAILED_PRECONDITION,
        ContainerError::Launch(_)
        | ContainerError::Call(_)
        | ContainerError::Vm(_)
        | ContainerError::Network(_) => Code::INTERNAL,
    }
}

fn failed(error: ContainerError) -> ttrpc::Error {
    status(code_of(&error), chain(&error))
}

fn call_failed(error: CallError) -> ttrpc::Error {
    failed(error.into())
}

fn no_process(id: &str, exec_id: &str) -> ttrpc::Error {
    status(
        Code::NOT_FOUND,
        format!("no such process: {exec_id:?} in container {id:?} does not exist"),
    )
}

fn timestamp(at_ns: u64) -> Timestamp {
    Timestamp {
        seconds: (at_ns / 1_000_000_000) as i64,
        nanos: (at_ns % 1_000_000_000) as i32,
        ..Default::default()
    }
}

/// An identifier becomes part of paths here and in the guest.
fn check_id(id: &str) -> Reply<()> {
    let fine = (1..=MAX_ID).contains(&id.len())
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if fine {
        return Ok(());
    }
    Err(status(
        Code::INVALID_ARGUMENT,
        format!("{id:?} is not a valid id"),
    ))
}

impl Service {
    async fn container(&self, id: &str) -> Reply<Arc<Container>> {
        let held = self.container.lock().await;
        match &*held {
            Some(container) if container.id == id => Ok(container.clone()),
            _ => Err(status(
                Code::NOT_FOUND,
                format!("container {id:?} does not exist"),
            )),
        }
    }

    async fn process(&self, id: &str, exec_id: &str) -> Reply<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id).await?;
        let process = container
            .process(exec_id)
            .ok_or_else(|| no_process(id, exec_id))?;
        Ok((container, process))
    }

    /// For calls that make sense for a running process only.
    async fn running(&self, id: &str, exec_id: &str) -> Reply<(Arc<Container>, Arc<Process>)> {
        let (container, process) = self.process(id, exec_id).await?;
        match process.life() {
            Life::Exited(_) => Err(status(Code::NOT_FOUND, "process already finished")),
            Life::Running => Ok((container, process)),
            Life::Created => Err(status(
                Code::FAILED_PRECONDITION,
                "the process has not been started",
            )),
        }
    }

    fn container_request(id: &str) -> proto::ContainerRequest {
        proto::ContainerRequest {
            id: id.to_owned(),
            ..Default::default()
        }
    }

    /// Ends everything at once: whoever asked for the sandbox is gone.
    pub(super) async fn abandon(&self) {
        let held = self.container.lock().await.take();
        if let Some(container) = held {
            container.end(self.discard).await;
        }
    }

    /// Waits for the end of the container's first process and gives back what it ran on; its files stay.
    pub(super) async fn end_of_container(&self) {
        let held = self.container.lock().await.clone();
        if let Some(container) = held {
            container.init.exited().await;
            container.end(self.discard).await;
            self.container.lock().await.take();
        }
    }

    /// Starts a container that ended as it was started before, if it is still `wanted` once its guest is up.
    pub(super) async fn start_again(&self, wanted: impl Fn() -> bool) -> Reply<bool> {
        let created = self.asked.create.lock();
        let created = created.unwrap_or_else(|e| e.into_inner()).clone();
        let Some(request) = created else {
            return Err(status(Code::FAILED_PRECONDITION, "it was never created"));
        };
        // The one of the last start is gone. What can't be rewritten grows a little.
        let _ = self
            .journal
            .forget_processes(|role| [VMM_ROLE, passt::ROLE, shares::ROLE].contains(&role));
        update::settle(self.recorder.dir.path()).map_err(|error| {
            let text = format!("can't apply the limits that the container was given: {error}");
            status(Code::INTERNAL, text)
        })?;
        let container = self.create_container(request).await?;
        if !wanted() {
            self.abandon().await;
            return Ok(false);
        }
        container.start_init().await.map_err(failed)?;
        self.watch_health(&container);
        Ok(true)
    }

    fn watch_health(&self, container: &Arc<Container>) {
        if let Some(check) = self.recorder.check() {
            let (container, recorder) = (container.clone(), self.recorder.clone());
            tokio::spawn(health::watch(container, recorder, check));
        }
    }

    async fn create_container(&self, req: api::CreateTaskRequest) -> Reply<Arc<Container>> {
        check_id(&req.id)?;
        let mut held = self.container.lock().await;
        if let Some(other) = &*held {
            let (code, text) = if other.id == req.id {
                (Code::ALREADY_EXISTS, "already exists".to_owned())
            } else {
                let text = format!("can't join the sandbox of {:?}", other.id);
                (Code::FAILED_PRECONDITION, text)
            };
            return Err(status(code, format!("container {:?} {text}", req.id)));
        }
        if !req.checkpoint.is_empty() {
            return Err(status(
                Code::UNIMPLEMENTED,
                "restoring a checkpoint is not supported",
            ));
        }
        if let Ok(mut created) = self.asked.create.lock() {
            *created = Some(req.clone());
        }
        let create = Create {
            id: req.id,
            bundle: req.bundle.into(),
            rootfs: req.rootfs.into_iter().map(rootfs_mount).collect(),
            paths: Paths {
                terminal: req.terminal,
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
            },
            log: self.log.as_ref(),
            launch: Launch {
                settings: &self.settings,
                dir: &self.dir,
                journal: &self.journal,
                discard: self.discard,
                console: self.console.as_ref().map(AsFd::as_fd),
            },
            shim_main: self.shim_main,
            observer: self.recorder.clone(),
        };
        match Container::create(create).await {
            Ok(container) => Ok(held.insert(container).clone()),
            Err(error) => {
                network::release(&self.journal).await;
                bounds::release(&self.journal);
                Err(failed(error))
            }
        }
    }
}

fn rootfs_mount(mount: api::Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_,
        source: mount.source,
        options: mount.options,
    }
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        req: api::CreateTaskRequest,
    ) -> Reply<api::CreateTaskResponse> {
        let mut unwanted = self.unwanted.subscribe();
        // A guest that hangs would hold up the end of the sandbox: its VMM goes with us.
        let container = tokio::select! {
            made = self.create_container(req) => made?,
            _ = unwanted.wait_for(|unwanted| *unwanted) => {
                return Err(status(Code::CANCELLED, "the sandbox is being ended"));
            }
        };
        Ok(api::CreateTaskResponse {
            pid: container.sandbox.vm.pid(),
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> Reply<api::StartResponse> {
        let (container, process) = self.process(&req.id, &req.exec_id).await?;
        if process.life() != Life::Created {
            return Err(status(
                Code::FAILED_PRECONDITION,
                "the process was started before",
            ));
        }
        let pid = if req.exec_id.is_empty() {
            container.start_init().await.map_err(failed)?;
            self.watch_health(&container);
            self.asked.start.store(true, Ordering::Relaxed);
            container.sandbox.vm.pid()
        } else {
            container.start_exec(process).await.map_err(failed)?
        };
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> Reply<api::WaitResponse> {
        let (_, process) = self.process(&req.id, &req.exec_id).await?;
        let exit = process.exited().await;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> Reply<api::StateResponse> {
        let (container, process) = self.process(&req.id, &req.exec_id).await?;
        let mut answer = api::StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: container.bundle.display().to_string(),
            pid: container.sandbox.vm.pid(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            ..Default::default()
        };
        let state = match process.life() {
            Life::Created => api::Status::CREATED,
            Life::Running => api::Status::RUNNING,
            Life::Exited(exit) => {
                answer.exit_status = exit.status;
                answer.exited_at = Some(timestamp(exit.at_ns)).into();
                api::Status::STOPPED
            }
        };
        answer.status = state.into();
        Ok(answer)
    }

    async fn kill(&self, _: &TtrpcContext, req: api::KillRequest) -> Reply<Empty> {
        let (container, process) = self.process(&req.id, &req.exec_id).await?;
        if matches!(process.life(), Life::Exited(_)) {
            return Err(status(Code::NOT_FOUND, "process already finished"));
        }
        container
            .kill(&req.exec_id, req.signal, req.all)
            .await
            .map_err(failed)?;
        // A process that was never started has nobody who waits for it in the guest.
        if process.life() == Life::Created && req.signal == SIGKILL {
            process.set_exited(Exit::now(KILLED));
        }
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        req: api::DeleteRequest,
    ) -> Reply<api::DeleteResponse> {
        let (container, process) = self.process(&req.id, &req.exec_id).await?;
        let exit = match process.life() {
            Life::Running => {
                return Err(status(
                    Code::FAILED_PRECONDITION,
                    "the process is running; kill it first",
                ));
            }
            Life::Created => Exit {
                status: 0,
                at_ns: 0,
                oom_killed: false,
            },
            Life::Exited(exit) => exit,
        };
        if req.exec_id.is_empty() {
            container.end(self.discard).await;
            self.container.lock().await.take();
        } else {
            process.drained(DRAIN).await;
            container.remove_exec(&req.exec_id);
        }
        Ok(api::DeleteResponse {
            pid: container.sandbox.vm.pid(),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, req: api::ExecProcessRequest) -> Reply<Empty> {
        check_id(&req.exec_id)?;
        let spec = req.spec.into_option().unwrap_or_default();
        let work = match spec.type_url.as_str() {
            tool::TYPE_URL => Work::Tool(spec.value),
            _ => Work::Execute(spec.value),
        };
        let (container, first) = match work {
            // What the container wrote can be had before it starts.
            Work::Tool(_) => self.process(&req.id, "").await?,
            _ => self.running(&req.id, "").await?,
        };
        if matches!(first.life(), Life::Exited(_)) {
            return Err(status(Code::NOT_FOUND, "process already finished"));
        }
        let paths = Paths {
            terminal: req.terminal,
            stdin: req.stdin,
            stdout: req.stdout,
            stderr: req.stderr,
        };
        container
            .add_exec(&req.exec_id, paths, work)
            .map_err(failed)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, &req.exec_id).await?;
        let request = proto::ResizePtyRequest {
            id: req.id,
            exec_id: req.exec_id,
            rows: req.height,
            cols: req.width,
            ..Default::default()
        };
        let agent = &container.sandbox.agent;
        agent.resize_pty(&request).await.map_err(call_failed)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> Reply<Empty> {
        let (_, process) = self.process(&req.id, &req.exec_id).await?;
        if req.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> Reply<api::PidsResponse> {
        let container = self.container(&req.id).await?;
        let request = Self::container_request(&req.id);
        let agent = &container.sandbox.agent;
        let answer = agent.list_pids(&request).await.map_err(call_failed)?;
        Ok(api::PidsResponse {
            processes: answer
                .pids
                .into_iter()
                .map(|pid| api::ProcessInfo {
                    pid,
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, req: api::PauseRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, "").await?;
        let request = Self::container_request(&req.id);
        let agent = &container.sandbox.agent;
        agent.pause(&request).await.map_err(call_failed)?;
        self.recorder.paused(true);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, "").await?;
        let request = Self::container_request(&req.id);
        let agent = &container.sandbox.agent;
        agent.resume(&request).await.map_err(call_failed)?;
        self.recorder.paused(false);
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> Reply<Empty> {
        Err(status(Code::UNIMPLEMENTED, "checkpoints are not supported"))
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, "").await?;
        let request = proto::UpdateRequest {
            id: req.id,
            resources_json: req.resources.into_option().unwrap_or_default().value,
            ..Default::default()
        };
        container.update(&request).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> Reply<api::StatsResponse> {
        let container = self.container(&req.id).await?;
        let request = Self::container_request(&req.id);
        let agent = &container.sandbox.agent;
        let answer = agent.stats(&request).await.map_err(call_failed)?;
        let metrics = stats::metrics(&answer).map_err(|e| status(Code::INTERNAL, e))?;
        Ok(api::StatsResponse {
            stats: Some(metrics).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> Reply<api::ConnectResponse> {
        let container = self.container(&req.id).await?;
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.sandbox.vm.pid(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: api::ShutdownRequest) -> Reply<Empty> {
        if req.now {
            self.unwanted.send_replace(true);
        }
        let mut held = self.container.lock().await;
        if held.is_some() && !req.now {
            // As containerd expects: only the last one out turns off the light.
            return Ok(Empty::new());
        }
        if let Some(container) = held.take() {
            container.end(self.discard).await;
        }
        self.leave.send_replace(true);
        Ok(Empty::new())
    }
}
