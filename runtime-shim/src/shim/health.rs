//! Runs a container's health check now and then.

use super::container::Container;
use super::process::Work;
use super::recorder::Recorder;
use super::stdio::Paths;
use crate::files::gone_is_fine;
use crate::health::{Check, Health, MAX_OUTPUT, Outcome};
use crate::plan::USER_ANNOTATION;
use crate::rpc::{SIGKILL, chain};
use crate::state::now_ns;
use rustix::fs::{FileType, Mode, OFlags};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The exec id of a check: one at a time, and none of a front door's is so short.
const EXEC_ID: &str = "health";
/// A killed check is gone by then, or its guest hangs.
const KILL_TAKES: Duration = Duration::from_secs(10);
/// Between two looks at a silent check.
const PAUSE: Duration = Duration::from_millis(10);

/// Checks until the container ends, and writes down what comes of it.
pub(super) async fn watch(container: Arc<Container>, recorder: Arc<Recorder>, check: Check) {
    let Some(command) = check.command() else {
        return;
    };
    let started = now_ns();
    let mut health = Health::default();
    recorder.health(&health);
    let ended = container.init.exited();
    tokio::pin!(ended);
    loop {
        let age = now_ns().saturating_sub(started);
        tokio::select! {
            _ = &mut ended => return,
            () = tokio::time::sleep(check.wait(&health, age)) => {}
        }
        tokio::select! {
            _ = &mut ended => return,
            outcome = probe(&container, &command, check.patience()) => {
                health.take(outcome, &check, started);
                recorder.health(&health);
            }
        }
    }
}

async fn probe(container: &Arc<Container>, command: &[String], patience: Duration) -> Outcome {
    let start = now_ns();
    let (exit_code, output) = match run(container, command, patience).await {
        Ok(ran) => ran,
        Err(error) => (-1, error),
    };
    container.remove_exec(EXEC_ID);
    Outcome {
        start,
        end: now_ns(),
        exit_code,
        output,
    }
}

async fn run(
    container: &Arc<Container>,
    command: &[String],
    patience: Duration,
) -> Result<(i32, String), String> {
    let fifo = Fifo::new(&container.bundle).map_err(|e| format!("can't make a FIFO: {e}"))?;
    let paths = Paths {
        stdout: fifo.path.display().to_string(),
        stderr: fifo.path.display().to_string(),
        ..Paths::default()
    };
    let spec = process(&container.bundle, command)?;
    container
        .add_exec(EXEC_ID, paths, Work::Execute(spec))
        .map_err(|e| chain(&e))?;
    let process = container.process(EXEC_ID).ok_or("the check is gone")?;
    let started = container.start_exec(process.clone()).await;
    started.map_err(|e| chain(&e))?;
    let ends = async {
        let exit = process.exited().await;
        process.drained(Duration::from_secs(1)).await;
        exit
    };
    let ended = async {
        tokio::select! {
            exit = ends => exit,
            // On and on: whoever writes must not have to wait.
            never = fifo.read_all() => match never {},
        }
    };
    match tokio::time::timeout(patience, ended).await {
        Ok(exit) => Ok((exit.status as i32, fifo.text())),
        Err(_) => {
            let _ = container.kill(EXEC_ID, SIGKILL, false).await;
            let _ = tokio::time::timeout(KILL_TAKES, process.exited()).await;
            Err(format!("the check took longer than {patience:?}"))
        }
    }
}

/// The container's own process with another command line.
fn process(bundle: &Path, command: &[String]) -> Result<Vec<u8>, String> {
    let path = bundle.join("config.json");
    let read = || -> std::io::Result<Value> { Ok(serde_json::from_slice(&std::fs::read(&path)?)?) };
    let mut spec = read().map_err(|e| format!("can't read {}: {e}", path.display()))?;
    let user = spec["annotations"][USER_ANNOTATION].take();
    let mut process = spec["process"].take();
    process["args"] = json!(command);
    process["terminal"] = json!(false);
    if let Some(fields) = process.as_object_mut() {
        fields.remove("consoleSize");
    }
    if user.is_string() {
        process["user"]["username"] = user;
    }
    serde_json::to_vec(&process).map_err(|e| e.to_string())
}

/// Where a check's output goes; the beginning of it is kept.
struct Fifo {
    path: PathBuf,
    reader: AsyncFd<OwnedFd>,
    kept: Mutex<Vec<u8>>,
}

impl Fifo {
    fn new(dir: &Path) -> std::io::Result<Self> {
        let path = dir.join("health.out");
        gone_is_fine(std::fs::remove_file(&path))?;
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let reader = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Self {
            path,
            reader: crate::fds::watched(reader, Interest::READABLE)?,
            kept: Mutex::default(),
        })
    }

    /// Takes what is there; `false`: nothing.
    fn read(&self) -> bool {
        let mut buffer = [0; MAX_OUTPUT];
        let got = rustix::io::read(&self.reader, &mut buffer).unwrap_or(0);
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        let room = MAX_OUTPUT - kept.len();
        kept.extend_from_slice(&buffer[..got.min(room)]);
        got > 0
    }

    async fn read_all(&self) -> Infallible {
        loop {
            match self.reader.readable().await {
                Ok(mut ready) => {
                    if !self.read() {
                        ready.clear_ready();
                        // Before there is a writer, and after the last, a FIFO is always readable.
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                Err(_) => std::future::pending().await,
            }
        }
    }

    fn text(&self) -> String {
        while self.read() {}
        let kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&kept).into_owned()
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        // What stays goes with the sandbox.
        let _ = std::fs::remove_file(&self.path);
    }
}
