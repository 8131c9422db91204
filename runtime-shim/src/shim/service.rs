//! containerd's Task service for the containers of a sandbox: one, or those of a pod.

use super::agent::CallError;
use super::bounds;
use super::container::{Container, ContainerError, Create, Observer, read_spec};
use super::health;
use super::launch::Launch;
use super::network;
use super::passt;
use super::process::{Exit, Life, Process, Work};
use super::recorder::{Member, Recorder};
use super::shares;
use super::stats;
use super::stdio::{Paths, SharedLog};
use crate::containerd::events::timestamp;
use crate::containerd::rootfs;
use crate::journal::{Journal, VMM_ROLE};
use crate::plan::{self, Role, RootfsMount};
use crate::rpc::{KILLED, SIGKILL, chain, is_identifier, status};
use crate::settings::Settings;
use crate::update;
use async_trait::async_trait;
use casemate_protocol::{agent as proto, tool};
use containerd_shim_protos::api;
use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use oci_spec::runtime::Spec;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use ttrpc::r#async::TtrpcContext;
use ttrpc::proto::Code;

type Reply<T> = ttrpc::Result<T>;

/// Where a bundle's root is mounted.
const ROOTFS: &str = "rootfs";
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
    pub(super) creating: Mutex<()>,
    /// By their ids. Never held across an await.
    pub(super) containers: std::sync::Mutex<BTreeMap<String, Arc<Container>>>,
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
        ContainerError::Fixed | ContainerError::NoPod(..) => Code::FAILED_PRECONDITION,
        ContainerError::Launch(_)
        | ContainerError::Call(_)
        | ContainerError::Vm(_)
        | ContainerError::Place(_)
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

pub(super) fn check_id(id: &str) -> Reply<()> {
    if is_identifier(id) {
        return Ok(());
    }
    Err(status(
        Code::INVALID_ARGUMENT,
        format!("{id:?} is not a valid id"),
    ))
}

