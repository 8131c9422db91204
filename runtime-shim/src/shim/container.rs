//! A container in its sandbox: the first one, or another of a pod.

use super::agent::CallError;
use super::launch::{FirstStreams, Launch, LaunchError, monotonic_ns};
use super::logger::Whose;
use super::network::{self, NetworkFailure};
use super::places::PlaceError;
use super::process::{Exit, Life, Process, Work};
use super::sandbox::{Booted, Sandbox};
use super::stdio::{Paths, SharedLog, StdioError, Streams};
use super::timing::{self, Timing};
use super::vm::VmError;
use crate::containerd;
use crate::files;
use crate::plan::{self, Host, Inside, Joins, MAX_SPEC, Place, PlanError, RootfsMount};
use crate::rpc::{KILLED, SIGKILL};
use crate::settings::Settings;
use casemate_protocol::agent as proto;
use oci_spec::runtime::{LinuxResources, Spec};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// As the agent accepts it.
const MAX_FILE: u64 = 1 << 20;
/// Processes added to one container.
const MAX_EXECS: usize = 1024;
/// A guest that doesn't answer a kill of its first process within this time hangs, and goes with it.
const KILL_ANSWERS: Duration = Duration::from_secs(5);
/// After the first process, the others of its PID namespace are gone too.
const EXECS_FOLLOW: Duration = Duration::from_secs(5);

/// Whatever has to end or to be written out gets this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The last of the output reaches the log within this time after the end, or is dropped.
const LOG_TAKES: Duration = Duration::from_secs(10);

/// Why a container operation failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContainerError {
    /// The bundle can't be read.
    #[error("can't read {path}")]
    Bundle {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The bundle's spec isn't one.
    #[error("{path} is not an OCI runtime spec")]
    Spec {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The spec can't be run.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Streams.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The guest didn't come up.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The agent.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The VMM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkFailure),
    /// The pod's share.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It takes no further container.
    #[error("the sandbox {0:?} takes no further container: {1}")]
    NoPod(String, &'static str),
    /// Too many processes.
    #[error("a container can have at most {MAX_EXECS} added processes")]
    TooManyExecs,
    /// No limits.
    #[error("the new limits are no resources of the OCI runtime specification")]
    Resources(#[source] serde_json::Error),
    /// What a sandbox has from its start.
    #[error(
        "the processors and the disks' limits of a running sandbox can't be changed; stop it and start it again"
    )]
    Fixed,
    /// The exec id is taken.
    #[error("process {0:?} already exists")]
    ExecExists(String),
}

/// What happened, to be written down or told by whoever holds the container.
pub(super) trait Observer: Send + Sync {
    /// The first process runs.
    fn started(&self, pid: u32);
    /// Its processes were frozen, or go on.
    fn paused(&self, paused: bool);
    /// The first process ended; `error` when that was not its own doing.
    fn exited(&self, exit: Exit, error: &str);
    /// A process ended; empty: the first one. `pid` is what its start was answered with.
    fn process_exited(&self, container: &str, exec_id: &str, pid: u32, exit: Exit);
}

/// A container with its processes.
pub(super) struct Container {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) init: Arc<Process>,
    pub(super) sandbox: Arc<Sandbox>,
    /// Its directory in the pod's share, if it joined one.
    place: Option<String>,
    /// Its first process's end isn't that of the others.
    shares_pids: bool,
    /// Its processes are frozen.
    paused: AtomicBool,
    /// Lock order: never held across an await.
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    timing: Mutex<Option<Timing>>,
    observer: Arc<dyn Observer>,
}

/// What `Container::create` needs.
pub(super) struct Create<'a> {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) spec: Spec,
    pub(super) rootfs: Vec<RootfsMount>,
    pub(super) paths: Paths,
    /// For what the first process writes.
    pub(super) log: Option<&'a SharedLog>,
    pub(super) launch: Launch<'a>,
    pub(super) shim_main: u64,
    pub(super) observer: Arc<dyn Observer>,
}

