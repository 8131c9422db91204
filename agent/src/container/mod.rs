//! One container: its plan, its processes, its cgroup and mounts.

mod become_user;
mod child;
mod copy_up;
mod guest_mounts;
mod launch;
mod namespaces;
mod options;
mod process;
mod root;
mod spec;
mod tool;
mod user;
mod volume;
mod wire;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_protocol::agent;
use oci_spec::runtime::{Linux, LinuxResources, LinuxTimeOffset};
use rustix::process::Pid;
use tokio::sync::{Mutex as AsyncMutex, watch};

use self::child::{First, Role};
use self::guest_mounts::GuestMounts;
use self::launch::{Launch, Launched};
use self::namespaces::{NEWCGROUP, NEWPID, NEWUSER, Namespaces};
use self::root::Layout;
use self::spec::{Process as SpecProcess, Spec};
use self::tool::Job;
use crate::cgroup::{Cgroup, Stats};
use crate::conn::{Conn, Host};
use crate::error::{Attempt, Error, Kind, Result};
use crate::reaper::{Exit, Reaper};
use crate::seccomp::Filter;
use crate::sys;

/// Longest id of a container or process.
const MAX_ID: usize = 128;

/// Most processes that exec added and whose end nobody has deleted yet.
const MAX_EXECS: usize = 4096;

/// Checks an id: it becomes part of paths.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+');
    match id {
        "" | "." | ".." => Err(Error::invalid(format!("id {id:?} is not allowed"))),
        id if id.len() > MAX_ID => Err(Error::invalid(format!(
            "id of {} bytes: at most {MAX_ID}",
            id.len()
        ))),
        id if !id.bytes().all(plain) => Err(Error::invalid(format!(
            "id {id:?}: only letters, digits, '-', '_', '.', '+'"
        ))),
        _ => Ok(()),
    }
}

/// How a process ended, once its output is drained.
#[derive(Debug, Clone, Copy)]
pub(crate) struct End {
    pub(crate) exit: Exit,
    pub(crate) oom_killed: bool,
}

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    /// Taken by the start.
    sync: AsyncMutex<Option<Conn>>,
    terminal: Option<Arc<Conn>>,
    end: watch::Receiver<Option<End>>,
}

/// A container of this guest.
#[derive(Debug)]
pub(crate) struct Container {
    blueprint: Blueprint,
    cgroup: Arc<Mutex<Cgroup>>,
    mounts: Mutex<GuestMounts>,
    first: Arc<Process>,
    execs: Mutex<HashMap<String, Option<Arc<Process>>>>,
}

/// What an added process does.
enum Work {
    Execute(Box<process::Plan>),
    Tool(Job),
}

/// The spec, parsed and checked once.
#[derive(Debug)]
struct Blueprint {
    id: String,
    plan: process::Plan,
    namespaces: Namespaces,
    filter: Option<Filter>,
    layout: Layout,
    hostname: Option<String>,
    domainname: Option<String>,
    time_offsets: String,
    personality: Option<u64>,
    linux: Linux,
}

/// Parses a spec as CreateContainer does; for fuzzing and tests.
pub fn check_spec(id: &str, spec_json: &[u8]) -> Result<()> {
    Blueprint::of(id, spec_json, "/run/casemate/x/rootfs", "").map(drop)
}

/// Parses a process as Exec does; for fuzzing and tests.
pub fn check_process(process_json: &[u8]) -> Result<()> {
    process::Plan::of(&parse::<SpecProcess>(process_json, "process")?, "", None).map(drop)
}

/// Parses resources as Update does; for fuzzing and tests.
pub fn check_resources(resources_json: &[u8]) -> Result<()> {
    crate::cgroup::check(&parse(resources_json, "resources")?)
}

fn parse<'a, T: serde::Deserialize<'a>>(json: &'a [u8], what: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| {
        Error::invalid(format!(
            "the {what} is no valid JSON of the runtime spec: {error}"
        ))
    })
}

