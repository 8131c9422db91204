//! The agent's side of a new process: fork, streams, limits, the talk until it may execute.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use casemate_protocol::agent;
use oci_spec::runtime::LinuxIdMapping;
use rustix::process::{Pid, PidfdGetfdFlags, pidfd_getfd};
use rustix::termios::Winsize;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::child::{self, Child, Role};
use super::namespaces::{NEWPID, id_map};
use super::process::Plan;
use super::tool::Job;
use super::wire::{self, Report};
use crate::conn::{Conn, Host};
use crate::error::{Attempt, Error, Kind, Result};
use crate::pump;
use crate::reaper::{Exit, Reaper};
use crate::seccomp::Filter;
use crate::sys;

/// A process that waits to execute.
pub(super) struct Launched {
    pub(super) pid: Pid,
    pub(super) pidfd: OwnedFd,
    pub(super) sync: Conn,
    pub(super) terminal: Option<Arc<Conn>>,
    /// Becomes true once the process ended; pumps then drain.
    pub(super) exited: watch::Sender<bool>,
    pub(super) exit: tokio::sync::oneshot::Receiver<Exit>,
    pub(super) input: Option<JoinHandle<()>>,
    pub(super) outputs: Vec<JoinHandle<()>>,
}

/// Everything that a launch needs.
pub(super) struct Launch<'a> {
    pub(super) host: &'a Host,
    pub(super) reaper: &'a Reaper,
    pub(super) stdio: &'a agent::Stdio,
    pub(super) plan: &'a Plan,
    pub(super) filter: Option<&'a Filter>,
    pub(super) role: Role<'a>,
    /// Namespaces that the fork makes.
    pub(super) namespaces: u64,
    /// A pid namespace to put the child into.
    pub(super) pid_namespace: Option<OwnedFd>,
    pub(super) cgroup: std::os::fd::BorrowedFd<'a>,
    /// For a new user namespace.
    pub(super) id_maps: Option<(&'a [LinuxIdMapping], &'a [LinuxIdMapping])>,
    /// Instead of executing anything.
    pub(super) job: Option<&'a Job>,
}

/// The connections of a process's streams.
struct Connections {
    stdin: Option<Conn>,
    stdout: Option<Conn>,
    stderr: Option<Conn>,
}

async fn connect(host: &Host, stdio: &agent::Stdio) -> Result<Connections> {
    let one = |port: u32, name: &'static str| async move {
        match port {
            0 => Ok(None),
            port => host
                .connect(port)
                .await
                .map(Some)
                .attempt(|| format!("connect {name} to port {port} of the host")),
        }
    };
    let (stdin, stdout, stderr) = tokio::try_join!(
        one(stdio.stdin_port, "stdin"),
        one(stdio.stdout_port, "stdout"),
        one(stdio.stderr_port, "stderr")
    )?;
    Ok(Connections {
        stdin,
        stdout,
        stderr,
    })
}

/// Pipes between the process and the pumps: (the process's end, the agent's end).
type Pipe = Option<(OwnedFd, OwnedFd)>;

fn pipes(connections: &Connections, terminal: bool) -> Result<[Pipe; 3]> {
    let pipe = |wanted: bool| match wanted && !terminal {
        true => pump::pipe().map(Some).attempt(|| "make a pipe".into()),
        false => Ok(None),
    };
    // (read, write): the process reads its input and writes its outputs.
    let swap = |pipe: Pipe| pipe.map(|(read, write)| (write, read));
    Ok([
        pipe(connections.stdin.is_some())?,
        swap(pipe(connections.stdout.is_some())?),
        swap(pipe(connections.stderr.is_some())?),
    ])
}

/// Forks the process and brings it to the point where only the execve is left.
pub(super) async fn launch(launch: Launch<'_>) -> Result<Launched> {
    let terminal = launch.plan.terminal;
    if terminal != launch.stdio.terminal || terminal && launch.stdio.stderr_port != 0 {
        return Err(Error::invalid(format!(
            "process.terminal is {terminal}, stdio.terminal {} and stderr's port {}: they must agree, and a terminal has no stderr",
            launch.stdio.terminal, launch.stdio.stderr_port
        )));
    }
    let connections = connect(launch.host, launch.stdio).await?;
    let pipes = pipes(&connections, terminal)?;
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .attempt(|| "make a socket pair".into())?;

    let size = match (launch.stdio.rows, launch.stdio.cols) {
        (0, _) | (_, 0) => None,
        (rows, cols) => Some(window(rows, cols)),
    };
    let child = Child {
        sync: &theirs,
        streams: [&pipes[0], &pipes[1], &pipes[2]]
            .map(|pipe| pipe.as_ref().map(|(theirs, _)| theirs)),
        size,
        plan: launch.plan,
        filter: launch.filter,
        role: launch.role,
        job: launch.job,
    };
    let (pid, pidfd) = fork(
        child,
        launch.namespaces,
        launch.pid_namespace.as_ref(),
        launch.cgroup,
    )?;
    let exit = launch.reaper.watch(pid);
    drop(theirs);
    let agent_ends = pipes.map(|pipe| pipe.map(|(_, ours)| ours));
    let mut victim = KillOnDrop(Some(pidfd));

    let sync = Conn::new(ours).attempt(|| "watch the child".into())?;
    if let Some((uids, gids)) = launch.id_maps {
        for (file, map) in [("uid_map", uids), ("gid_map", gids)] {
            std::fs::write(format!("/proc/{pid}/{file}"), id_map(map))
                .attempt(|| format!("write {file} {map:?}"))?;
        }
        wire::send_go(&sync)
            .await
            .attempt(|| "continue the child".into())?;
    }
    let master = match wire::hear(&sync).await {
        Report::Ready(master) => master,
        Report::Failed(error) => return Err(error),
        Report::Gone => return Err(died(exit, "while it was set up").await),
    };
    limits(pid, launch.plan)?;

    let pidfd = victim
        .0
        .as_ref()
        .ok_or_else(|| Error::new(Kind::Internal, "no pidfd"))?;
    let terminal = match master {
        Some(number) => {
            let master = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())
                .attempt(|| "take over the terminal".into())?;
            Some(Arc::new(
                Conn::new(master).attempt(|| "watch the terminal".into())?,
            ))
        }
        None => None,
    };
    let (exited, watch_exit) = watch::channel(false);
    let (input, outputs) = start_pumps(connections, agent_ends, terminal.as_ref(), &watch_exit)?;
    let pidfd = victim
        .0
        .take()
        .ok_or_else(|| Error::new(Kind::Internal, "no pidfd"))?;
    Ok(Launched {
        pid,
        pidfd,
        sync,
        terminal,
        exited,
        exit,
        input,
        outputs,
    })
}