impl Container {
    /// Boots a sandbox and creates the container in it, ready to start.
    pub(super) async fn create(create: Create<'_>) -> Result<Arc<Self>, ContainerError> {
        let begun = monotonic_ns();
        let Create {
            id,
            bundle,
            spec,
            rootfs,
            paths,
            log,
            launch,
            shim_main,
            observer,
        } = create;
        let plan = plan::plan(
            &id,
            &bundle,
            &spec,
            &rootfs,
            Host::here(),
            defaults(launch.settings),
            plan::look,
        )?;
        let wants_timing = plan::annotation(&spec, timing::ANNOTATION).is_some();
        let mut request = create_request(&id, &plan.inside)?;
        let namespace = containerd::namespace_of(launch.journal);
        let whose = Whose {
            namespace: &namespace,
            id: &id,
        };
        let (streams, ends) = Streams::open(&paths, log, whose).await?;
        let init = Arc::new(Process::new(String::new(), paths, Work::First));
        init.set_streams(streams);
        let first = FirstStreams::new(ends, init.paths.terminal);

        let Booted {
            sandbox,
            mut stdio,
            ips,
        } = Sandbox::boot(&id, &bundle, &plan, first, &launch).await?;
        (stdio.rows, stdio.cols) = console_size(&spec);
        request.stdio = Some(stdio).into();
        network::add_to_hosts(&mut request, &spec, &ips);
        let created = match sandbox.agent().create_container(&request).await {
            Ok(created) => created,
            Err(error) => {
                sandbox.guest.stop(true).await;
                if let Some(pod) = &sandbox.pod {
                    pod.places.close();
                }
                return Err(error.into());
            }
        };
        if let Some(pod) = &sandbox.pod {
            let _ = pod.guest_pid.set(created.pid);
        }
        let timing = wants_timing.then(|| Timing {
            shim_main,
            create: begun,
            hello: sandbox.guest.hello_ns,
            guest_agent_main: sandbox.guest.hello.main_ns,
            guest_agent_serving: sandbox.guest.hello.serving_ns,
            created: monotonic_ns(),
            ..Timing::default()
        });
        Ok(Arc::new(Self {
            id,
            bundle,
            init,
            sandbox,
            place: None,
            shares_pids: plan.inside.shares_pids,
            paused: AtomicBool::new(false),
            execs: Mutex::default(),
            timing: Mutex::new(timing),
            observer,
        }))
    }

    /// Creates the container in a sandbox that runs.
    pub(super) async fn join(
        create: Create<'_>,
        sandbox: Arc<Sandbox>,
    ) -> Result<Arc<Self>, ContainerError> {
        let refused = |why| ContainerError::NoPod(sandbox.id().to_owned(), why);
        let pod = sandbox
            .pod
            .as_ref()
            .ok_or_else(|| refused("it is no pod's"))?;
        let guest_pid = pod.guest_pid.get().copied();
        let joins = Joins {
            namespaces: &pod.namespaces,
            host_pid: sandbox.vm().pid(),
            guest_pid: guest_pid.ok_or_else(|| refused("it is not there yet"))?,
        };
        let place = pod.places.next();
        let spec = &create.spec;
        let inside = plan::join(
            &create.id,
            &create.bundle,
            spec,
            &create.rootfs,
            &Place {
                sandbox: sandbox.id(),
                directory: &place,
                joins: Some(&joins),
            },
            plan::look,
        )?;
        let mut request = create_request(&create.id, &inside)?;
        let namespace = sandbox.namespace();
        let whose = Whose {
            namespace: &namespace,
            id: &create.id,
        };
        let (streams, ends) = Streams::open(&create.paths, create.log, whose).await?;
        let init = Arc::new(Process::new(String::new(), create.paths, Work::First));
        init.set_streams(streams);
        pod.places.put(&place, &inside.placed).await?;
        let made = async {
            let mut stdio = sandbox.guest.listen(ends, init.paths.terminal).await?;
            (stdio.rows, stdio.cols) = console_size(spec);
            request.stdio = Some(stdio).into();
            sandbox.agent().create_container(&request).await?;
            Ok(())
        };
        if let Err(error) = made.await {
            pod.places.clear(&place).await;
            return Err(error);
        }
        let container = Arc::new(Self {
            id: create.id,
            bundle: create.bundle,
            init,
            sandbox: sandbox.clone(),
            place: Some(place),
            shares_pids: inside.shares_pids,
            paused: AtomicBool::new(false),
            execs: Mutex::default(),
            timing: Mutex::default(),
            observer: create.observer,
        });
        sandbox.joined(&container);
        Ok(container)
    }