impl Blueprint {
    fn of(id: &str, spec_json: &[u8], rootfs: &str, user: &str) -> Result<Self> {
        check_id(id)?;
        let mut spec: Spec = parse(spec_json, "spec")?;
        let linux = spec
            .linux
            .take()
            .ok_or_else(|| Error::invalid("the spec has no linux section"))?;
        refuse_what_guests_lack(&spec, &linux)?;
        let process = spec
            .process
            .as_ref()
            .ok_or_else(|| Error::invalid("the spec has no process"))?;
        let namespaces = Namespaces::of(&linux)?;
        let uts = namespaces.create & namespaces::NEWUTS != 0;
        for (name, value) in [
            ("hostname", &spec.hostname),
            ("domainname", &spec.domainname),
        ] {
            if value.as_ref().is_some_and(|v| !v.is_empty()) && !uts {
                return Err(Error::invalid(format!("{name} needs a new uts namespace")));
            }
        }
        let propagation = match linux.rootfs_propagation().as_deref() {
            None | Some("") => None,
            Some(name) => Some(options::propagation(name).ok_or_else(|| {
                Error::invalid(format!("linux.rootfsPropagation {name:?} is unknown"))
            })?),
        };
        let layout = Layout {
            rootfs: rootfs.into(),
            read_only: spec
                .root
                .as_ref()
                .and_then(|root| root.readonly())
                .unwrap_or(false),
            propagation,
            mounts: spec
                .mounts
                .iter()
                .map(root::Entry::of)
                .collect::<Result<_>>()?,
            devices: linux.devices().clone().unwrap_or_default(),
            sysctl: linux
                .sysctl()
                .as_ref()
                .map(root::sysctls)
                .transpose()?
                .unwrap_or_default(),
            masked: linux.masked_paths().clone().unwrap_or_default(),
            read_only_paths: linux.readonly_paths().clone().unwrap_or_default(),
            user_namespace: namespaces.all() & NEWUSER != 0,
        };
        Ok(Self {
            id: id.to_owned(),
            plan: process::Plan::of(process, user, None)?,
            filter: linux.seccomp().as_ref().map(Filter::compile).transpose()?,
            layout,
            hostname: spec.hostname.filter(|name| !name.is_empty()),
            domainname: spec.domainname.filter(|name| !name.is_empty()),
            time_offsets: time_offsets(linux.time_offsets().iter().flatten())?,
            personality: linux
                .personality()
                .as_ref()
                .map(process::personality)
                .transpose()?,
            namespaces,
            linux,
        })
    }
}

fn refuse_what_guests_lack(spec: &Spec, linux: &Linux) -> Result<()> {
    if !(spec.hooks.create_container.is_empty() && spec.hooks.start_container.is_empty()) {
        return Err(Error::unsupported(
            "hooks createContainer and startContainer are not run in the guest",
        ));
    }
    if linux.intel_rdt().is_some() {
        return Err(Error::unsupported(
            "linux.intelRdt: the guest has no resource control of the processor",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(Error::unsupported(
            "linux.memoryPolicy: the guest has one memory node",
        ));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(Error::unsupported(
            "linux.netDevices: the host's interfaces are not in the guest",
        ));
    }
    if linux
        .mount_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty())
    {
        return Err(Error::unsupported(
            "linux.mountLabel: the guest's kernel has no SELinux",
        ));
    }
    Ok(())
}

fn time_offsets<'a>(
    offsets: impl Iterator<Item = (&'a String, &'a LinuxTimeOffset)>,
) -> Result<String> {
    let mut text = String::new();
    for (clock, offset) in offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::invalid(format!(
                "linux.timeOffsets: clock {clock:?} is neither monotonic nor boottime"
            )));
        }
        let _ = writeln!(
            text,
            "{clock} {} {}",
            offset.secs().unwrap_or_default(),
            offset.nanosecs().unwrap_or_default()
        );
    }
    Ok(text)
}

impl Container {
    /// Builds the container; its first process waits for [`Container::start`].
    pub(crate) async fn create(
        host: &Host,
        reaper: &Reaper,
        request: &agent::CreateContainerRequest,
    ) -> Result<Self> {
        let blueprint = Blueprint::of(
            &request.id,
            &request.spec_json,
            &request.rootfs,
            &request.user,
        )?;
        let mut mounts = GuestMounts::new(&request.id);
        let mut cgroup = None;
        match Self::build(host, reaper, request, &blueprint, &mut mounts, &mut cgroup).await {
            Ok((first, cgroup)) => Ok(Self {
                blueprint,
                cgroup,
                mounts: Mutex::new(mounts),
                first,
                execs: Mutex::default(),
            }),
            Err(error) => {
                // The cause is what the caller must hear, whatever else goes wrong now.
                let _ = take_down(cgroup.as_ref(), &mut mounts).await;
                Err(error)
            }
        }
    }

