//! The shim's main loop: serve until told to leave or left alone.

use super::launch::monotonic_ns;
use super::recorder::Recorder;
use super::sandbox_api::SandboxApi;
use super::service::{Asked, Service};
use super::unattended;
use crate::containerd::events::Publisher;
use crate::journal::Journal;
use crate::log;
use crate::restart::Policy;
use crate::settings::Settings;
use crate::state::SandboxDir;
use anyhow::Context;
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::shim_async::{Task, create_task};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
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
    /// Ends when whoever started us is gone; then so are we, but for an `unattended` container that was started.
    pub lifeline: Option<OwnedFd>,
    /// Where the guest's console goes.
    pub console: Option<OwnedFd>,
    /// The container goes away with its end: nothing it wrote needs to be kept.
    pub discard: bool,
    /// Nobody attends the container: we see to its end, and start it again as this says.
    pub unattended: Option<Policy>,
    /// What the container writes is logged, within these bounds.
    pub log: Option<log::Limits>,
    /// The engine that it belongs to; `None`: the command line.
    pub engine: Option<Engine>,
    /// More configuration, for this sandbox only.
    pub config: Option<PathBuf>,
    /// Open files that stay so as long as we live: the image's lease.
    pub held: Vec<OwnedFd>,
}

/// Who asks for what happens.
#[derive(Debug)]
pub struct Engine {
    /// containerd's namespace.
    pub namespace: String,
    /// Where events go: a ttrpc socket, or nowhere.
    pub events: String,
}

/// Serves one sandbox until its end.
pub fn run(serve: Serve) -> anyhow::Result<()> {
    let shim_main = monotonic_ns();
    let settings = match &serve.config {
        Some(path) => Settings::load_with(path, &std::fs::read_to_string(path)?)?,
        None => Settings::load()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("can't start the event loop")?;
    runtime.block_on(serve_sandbox(serve, settings, shim_main))
}

async fn serve_sandbox(serve: Serve, settings: Settings, shim_main: u64) -> anyhow::Result<()> {
    let (leave, mut leaving) = watch::channel(false);
    let log = match serve.log {
        Some(limits) => {
            let id = serve.dir.file_name().unwrap_or_default().to_string_lossy();
            let dir = log::dir_of(&settings.data_dir, &settings.state_dir, &id);
            let writer = log::Writer::open(&dir, limits);
            let writer = writer.context("can't open the container's log")?;
            Some(Arc::new(Mutex::new(writer)))
        }
        None => None,
    };
    let dir = SandboxDir::inherited(serve.dir.clone(), serve.lock);
    let is_engines = serve.engine.is_some();
    let publisher = serve
        .engine
        .and_then(|engine| Publisher::start(engine.namespace, &engine.events));
    let recorder = Recorder::new(dir, serve.discard, serve.unattended, publisher);
    let recorder = Arc::new(recorder);
    let service = Arc::new(Service {
        settings,
        journal: Journal::in_dir(&serve.dir),
        dir: serve.dir.clone(),
        console: serve.console,
        discard: serve.discard,
        shim_main,
        recorder: recorder.clone(),
        leave,
        creating: tokio::sync::Mutex::default(),
        containers: Mutex::default(),
        log,
        asked: Asked::default(),
        unwanted: watch::Sender::new(false),
    });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(listener(serve.listener)?)
        .register_service(task_services(service.clone()));
    if is_engines {
        let api: Arc<dyn Sandbox + Send + Sync> = Arc::new(SandboxApi::new(service.clone()));
        server = server.register_service(create_sandbox(api));
    }
    server.start().await.context("can't serve the Task API")?;

    let discard = || {
        if serve.discard {
            // Nobody else is left to do it; what fails here, the next command does.
            let _ = recorder.dir.remove();
        }
    };
    tokio::select! {
        _ = leaving.wait_for(|leave| *leave) => if is_engines { discard() },
        () = alone(serve.lifeline, serve.unattended.is_some().then_some(&service)) => {
            service.unwanted.send_replace(true);
            service.abandon().await;
            discard();
        }
        () = unattended::look_after(&service, &recorder), if serve.unattended.is_some() => discard(),
    }
    recorder.close();
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

/// Returns once whoever holds the other end of the lifeline is gone; never if the container of `outliving` was started by then.
async fn alone(lifeline: Option<OwnedFd>, outliving: Option<&Arc<Service>>) {
    let watched = lifeline.and_then(|fd| crate::fds::watched(fd, Interest::READABLE).ok());
    match watched {
        // Nothing is ever written: readable means that it ended.
        Some(fd) => drop(fd.readable().await),
        None => std::future::pending().await,
    }
    if outliving.is_some_and(|service| service.asked.start.load(Ordering::Relaxed)) {
        std::future::pending().await
    }
}