    /// Whether it joined another's sandbox.
    pub(super) fn is_member(&self) -> bool {
        self.place.is_some()
    }

    /// Whether its processes are frozen.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Freezes its processes, or lets them go on.
    pub(super) async fn freeze(&self, paused: bool) -> Result<(), CallError> {
        let request = self.request();
        match paused {
            true => self.sandbox.agent().pause(&request).await?,
            false => self.sandbox.agent().resume(&request).await?,
        };
        self.paused.store(paused, Ordering::Relaxed);
        self.observer.paused(paused);
        Ok(())
    }

    /// What the agent is asked of it.
    pub(super) fn request(&self) -> proto::ContainerRequest {
        proto::ContainerRequest {
            id: self.id.clone(),
            ..Default::default()
        }
    }

    /// Gives it other limits: in the guest, and on the host.
    pub(super) async fn update(
        &self,
        request: &proto::UpdateRequest,
    ) -> Result<(), ContainerError> {
        let change: LinuxResources =
            serde_json::from_slice(&request.resources_json).map_err(ContainerError::Resources)?;
        if plan::asks_for_fixed(&change) {
            return Err(ContainerError::Fixed);
        }
        self.sandbox.agent().update(request).await?;
        match self.is_member() {
            // The VM's are its pod's.
            true => Ok(()),
            false => self.sandbox.limit(&change).await,
        }
    }