    async fn build(
        host: &Host,
        reaper: &Reaper,
        request: &agent::CreateContainerRequest,
        blueprint: &Blueprint,
        mounts: &mut GuestMounts,
        cgroup: &mut Option<Cgroup>,
    ) -> Result<(Arc<Process>, Arc<Mutex<Cgroup>>)> {
        mounts.check(&request.rootfs)?;
        mounts.apply(&request.mounts, &request.files)?;
        for fill in mounts.fills(&request.mounts, &request.rootfs)? {
            // It may be long: the agent goes on answering.
            let filled = tokio::task::spawn_blocking(move || fill.fill()).await;
            filled.map_err(|error| Error::new(Kind::Internal, format!("copy-up: {error}")))??;
        }
        let made = cgroup.insert(Cgroup::create(&request.id)?);
        made.apply(blueprint.linux.resources().as_ref())?;
        let launched = launch_first(
            host,
            reaper,
            blueprint,
            request.stdio.get_or_default(),
            made,
        )
        .await?;
        let cgroup = cgroup
            .take()
            .ok_or_else(|| Error::new(Kind::Internal, "the cgroup is gone"))?;
        let cgroup = Arc::new(Mutex::new(cgroup));
        Ok((Arc::new(Process::supervise(launched, &cgroup)), cgroup))
    }

    /// The first process.
    pub(crate) fn first(&self) -> &Arc<Process> {
        &self.first
    }

