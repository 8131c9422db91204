//! The shim's main loop: serve until told to leave or left alone.

use super::container::Observer;
use super::launch::monotonic_ns;
use super::process::Exit;
use super::service::Service;
use crate::journal::Journal;
use crate::settings::Settings;
use crate::state::{SandboxDir, State, Status, now_ns};
use anyhow::Context;
use containerd_shim_protos::shim_async::{Task, create_task};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::io::Interest;
use tokio::sync::watch;
use ttrpc::r#async::Service as TtrpcService;

/// The service's name in containerd 1.x; 2.x has a renamed copy.
const TASK_V2: &str = "containerd.task.v2.Task";

/// What the one who starts the shim hands over.
#[derive(Debug)]
pub struct Serve {
    /// The sandbox's directory.
    pub dir: PathBuf,
    /// The listening Task socket.
    pub listener: OwnedFd,
    /// The directory's lock, held as long as we live.
    pub lock: OwnedFd,
    /// Ends when whoever started us is gone; then so are we. `None`: we outlive them.
    pub lifeline: Option<OwnedFd>,
    /// Where the guest's console goes.
    pub console: Option<OwnedFd>,
    /// The container goes away with its end: nothing it wrote needs to be kept.
    pub discard: bool,
}

/// Writes down in the sandbox's directory what happened.
struct Recorder {
    dir: SandboxDir,
    discard: bool,
    status: Mutex<Status>,
}

impl Recorder {
    fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut status = self.status.lock().unwrap_or_else(|e| e.into_inner());
        change(&mut status);
        // The status is for people and for the tidying up: a full disk must not stop the container.
        let _ = self.dir.write_status(&status);
    }
}

impl Observer for Recorder {
    fn started(&self, pid: u32) {
        self.update(|status| {
            status.state = State::Running;
            status.pid = pid;
            status.started = now_ns();
        });
    }

    fn exited(&self, exit: Exit, error: &str) {
        // The directory is about to go; only what went wrong is still to be told.
        if self.discard && error.is_empty() && !exit.oom_killed {
            return;
        }
        self.update(|status| {
            status.state = State::Exited;
            status.pid = 0;
            status.exit_code = exit.status;
            status.finished = exit.at_ns;
            status.oom_killed = exit.oom_killed;
            status.error = error.to_owned();
        });
    }
}

/// Serves one sandbox until its end.
pub fn run(serve: Serve) -> anyhow::Result<()> {
    let shim_main = monotonic_ns();
    let settings = Settings::load()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the event loop")?;
    runtime.block_on(serve_sandbox(serve, settings, shim_main))
}

async fn serve_sandbox(serve: Serve, settings: Settings, shim_main: u64) -> anyhow::Result<()> {
    let (leave, mut leaving) = watch::channel(false);
    let recorder = Arc::new(Recorder {
        dir: SandboxDir::inherited(serve.dir.clone(), serve.lock),
        discard: serve.discard,
        status: Mutex::default(),
    });
    let service = Arc::new(Service {
        settings,
        journal: Journal::in_dir(&serve.dir),
        console: serve.console,
        discard: serve.discard,
        shim_main,
        observer: recorder.clone(),
        leave,
        container: tokio::sync::Mutex::new(None),
    });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener(serve.listener)?)
        .register_service(task_services(service.clone()));
    server.start().await.context("can't serve the Task API")?;

    tokio::select! {
        _ = leaving.wait_for(|leave| *leave) => {}
        () = alone(serve.lifeline) => {
            service.abandon().await;
            if serve.discard {
                // Nobody else is left to do it; what fails here, the next command does.
                let _ = recorder.dir.remove();
            }
        }
    }
    // Sends the last answers.
    let _ = server.shutdown().await;
    Ok(())
}

fn listener(fd: OwnedFd) -> anyhow::Result<ttrpc::r#async::transport::Listener> {
    ttrpc::r#async::transport::Listener::try_from(StdUnixListener::from(fd))
        .context("the descriptor to listen on is no listening Unix socket")
}

/// The Task service under both of its names.
fn task_services(service: Arc<Service>) -> HashMap<String, TtrpcService> {
    let task: Arc<dyn Task + Send + Sync> = service;
    let mut services = create_task(task.clone());
    let under_v2_name = create_task(task)
        .into_values()
        .map(|service| (TASK_V2.to_owned(), service));
    services.extend(under_v2_name);
    services
}

/// Returns once whoever holds the other end of the lifeline is gone.
async fn alone(lifeline: Option<OwnedFd>) {
    let watched = lifeline.and_then(|fd| crate::fds::watched(fd, Interest::READABLE).ok());
    match watched {
        // Nothing is ever written: readable means that it ended.
        Some(fd) => drop(fd.readable().await),
        None => std::future::pending().await,
    }
}