/// Lets a launched process execute; returns once it has.
pub(super) async fn execute(sync: &Conn) -> Result<u64> {
    wire::send_go(sync)
        .await
        .attempt(|| "start the process: it has ended already".into())?;
    match wire::hear(sync).await {
        Report::Failed(error) => Err(error),
        // A death between go and execve looks the same; Wait tells it.
        Report::Gone => Ok(sys::monotonic_ns()),
        Report::Ready(_) => Err(Error::new(Kind::Internal, "the child is confused")),
    }
}

/// A terminal's size.
pub(super) fn window(rows: u32, cols: u32) -> Winsize {
    let cut = |n: u32| n.min(u32::from(u16::MAX)) as u16;
    Winsize {
        ws_row: cut(rows),
        ws_col: cut(cols),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Nothing may be awaited between the fork and the watch on the child: the reaper would miss it.
fn fork(
    child: Child<'_>,
    namespaces: u64,
    pid_namespace: Option<&OwnedFd>,
    cgroup: std::os::fd::BorrowedFd<'_>,
) -> Result<(Pid, OwnedFd)> {
    let own = match pid_namespace {
        Some(target) => {
            let own = rustix::fs::open(
                "/proc/self/ns/pid",
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .attempt(|| "open the agent's pid namespace".into())?;
            sys::setns(target.as_fd(), NEWPID).attempt(|| "enter the pid namespace".into())?;
            Some(own)
        }
        None => None,
    };
    let forked = sys::fork(namespaces, cgroup);
    if let (Ok(sys::Fork::Child), _) = (&forked, ()) {
        child::run(child);
    }
    if let Some(own) = own {
        // Only children's namespace was changed; the agent's own can always be returned to.
        sys::setns(own.as_fd(), NEWPID).attempt(|| "return to the agent's pid namespace".into())?;
    }
    match forked.attempt(|| format!("fork with namespaces {namespaces:#x}"))? {
        sys::Fork::Parent(pid, pidfd) => Ok((pid, pidfd)),
        sys::Fork::Child => sys::exit(1),
    }
}

/// The agent sets what the child may lack the capability for.
fn limits(pid: Pid, plan: &Plan) -> Result<()> {
    if let Some(adj) = plan.oom_score_adj {
        std::fs::write(format!("/proc/{pid}/oom_score_adj"), adj.to_string())
            .attempt(|| format!("set oom_score_adj to {adj}"))?;
    }
    for (resource, limit) in &plan.rlimits {
        rustix::process::prlimit(Some(pid), *resource, *limit)
            .attempt(|| format!("set {resource:?} to {limit:?}"))?;
    }
    Ok(())
}

/// The tasks of a process's input and outputs.
type Pumps = (Option<JoinHandle<()>>, Vec<JoinHandle<()>>);

fn start_pumps(
    connections: Connections,
    [stdin, stdout, stderr]: [Option<OwnedFd>; 3],
    terminal: Option<&Arc<Conn>>,
    exited: &watch::Receiver<bool>,
) -> Result<Pumps> {
    let adopt = |fd: OwnedFd| Conn::new(fd).attempt(|| "watch a pipe".into());
    if let Some(terminal) = terminal {
        let input = connections
            .stdin
            .map(|host| tokio::spawn(pump::terminal_input(host, terminal.clone())));
        let output = connections.stdout.map(|host| {
            tokio::spawn(pump::terminal_output(
                terminal.clone(),
                host,
                exited.clone(),
            ))
        });
        return Ok((input, output.into_iter().collect()));
    }
    let input = match (connections.stdin, stdin) {
        (Some(host), Some(pipe)) => Some(tokio::spawn(pump::input(host, adopt(pipe)?))),
        _ => None,
    };
    let mut outputs = Vec::new();
    for (host, pipe) in [(connections.stdout, stdout), (connections.stderr, stderr)] {
        if let (Some(host), Some(pipe)) = (host, pipe) {
            outputs.push(tokio::spawn(pump::output(
                adopt(pipe)?,
                host,
                exited.clone(),
            )));
        }
    }
    Ok((input, outputs))
}

/// What became of a child that closed its socket without a word.
async fn died(exit: tokio::sync::oneshot::Receiver<Exit>, when: &str) -> Error {
    let status = exit
        .await
        .map_or("unknown".into(), |exit| exit.status.to_string());
    Error::new(
        Kind::Internal,
        format!("the process died {when}, status {status} (128 + signal); out of memory?"),
    )
}

/// A child whose launch fails must not linger.
struct KillOnDrop(Option<OwnedFd>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.0 {
            let _ = sys::pidfd_signal(pidfd, libc::SIGKILL);
        }
    }
}