    /// Process `exec_id`; empty: the first.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.first.clone());
        }
        let found = lock(&self.execs).get(exec_id).cloned().flatten();
        found.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("container {} has no process {exec_id:?}", self.blueprint.id),
            )
        })
    }

    /// Adds a process and executes it.
    pub(crate) async fn exec(
        &self,
        host: &Host,
        reaper: &Reaper,
        request: &agent::ExecRequest,
    ) -> Result<u32> {
        check_id(&request.exec_id)?;
        let work = self.work(request)?;
        if self.first.end.borrow().is_some() {
            return Err(Error::new(
                Kind::State,
                format!("container {} is not running", self.blueprint.id),
            ));
        }
        if matches!(work, Work::Execute(_)) && lock(&self.cgroup).is_frozen() {
            return Err(Error::new(
                Kind::State,
                format!("container {} is paused: resume it first", self.blueprint.id),
            ));
        }
        self.reserve(&request.exec_id)?;
        let result = self.exec_reserved(host, reaper, &work, request).await;
        match result {
            Ok(process) => {
                let pid = process.pid();
                lock(&self.execs).insert(request.exec_id.clone(), Some(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                lock(&self.execs).remove(&request.exec_id);
                Err(error)
            }
        }
    }

    /// What an added process does.
    fn work(&self, request: &agent::ExecRequest) -> Result<Work> {
        if request.tool_json.is_empty() {
            let process = parse(&request.process_json, "process")?;
            let plan = process::Plan::of(&process, &request.user, Some(&self.blueprint.plan))?;
            return Ok(Work::Execute(Box::new(plan)));
        }
        Ok(Work::Tool(Job {
            tool: Job::parse(&request.tool_json)?,
            overlay: lock(&self.mounts).overlay(),
            pids: self.pids()?,
        }))
    }

    /// Takes the id before anything is awaited, so that two requests can't share it.
    fn reserve(&self, exec_id: &str) -> Result<()> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(exec_id) {
            return Err(Error::new(
                Kind::Exists,
                format!("process {exec_id:?} exists already"),
            ));
        }
        if execs.len() >= MAX_EXECS {
            return Err(Error::invalid(format!(
                "container {} has {MAX_EXECS} added processes: wait for some",
                self.blueprint.id
            )));
        }
        execs.insert(exec_id.to_owned(), None);
        Ok(())
    }

    async fn exec_reserved(
        &self,
        host: &Host,
        reaper: &Reaper,
        work: &Work,
        request: &agent::ExecRequest,
    ) -> Result<Process> {
        let no_plan = process::Plan::default();
        let (plan, job) = match work {
            Work::Execute(plan) => (&**plan, None),
            Work::Tool(job) => (&no_plan, Some(job)),
        };
        let stays = job.is_some_and(Job::is_outside);
        let namespaces = self.blueprint.namespaces.all();
        let pid_namespace = match namespaces & NEWPID {
            0 => None,
            _ if stays => None,
            _ => Some(open(&format!("/proc/{}/ns/pid", self.first.pid))?),
        };
        let cgroup = match job {
            // A tool must go on where the container may be frozen.
            Some(_) => open(crate::cgroup::ROOT)?,
            None => lock(&self.cgroup).place_beside(self.first.pid)?,
        };
        let role = match stays {
            true => Role::Stays,
            false => Role::Joins {
                first: &self.first.pidfd,
                namespaces,
            },
        };
        let launched = launch::launch(Launch {
            host,
            reaper,
            stdio: request.stdio.get_or_default(),
            plan,
            // A tool is not the container's code.
            filter: self.blueprint.filter.as_ref().filter(|_| job.is_none()),
            role,
            namespaces: 0,
            pid_namespace,
            cgroup: std::os::fd::AsFd::as_fd(&cgroup),
            id_maps: None,
            job,
        })
        .await?;
        let process = Process::supervise(launched, &self.cgroup);
        process.start().await?;
        Ok(process)
    }

    /// Forgets a process that exec added, once its end was told.
    pub(crate) fn forget(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    /// Sends a signal to every process.
    pub(crate) fn kill_all(&self, signal: i32) -> Result<()> {
        let cgroup = lock(&self.cgroup);
        if signal == libc::SIGKILL {
            return cgroup.kill();
        }
        for pid in cgroup.pids()? {
            let _ = sys::kill(pid as i32, signal); // it may have ended meanwhile
        }
        Ok(())
    }

    /// The processes' ids in the guest.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        lock(&self.cgroup).pids()
    }

    /// What it uses.
    pub(crate) fn stats(&self) -> Stats {
        lock(&self.cgroup).stats()
    }

    /// Changes limits.
    pub(crate) fn update(&self, resources_json: &[u8]) -> Result<()> {
        let resources: LinuxResources = parse(resources_json, "resources")?;
        let mut cgroup = lock(&self.cgroup);
        cgroup.update(&resources)?;
        match resources.devices() {
            Some(rules) => cgroup.set_devices(rules),
            None => Ok(()),
        }
    }

    /// Freezes or thaws every process.
    pub(crate) async fn freeze(&self, frozen: bool) -> Result<()> {
        let freezing = lock(&self.cgroup).freezer()?;
        freezing.set(frozen).await
    }

    /// Kills what is left of it and undoes all that was done for it.
    pub(crate) async fn destroy(&self) -> Result<()> {
        for process in lock(&self.execs).values().flatten() {
            let _ = process.kill(libc::SIGKILL); // tools are in no cgroup of the container's
        }
        let empty = {
            let cgroup = lock(&self.cgroup);
            cgroup.kill()?;
            cgroup.freezer()?
        };
        // Not until the output is sent: who deletes without having waited may have stopped reading.
        empty.until_empty().await?;
        lock(&self.cgroup).remove()?;
        let disks = {
            let mut mounts = lock(&self.mounts);
            mounts.undo()?;
            mounts.take_discarding()
        };
        guest_mounts::released(&disks).await;
        Ok(())
    }
}