    /// A process by its exec id; empty: the first one.
    pub(super) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return Some(self.init.clone());
        }
        self.execs().get(exec_id).cloned()
    }

    /// A poisoned lock holds a map: always usable.
    fn execs(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Starts the first process.
    pub(super) async fn start_init(self: &Arc<Self>) -> Result<(), ContainerError> {
        let begun = monotonic_ns();
        let request = proto::StartContainerRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer = match self.sandbox.agent().start_container(&request).await {
            Ok(answer) => answer,
            Err(error) => {
                self.init.set_exited(Exit::now(KILLED));
                return Err(error.into());
            }
        };
        self.init.set_running();
        let pid = self.sandbox.vm().pid();
        self.observer.started(pid);
        self.write_timing(begun, answer.exec_ns);
        tokio::spawn(self.clone().watch(self.init.clone(), pid));
        Ok(())
    }

    /// `--timing` is a convenience: a full disk must not fail a start.
    fn write_timing(&self, start: u64, guest_exec: u64) {
        let timing = self.timing.lock().ok().and_then(|mut t| t.take());
        if let Some(timing) = timing {
            let timing = Timing {
                vmm: self.sandbox.vm().phases(),
                start,
                started: monotonic_ns(),
                guest_exec,
                ..timing
            };
            if let Ok(bytes) = serde_json::to_vec(&timing) {
                let _ = std::fs::write(self.bundle.join(timing::FILE_NAME), bytes);
            }
        }
    }

    /// Adds a process, not yet started.
    pub(super) fn add_exec(
        &self,
        exec_id: &str,
        paths: Paths,
        work: Work,
    ) -> Result<(), ContainerError> {
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(ContainerError::ExecExists(exec_id.to_owned()));
        }
        if execs.len() >= MAX_EXECS {
            // Nobody comes back for one that was left to itself.
            execs.retain(|_, process| !process.is_forgotten());
        }
        if execs.len() >= MAX_EXECS {
            return Err(ContainerError::TooManyExecs);
        }
        let process = Process::new(exec_id.to_owned(), paths, work);
        execs.insert(exec_id.to_owned(), Arc::new(process));
        Ok(())
    }

    /// Starts an added process and gives its pid in the guest.
    pub(super) async fn start_exec(
        self: &Arc<Self>,
        process: Arc<Process>,
    ) -> Result<u32, ContainerError> {
        let namespace = self.sandbox.namespace();
        let whose = Whose {
            namespace: &namespace,
            id: &process.exec_id,
        };
        let (streams, ends) = Streams::open(&process.paths, None, whose).await?;
        process.set_streams(streams);
        let mut stdio = self
            .sandbox
            .guest
            .listen(ends, process.paths.terminal)
            .await?;
        let mut request = proto::ExecRequest {
            id: self.id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        };
        match &process.work {
            Work::Execute(spec) => {
                let Hints { user, rows, cols } = Hints::of(spec);
                (stdio.rows, stdio.cols) = (rows, cols);
                request.user = user;
                request.process_json = spec.clone();
            }
            Work::Tool(tool) => request.tool_json = tool.clone(),
            Work::First => {}
        }
        request.stdio = Some(stdio).into();
        let answer = match self.sandbox.agent().exec(&request).await {
            Ok(answer) => answer,
            Err(error) => {
                process.set_exited(Exit::now(KILLED));
                return Err(error.into());
            }
        };
        process.set_running();
        tokio::spawn(self.clone().watch(process, answer.pid));
        Ok(answer.pid)
    }

    /// Forgets an added process that is not running.
    pub(super) fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Waits for a process's end and tells it.
    async fn watch(self: Arc<Self>, process: Arc<Process>, pid: u32) {
        let request = proto::ProcessRequest {
            id: self.id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        };
        let (exit, error) = match self.sandbox.agent().wait(&request).await {
            Ok(answer) => {
                let exit = Exit {
                    oom_killed: answer.oom_killed,
                    ..Exit::now(answer.exit_status.min(255))
                };
                (exit, String::new())
            }
            Err(error) => {
                // Without its agent a guest is of no use to anyone.
                self.sandbox.vm().kill();
                let reason = self.sandbox.ended_for();
                let error = reason.map_or_else(|| error.to_string(), str::to_owned);
                (Exit::now(KILLED), error)
            }
        };
        if process.exec_id.is_empty() {
            if self.shares_pids {
                // Else the guest's kernel does it.
                let _ = self.kill("", SIGKILL, true).await;
            }
            self.others_ended().await;
            if process.paths.stdout.is_empty() {
                // The log is complete before the end is told. (A FIFO's reader may be slow, and waits for it himself.)
                process.drained(LOG_TAKES).await;
            }
            self.observer.exited(exit, &error);
        }
        let exec_id = &process.exec_id;
        self.observer.process_exited(&self.id, exec_id, pid, exit);
        process.set_exited(exit);
        if process.exec_id.is_empty() && !self.is_member() {
            self.sandbox.end_members().await;
        }
    }

    /// The first process's end is told last.
    async fn others_ended(&self) {
        let running: Vec<_> = self
            .execs()
            .values()
            .filter(|p| p.life() == Life::Running)
            .cloned()
            .collect();
        let all = async {
            for process in running {
                process.exited().await;
            }
        };
        let _ = tokio::time::timeout(EXECS_FOLLOW, all).await;
    }

    /// Sends a signal. A kill of the first process reaches even a guest that hangs.
    pub(super) async fn kill(
        &self,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ContainerError> {
        let request = proto::KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let answer = self.sandbox.agent().kill(&request);
        if !(exec_id.is_empty() && signal == SIGKILL) {
            answer.await?;
            return Ok(());
        }
        match tokio::time::timeout(KILL_ANSWERS, answer).await {
            Ok(Ok(_)) => Ok(()),
            Err(_) | Ok(Err(CallError::Timeout { .. } | CallError::Connection { .. })) => {
                self.sandbox.vm().kill();
                Ok(())
            }
            Ok(Err(error)) => Err(error.into()),
        }
    }

    /// Ends it and its sandbox; what was written is kept unless `discard`.
    pub(super) async fn end(&self, discard: bool) {
        let runs = self.init.life() == Life::Running;
        if discard && runs {
            self.sandbox.vm().kill();
        } else if !discard {
            self.end_inside().await;
        }
        self.init.drained(PATIENCE).await;
        self.sandbox.end(discard).await;
    }

    /// Ends it; its sandbox lives on, if it does.
    pub(super) async fn leave(&self) {
        self.end_inside().await;
        self.init.drained(PATIENCE).await;
        if let (Some(place), Some(pod)) = (&self.place, &self.sandbox.pod) {
            pod.places.clear(place).await;
        }
    }

    /// Takes it out of the guest.
    async fn end_inside(&self) {
        if self.sandbox.vm().ended().borrow().is_some() {
            return;
        }
        if self.init.life() == Life::Running {
            let _ = self.kill("", SIGKILL, true).await;
            let _ = tokio::time::timeout(PATIENCE, self.init.exited()).await;
        }
        // What can't be unmounted here is synced by the shutdown that follows.
        let _ = self.sandbox.agent().delete_container(&self.request()).await;
    }
}