impl Service {
    pub(super) fn container(&self, id: &str) -> Reply<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| status(Code::NOT_FOUND, format!("container {id:?} does not exist")))
    }

    /// A poisoned lock holds a map: always usable.
    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The one whose sandbox it is.
    fn first(&self) -> Option<Arc<Container>> {
        let containers = self.containers();
        containers.values().find(|c| !c.is_member()).cloned()
    }

    fn process(&self, id: &str, exec_id: &str) -> Reply<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id)?;
        let process = container
            .process(exec_id)
            .ok_or_else(|| no_process(id, exec_id))?;
        Ok((container, process))
    }

    /// For calls that make sense for a running process only.
    fn running(&self, id: &str, exec_id: &str) -> Reply<(Arc<Container>, Arc<Process>)> {
        let (container, process) = self.process(id, exec_id)?;
        match process.life() {
            Life::Exited(_) => Err(status(Code::NOT_FOUND, "process already finished")),
            Life::Running => Ok((container, process)),
            Life::Created => Err(status(
                Code::FAILED_PRECONDITION,
                "the process has not been started",
            )),
        }
    }

    /// Tells containerd, if the sandbox is containerd's.
    fn tell<E: MessageFull>(&self, topic: &str, event: impl FnOnce() -> E) {
        if let Some(publisher) = &self.recorder.publisher {
            publisher.tell(topic, &event());
        }
    }

    /// Ends everything at once: whoever asked for the sandbox is gone.
    pub(super) async fn abandon(&self) {
        let _creating = self.creating.lock().await;
        self.end_all().await;
    }

    /// Makes the sandbox with a first process, and starts that; it is nobody's task.
    pub(super) async fn start_first(&self, req: api::CreateTaskRequest) -> Reply<u32> {
        let mut unwanted = self.unwanted.subscribe();
        let started = async {
            let first = self.create_container(req).await?;
            first.start_init().await.map_err(failed)?;
            Ok(first.sandbox.vm().pid())
        };
        tokio::select! {
            started = started => started,
            _ = unwanted.wait_for(|unwanted| *unwanted) => {
                Err(status(Code::CANCELLED, "the sandbox is being ended"))
            }
        }
    }

    /// Counters of a container.
    pub(super) async fn metrics(&self, id: &str) -> Reply<Any> {
        let container = self.container(id)?;
        let request = container.request();
        let agent = container.sandbox.agent();
        let answer = agent.stats(&request).await.map_err(call_failed)?;
        stats::metrics(&answer).map_err(|e| status(Code::INTERNAL, e))
    }

    /// Ends the sandbox with all that is in it.
    async fn end_all(&self) {
        // Those that joined have nothing of their own.
        let first = self.first();
        let all = std::mem::take(&mut *self.containers());
        if let Some(first) = first.or_else(|| all.into_values().next()) {
            first.end(self.discard).await;
        }
    }

    /// Waits for the end of the container's first process and gives back what it ran on; its files stay.
    pub(super) async fn end_of_container(&self) {
        if let Some(container) = self.first() {
            container.init.exited().await;
            container.end(self.discard).await;
            self.containers().remove(&container.id);
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
        let _creating = self.creating.lock().await;
        if self.containers().contains_key(&req.id) {
            let text = format!("container {:?} already exists", req.id);
            return Err(status(Code::ALREADY_EXISTS, text));
        }
        let first = self.first();
        if first.is_none() && !self.containers().is_empty() {
            let text = format!("can't make container {:?}: its sandbox was deleted", req.id);
            return Err(status(Code::FAILED_PRECONDITION, text));
        }
        if !req.checkpoint.is_empty() {
            return Err(status(
                Code::UNIMPLEMENTED,
                "restoring a checkpoint is not supported",
            ));
        }
        let spec = read_spec(Path::new(&req.bundle)).map_err(failed)?;
        let container = match first {
            Some(first) => self.join(req, spec, &first).await?,
            None => self.boot(req, spec).await?,
        };
        self.containers()
            .insert(container.id.clone(), container.clone());
        Ok(container)
    }

    /// Makes the sandbox, with its first container.
    async fn boot(&self, req: api::CreateTaskRequest, spec: Spec) -> Reply<Arc<Container>> {
        if let Ok(mut created) = self.asked.create.lock() {
            *created = Some(req.clone());
        }
        let bundle = PathBuf::from(&req.bundle);
        let role = role(&spec);
        let mut mounts: Vec<_> = req.rootfs.iter().cloned().map(rootfs_mount).collect();
        if role == Role::Alone {
            mounts = rootfs::prepare(mounts, &bundle.join(ROOTFS), &self.journal)
                .inspect_err(|_| rootfs::release(&self.journal))
                .map_err(|e| status(Code::FAILED_PRECONDITION, chain(&e)))?;
        }
        let create = self.asked_for(req, spec, mounts, self.recorder.clone());
        match Container::create(create).await {
            Ok(container) => Ok(container),
            Err(error) => {
                network::release(&self.journal).await;
                bounds::release(&self.journal);
                rootfs::release(&self.journal);
                Err(failed(error))
            }
        }
    }

    /// Makes a container in the sandbox of the `first` one.
    async fn join(
        &self,
        req: api::CreateTaskRequest,
        spec: Spec,
        first: &Container,
    ) -> Reply<Arc<Container>> {
        let role = role(&spec);
        let refuse = |why: String| {
            let text = format!(
                "container {:?} can't join the sandbox of {:?}: {why}",
                req.id, first.id
            );
            Err(status(Code::FAILED_PRECONDITION, text))
        };
        match role {
            Role::Member(sandbox) if sandbox == first.id => {}
            Role::Member(sandbox) => return refuse(format!("it belongs into that of {sandbox:?}")),
            Role::Alone | Role::Sandbox => return refuse("it is to have its own".to_owned()),
        }
        if matches!(first.init.life(), Life::Exited(_)) {
            return refuse("that has ended".to_owned());
        }
        let mounts = req.rootfs.iter().cloned().map(rootfs_mount).collect();
        let observer = Arc::new(Member(self.recorder.clone()));
        let create = self.asked_for(req, spec, mounts, observer);
        Container::join(create, first.sandbox.clone())
            .await
            .map_err(failed)
    }

    fn asked_for(
        &self,
        req: api::CreateTaskRequest,
        spec: Spec,
        rootfs: Vec<RootfsMount>,
        observer: Arc<dyn Observer>,
    ) -> Create<'_> {
        Create {
            id: req.id,
            bundle: PathBuf::from(req.bundle),
            spec,
            rootfs,
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
            observer,
        }
    }
}

/// What the container of a spec is in a pod.
fn role(spec: &Spec) -> Role {
    Role::of(|key| plan::annotation(spec, key))
}