async fn launch_first(
    host: &Host,
    reaper: &Reaper,
    blueprint: &Blueprint,
    stdio: &agent::Stdio,
    cgroup: &Cgroup,
) -> Result<Launched> {
    let namespaces = &blueprint.namespaces;
    let pid_namespace = namespaces
        .joined(NEWPID)
        .map(|path| open(&path.to_string_lossy()))
        .transpose()?;
    // New namespaces must belong to the user namespace that the child joins first; a cgroup namespace
    // and a time namespace begin where the process is, so after it is there.
    let late = NEWCGROUP | namespaces::NEWTIME;
    let fork = match namespaces.joined(NEWUSER) {
        Some(_) => namespaces.create & NEWPID,
        None => namespaces.create & !late,
    };
    let mut join: Vec<_> = namespaces
        .join
        .iter()
        .filter(|(flag, _)| *flag != NEWPID)
        .map(|(flag, path)| (*flag, path))
        .collect();
    join.sort_by_key(|(flag, _)| *flag != NEWUSER);
    let first = First {
        id: &blueprint.id,
        join,
        unshare: namespaces.create & !fork,
        new: namespaces.create,
        layout: &blueprint.layout,
        hostname: blueprint.hostname.as_deref(),
        domainname: blueprint.domainname.as_deref(),
        time_offsets: &blueprint.time_offsets,
        personality: blueprint.personality,
    };
    let linux = &blueprint.linux;
    let id_maps = match namespaces.create & NEWUSER {
        0 => None,
        _ => Some((
            linux.uid_mappings().as_deref().unwrap_or_default(),
            linux.gid_mappings().as_deref().unwrap_or_default(),
        )),
    };
    launch::launch(Launch {
        host,
        reaper,
        stdio,
        plan: &blueprint.plan,
        filter: blueprint.filter.as_ref(),
        role: Role::First(first),
        namespaces: fork,
        pid_namespace,
        cgroup: cgroup.as_fd(),
        id_maps,
        job: None,
    })
    .await
}

fn open(path: &str) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .attempt(|| format!("open {path}"))
}

impl Process {
    /// Watches over a launched process until its end is known and its output is sent.
    fn supervise(launched: Launched, cgroup: &Arc<Mutex<Cgroup>>) -> Self {
        let Launched {
            pid,
            pidfd,
            sync,
            terminal,
            exited,
            exit,
            input,
            outputs,
        } = launched;
        let (end_sender, end) = watch::channel(None);
        let oom_before = lock(cgroup).oom_kills();
        let cgroup = cgroup.clone();
        tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            let oom_killed =
                exit.status == 128 + libc::SIGKILL as u32 && lock(&cgroup).oom_kills() > oom_before;
            exited.send_replace(true);
            if let Some(input) = input {
                input.abort();
            }
            for output in outputs {
                let _ = output.await;
            }
            end_sender.send_replace(Some(End { exit, oom_killed }));
        });
        Self {
            pid,
            pidfd,
            sync: AsyncMutex::new(Some(sync)),
            terminal,
            end,
        }
    }

    /// Its id in the guest.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get() as u32
    }

    /// Lets it execute; returns CLOCK_MONOTONIC in nanoseconds when it had.
    pub(crate) async fn start(&self) -> Result<u64> {
        let sync = self.sync.lock().await.take();
        let sync =
            sync.ok_or_else(|| Error::new(Kind::State, "the process was started already"))?;
        launch::execute(&sync).await
    }

    /// Resolves once it ended and its output was sent.
    pub(crate) async fn ended(&self) -> Result<End> {
        let mut end = self.end.clone();
        let ended = end
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|end| *end);
        ended.ok_or_else(|| Error::new(Kind::Internal, "nobody watches the process"))
    }

    /// Sends a signal.
    pub(crate) fn kill(&self, signal: i32) -> Result<()> {
        match sys::pidfd_signal(&self.pidfd, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::new(
                Kind::NotFound,
                format!("process {} has ended already", self.pid),
            )),
            result => result.attempt(|| format!("send signal {signal} to process {}", self.pid)),
        }
    }

    /// Sets its terminal's size.
    pub(crate) fn resize(&self, rows: u32, cols: u32) -> Result<()> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| Error::new(Kind::State, "the process has no terminal"))?;
        rustix::termios::tcsetwinsize(&**terminal, launch::window(rows, cols))
            .attempt(|| "resize the terminal".into())
    }
}

/// Takes back a half-built container.
async fn take_down(cgroup: Option<&Cgroup>, mounts: &mut GuestMounts) -> Result<()> {
    if let Some(cgroup) = cgroup {
        cgroup.kill()?;
        cgroup.freezer()?.until_empty().await?;
        cgroup.remove()?;
    }
    mounts.undo()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