/// What the agent is told of an added process beside its spec.
struct Hints {
    /// Its user by name, to be looked up in the guest; empty: by its numbers.
    user: String,
    /// Of its terminal; 0: unknown.
    rows: u32,
    cols: u32,
}

impl Hints {
    /// Whether it is a process at all, the agent finds out.
    fn of(process: &[u8]) -> Self {
        let process: serde_json::Value = serde_json::from_slice(process).unwrap_or_default();
        let cells = |name: &str| {
            let number = process["consoleSize"][name].as_u64();
            number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
        };
        Self {
            user: process["user"]["username"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            rows: cells("height"),
            cols: cells("width"),
        }
    }
}

/// Rows and columns that the front door's terminal has; 0: unknown.
fn console_size(spec: &Spec) -> (u32, u32) {
    let size = spec.process().as_ref().and_then(|p| p.console_size());
    let cells = |n: u64| u32::try_from(n).unwrap_or(0);
    size.map_or((0, 0), |s| (cells(s.height()), cells(s.width())))
}

/// Reads a bundle's spec.
pub(super) fn read_spec(bundle: &Path) -> Result<Spec, ContainerError> {
    let path = bundle.join("config.json");
    let bytes = read_bounded(&path, MAX_SPEC)?;
    serde_json::from_slice(&bytes).map_err(|source| ContainerError::Spec { path, source })
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ContainerError> {
    files::read(path, limit).map_err(|source| ContainerError::Bundle {
        path: path.to_owned(),
        source,
    })
}

fn create_request(
    id: &str,
    inside: &Inside,
) -> Result<proto::CreateContainerRequest, ContainerError> {
    let spec_json =
        serde_json::to_vec(&inside.guest_spec).map_err(|source| ContainerError::Spec {
            path: "the guest's spec".into(),
            source,
        })?;
    let files = inside
        .files
        .iter()
        .map(|file| {
            Ok(proto::File {
                path: file.target.clone(),
                content: read_bounded(&file.source, MAX_FILE)?,
                ..Default::default()
            })
        })
        .collect::<Result<_, ContainerError>>()?;
    Ok(proto::CreateContainerRequest {
        id: id.to_owned(),
        spec_json,
        mounts: inside.mounts.clone(),
        rootfs: inside.rootfs.clone(),
        files,
        user: inside.user.clone(),
        ..Default::default()
    })
}

fn defaults(settings: &Settings) -> plan::Defaults {
    plan::Defaults {
        memory: settings.memory,
        cpus: settings.cpus,
    }
}
