//! `stop`, `kill`, `wait`, `pause`, `unpause`: what is done to running containers.

use super::args::{ContainersArgs, KillArgs, StopArgs};
use super::client::{Client, ProcessId};
use super::{containers, output, signals};
use crate::rpc::{self, SIGKILL, SIGTERM};
use crate::settings::Settings;
use crate::state::{self, Container, State, StateRoot};
use anyhow::{Context, bail};
use std::time::{Duration, Instant};
use ttrpc::proto::Code;

/// What a container gets before it is killed, unless it or the user wants otherwise.
const STOP_TAKES: Duration = Duration::from_secs(10);
/// Between two looks at a container that is ending.
const SETTLES: Duration = Duration::from_millis(5);
/// After a kill the guest's end is a matter of moments.
const KILL_TAKES: Duration = Duration::from_secs(30);

/// A running container and the connection to whoever serves it.
pub(super) struct Running {
    pub(super) container: Container,
    pub(super) client: Client,
}

/// A call's answer, or what its error says.
fn answered<T>(answer: ttrpc::Result<T>) -> anyhow::Result<T> {
    answer.map_err(|error| anyhow::anyhow!(rpc::parts(&error).1))
}

impl Running {
    /// The container of that name or id, if it runs.
    pub(super) fn find(root: &StateRoot, name: &str) -> anyhow::Result<Self> {
        let container = root.find(name)?;
        if container.status.state != State::Running {
            bail!("container {name} is not running");
        }
        let client = Client::connect(&container.dir)?;
        Ok(Self { container, client })
    }

    fn stop_signal(&self) -> u32 {
        let wanted = self.container.meta.stop_signal.as_deref();
        let wanted = wanted.and_then(|signal| signals::parse(signal).ok());
        wanted.unwrap_or(SIGTERM)
    }

    fn init(&self) -> ProcessId<'_> {
        ProcessId::first_of(&self.container.meta.id)
    }

    /// Sends a signal; one to a process that has just ended is fine.
    async fn signal(&self, signal: u32) -> anyhow::Result<()> {
        match self.client.kill(self.init(), signal).await {
            Err(error) if rpc::parts(&error).0 != Code::NOT_FOUND => {
                bail!("{}", rpc::parts(&error).1)
            }
            _ => Ok(()),
        }
    }

    /// Asks it to end, and kills it if it doesn't.
    async fn stop(&self, timeout: Duration) -> anyhow::Result<()> {
        self.signal(self.stop_signal()).await?;
        if !self.ends_within(timeout).await {
            self.signal(SIGKILL).await?;
            self.ends_within(KILL_TAKES).await;
        }
        Ok(())
    }

    /// Waits until it ended; `false` if it goes on.
    async fn ends_within(&self, limit: Duration) -> bool {
        let ended = self.client.wait(self.init());
        tokio::time::timeout(limit, ended).await.is_ok()
    }
}

/// Does the same to each container, prints those it worked for, and fails if it didn't for one.
pub(super) async fn for_each(
    settings: &Settings,
    names: &[String],
    act: impl AsyncFn(&StateRoot, &str) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let root = containers::state(settings)?;
    let mut failed = Vec::new();
    for name in names {
        match act(&root, name).await {
            Ok(line) => output::write(&format!("{line}\n"))?,
            Err(error) => failed.push(error),
        }
    }
    let mut failed = failed.into_iter();
    let Some(first) = failed.next() else {
        return Ok(());
    };
    for error in failed {
        eprintln!("casemate: {}", rpc::chain(error.as_ref()));
    }
    Err(first)
}

/// `casemate kill`
pub(super) async fn kill(settings: &Settings, args: &KillArgs) -> anyhow::Result<()> {
    let signal = signals::parse(&args.signal).context("--signal")?;
    for_each(settings, &args.containers, async |root, name| {
        let running = Running::find(root, name)?;
        // As with Docker, a container that was killed stays so.
        if [SIGKILL, running.stop_signal()].contains(&signal) {
            running.container.mark_ending()?;
        }
        running.signal(signal).await?;
        let number = [("signal", signal.to_string())];
        root.tell(&running.container.meta, "kill", number);
        Ok(name.to_owned())
    })
    .await
}

/// `casemate stop`
pub(super) async fn stop(settings: &Settings, args: &StopArgs) -> anyhow::Result<()> {
    for_each(settings, &args.containers, async |root, name| {
        stop_one(root, name, args.timeout).await?;
        Ok(name.to_owned())
    })
    .await
}

/// Asks a container to end, and kills it if it doesn't; one that ended already is stopped. Returns once nobody looks
/// after it any more: it can be started again, or removed.
pub(super) async fn stop_one(
    root: &StateRoot,
    name: &str,
    timeout: Option<u32>,
) -> anyhow::Result<()> {
    let container = root.find(name)?;
    if !state::is_looked_after(&container.dir) && !container.status.state.is_alive() {
        return Ok(());
    }
    container.mark_ending()?;
    let timeout = timeout.or(container.meta.stop_timeout);
    let timeout = timeout.map_or(STOP_TAKES, |s| Duration::from_secs(s.into()));
    let deadline = Instant::now() + timeout + KILL_TAKES;
    let mut problem = None;
    // One that is just starting again is asked once it runs, if it still gets there.
    while state::is_locked(&container.dir) {
        if Instant::now() > deadline {
            let still = || anyhow::anyhow!("container {name} still runs after it was killed");
            return Err(problem.unwrap_or_else(still));
        }
        if let Ok(running) = Running::find(root, &container.meta.id)
            && let Err(error) = running.stop(timeout).await
        {
            // It may just be gone: then the lock is free in a moment.
            problem = Some(error);
        }
        tokio::time::sleep(SETTLES).await;
    }
    root.tell(&container.meta, "stop", []);
    Ok(())
}

/// `casemate wait`
pub(super) async fn wait(settings: &Settings, args: &ContainersArgs) -> anyhow::Result<()> {
    for_each(settings, &args.containers, async |root, name| {
        let container = root.find(name)?;
        let id = &container.meta.id;
        let told = match Running::find(root, id) {
            Ok(running) => running.client.wait(running.init()).await.ok(),
            Err(_) => None,
        };
        let code = match told {
            Some(code) => code,
            // It ended in between.
            None => left_exit_code(root, id, name)?,
        };
        Ok(code.to_string())
    })
    .await
}

/// The exit code of a container that ended.
pub(super) fn left_exit_code(root: &StateRoot, id: &str, name: &str) -> anyhow::Result<u32> {
    let code = root.exit_code(id);
    code.with_context(|| format!("container {name} is gone, and its exit code with it"))
}

/// `casemate pause`
pub(super) async fn pause(settings: &Settings, args: &ContainersArgs) -> anyhow::Result<()> {
    for_each(settings, &args.containers, async |root, name| {
        let running = Running::find(root, name)?;
        answered(running.client.pause(&running.container.meta.id).await)?;
        Ok(name.to_owned())
    })
    .await
}

/// `casemate unpause`
pub(super) async fn unpause(settings: &Settings, args: &ContainersArgs) -> anyhow::Result<()> {
    for_each(settings, &args.containers, async |root, name| {
        let running = Running::find(root, name)?;
        answered(running.client.resume(&running.container.meta.id).await)?;
        Ok(name.to_owned())
    })
    .await
}