/// What is told of a container that was made, but for its process.
fn task_create(req: &api::CreateTaskRequest) -> task::TaskCreate {
    let io = task::TaskIO {
        stdin: req.stdin.clone(),
        stdout: req.stdout.clone(),
        stderr: req.stderr.clone(),
        terminal: req.terminal,
        ..Default::default()
    };
    task::TaskCreate {
        container_id: req.id.clone(),
        bundle: req.bundle.clone(),
        rootfs: req.rootfs.clone(),
        io: Some(io).into(),
        checkpoint: req.checkpoint.clone(),
        ..Default::default()
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
        let created = task_create(&req);
        let mut unwanted = self.unwanted.subscribe();
        // A guest that hangs would hold up the end of the sandbox: its VMM goes with us.
        let container = tokio::select! {
            made = self.create_container(req) => made?,
            _ = unwanted.wait_for(|unwanted| *unwanted) => {
                return Err(status(Code::CANCELLED, "the sandbox is being ended"));
            }
        };
        let pid = container.sandbox.vm().pid();
        self.tell(topics::TASK_CREATE_EVENT_TOPIC, || task::TaskCreate {
            pid,
            ..created
        });
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: api::StartRequest) -> Reply<api::StartResponse> {
        let (container, process) = self.process(&req.id, &req.exec_id)?;
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
            let pid = container.sandbox.vm().pid();
            self.tell(topics::TASK_START_EVENT_TOPIC, || task::TaskStart {
                container_id: req.id,
                pid,
                ..Default::default()
            });
            pid
        } else {
            let pid = container.start_exec(process).await.map_err(failed)?;
            let started = || task::TaskExecStarted {
                container_id: req.id,
                exec_id: req.exec_id,
                pid,
                ..Default::default()
            };
            self.tell(topics::TASK_EXEC_STARTED_EVENT_TOPIC, started);
            pid
        };
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, req: api::WaitRequest) -> Reply<api::WaitResponse> {
        let (_, process) = self.process(&req.id, &req.exec_id)?;
        let exit = process.exited().await;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, req: api::StateRequest) -> Reply<api::StateResponse> {
        let (container, process) = self.process(&req.id, &req.exec_id)?;
        let mut answer = api::StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: container.bundle.display().to_string(),
            pid: container.sandbox.vm().pid(),
            stdin: process.paths.stdin.clone(),
            stdout: process.paths.stdout.clone(),
            stderr: process.paths.stderr.clone(),
            terminal: process.paths.terminal,
            ..Default::default()
        };
        let state = match process.life() {
            Life::Created => api::Status::CREATED,
            Life::Running if container.is_paused() => api::Status::PAUSED,
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
        let (container, process) = self.process(&req.id, &req.exec_id)?;
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
        let (container, process) = self.process(&req.id, &req.exec_id)?;
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
            match container.is_member() {
                true => container.leave().await,
                false => {
                    container.end(self.discard).await;
                    rootfs::release(&self.journal);
                }
            }
            self.containers().remove(&req.id);
            self.tell(topics::TASK_DELETE_EVENT_TOPIC, || task::TaskDelete {
                container_id: req.id,
                pid: container.sandbox.vm().pid(),
                exit_status: exit.status,
                exited_at: Some(timestamp(exit.at_ns)).into(),
                ..Default::default()
            });
        } else {
            process.drained(DRAIN).await;
            container.remove_exec(&req.exec_id);
        }
        Ok(api::DeleteResponse {
            pid: container.sandbox.vm().pid(),
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
            Work::Tool(_) => self.process(&req.id, "")?,
            _ => self.running(&req.id, "")?,
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
        self.tell(topics::TASK_EXEC_ADDED_EVENT_TOPIC, || {
            task::TaskExecAdded {
                container_id: req.id,
                exec_id: req.exec_id,
                ..Default::default()
            }
        });
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: api::ResizePtyRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, &req.exec_id)?;
        let request = proto::ResizePtyRequest {
            id: req.id,
            exec_id: req.exec_id,
            rows: req.height,
            cols: req.width,
            ..Default::default()
        };
        let agent = container.sandbox.agent();
        agent.resize_pty(&request).await.map_err(call_failed)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: api::CloseIORequest) -> Reply<Empty> {
        let (_, process) = self.process(&req.id, &req.exec_id)?;
        if req.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, req: api::PidsRequest) -> Reply<api::PidsResponse> {
        let container = self.container(&req.id)?;
        let request = container.request();
        let agent = container.sandbox.agent();
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
        let (container, _) = self.running(&req.id, "")?;
        container.freeze(true).await.map_err(call_failed)?;
        self.tell(topics::TASK_PAUSED_EVENT_TOPIC, || task::TaskPaused {
            container_id: req.id,
            ..Default::default()
        });
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: api::ResumeRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, "")?;
        container.freeze(false).await.map_err(call_failed)?;
        self.tell(topics::TASK_RESUMED_EVENT_TOPIC, || task::TaskResumed {
            container_id: req.id,
            ..Default::default()
        });
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> Reply<Empty> {
        Err(status(Code::UNIMPLEMENTED, "checkpoints are not supported"))
    }

    async fn update(&self, _: &TtrpcContext, req: api::UpdateTaskRequest) -> Reply<Empty> {
        let (container, _) = self.running(&req.id, "")?;
        let request = proto::UpdateRequest {
            id: req.id,
            resources_json: req.resources.into_option().unwrap_or_default().value,
            ..Default::default()
        };
        container.update(&request).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: api::StatsRequest) -> Reply<api::StatsResponse> {
        Ok(api::StatsResponse {
            stats: Some(self.metrics(&req.id).await?).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        req: api::ConnectRequest,
    ) -> Reply<api::ConnectResponse> {
        let container = self.container(&req.id)?;
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.sandbox.vm().pid(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: api::ShutdownRequest) -> Reply<Empty> {
        if req.now {
            self.unwanted.send_replace(true);
        }
        let _creating = self.creating.lock().await;
        if !self.containers().is_empty() && !req.now {
            // As containerd expects: only the last one out turns off the light.
            return Ok(Empty::new());
        }
        self.end_all().await;
        self.leave.send_replace(true);
        Ok(Empty::new())
    }
}
