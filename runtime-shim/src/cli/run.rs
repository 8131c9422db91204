//! `casemate run`: a new container, in the foreground or left to itself.

use super::args::{RunArgs, TimingFormat};
use super::attend::{self, Attached, Fifos, Signals};
use super::client::{ProcessId, Shim};
use super::create::{self, Made, Wishes};
use super::kernel_log::KernelLog;
use super::{initcalls, output, start, terminal, timing};
use crate::restart::Policy;
use crate::rpc;
use crate::settings::Settings;
use crate::state::Status;
use anyhow::Context;
use std::path::Path;
use ttrpc::proto::Code;

/// Docker's: the engine itself failed.
const FAILED: u8 = 125;
/// Docker's: the command can't be invoked.
const NOT_EXECUTABLE: u8 = 126;
/// Docker's: the command isn't there.
const NOT_FOUND: u8 = 127;

/// A failed run: what to print and the exit code.
#[derive(Debug)]
pub(super) struct Failure {
    /// For standard error.
    pub(super) error: anyhow::Error,
    /// For the shell.
    pub(super) code: u8,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            code: FAILED,
        }
    }
}

/// What must be given back, whatever happens.
#[derive(Default)]
struct Held {
    shim: Option<Shim>,
    made: Option<Made>,
    raw: Option<terminal::Raw>,
    kernel_log: Option<KernelLog>,
}

/// Runs the container and gives its exit code.
pub(super) async fn run(settings: &Settings, args: &RunArgs, begun: u64) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    if args.detach {
        return tokio::select! {
            detached = detach(settings, args, begun) => detached,
            number = signals.terminating() => Ok(128 + number),
        };
    }
    let mut held = Held::default();
    let started = tokio::select! {
        started = start(settings, args, begun, &mut held) => started,
        number = signals.terminating() => {
            give_back(held, true).await?;
            return Ok(128 + number);
        }
    };
    let (id, streams) = match started {
        Ok(running) => running,
        Err(failure) => {
            // The first error is the one to tell.
            let _ = give_back(held, true).await;
            return Err(failure);
        }
    };
    let ended = match &held.shim {
        Some(shim) => {
            let init = ProcessId::first_of(&id);
            attend::attend(shim.client(), init, streams, &mut signals).await
        }
        None => Err(anyhow::anyhow!("there is no shim")),
    };
    // Before anything is printed.
    held.raw = None;
    let status = held.made.as_ref().map(|made| made.dir.status());
    let Status {
        error, oom_killed, ..
    } = status.unwrap_or_default();
    let given_back = give_back(held, args.container.rm).await;
    if !error.is_empty() {
        return Err(anyhow::anyhow!("the container's guest failed: {error}").into());
    }
    if oom_killed {
        eprintln!("casemate: the container was killed for lack of memory; --memory gives it more");
    }
    let ended = ended?;
    given_back?;
    Ok(ended.code())
}

/// Ends the sandbox and, if `remove`, leaves nothing behind, even if a part of that fails.
async fn give_back(held: Held, remove: bool) -> anyhow::Result<()> {
    drop(held.raw);
    let ended = match held.shim {
        Some(shim) => shim.end().await,
        None => Ok(()),
    };
    let logged = held.kernel_log.map_or(Ok(()), KernelLog::finish);
    let removed = match held.made {
        Some(made) if remove => made.dir.remove(),
        _ => Ok(()),
    };
    ended.and(logged)?;
    Ok(removed?)
}

/// `casemate run --detach`: prints the id of a container that is left to itself.
async fn detach(settings: &Settings, args: &RunArgs, begun: u64) -> Result<u8, Failure> {
    let wishes = Wishes {
        timing: args.timing,
        log: true,
    };
    let made = create::make(settings, &args.container, &wishes).await?;
    if let Err(failure) = start::leave_to_itself(settings, &made).await {
        let _ = made.dir.remove();
        return Err(failure);
    }
    if let Some(format) = args.timing {
        print_times(made.dir.path(), format, begun)?;
    }
    output::write(&format!("{}\n", made.meta.id))?;
    Ok(0)
}

/// Everything up to the workload's start.
async fn start(
    settings: &Settings,
    args: &RunArgs,
    begun: u64,
    held: &mut Held,
) -> Result<(String, Attached), Failure> {
    let process = &args.container.process;
    terminal::check(process)?;
    let restart = args.container.restart;
    if restart != Policy::No {
        let unattended = "is for containers that are left to themselves: add --detach";
        return Err(anyhow::anyhow!("--restart {restart} {unattended}").into());
    }
    let wants_initcalls = args.timing == Some(TimingFormat::Initcalls);
    if wants_initcalls && args.kernel_log.is_some() {
        let clash = "--timing=initcalls reads the kernel's log itself; leave out --kernel-log";
        return Err(anyhow::anyhow!(clash).into());
    }
    let wishes = Wishes {
        timing: args.timing,
        // What goes away with its end has been seen.
        log: !args.container.rm,
    };
    let made = create::make(settings, &args.container, &wishes).await?;
    let made = held.made.insert(made);
    let dir = made.dir.path();
    let fifos = Fifos::make(dir, process)?;
    let initcalls_log = dir.join("kernel.log");
    let console = match &args.kernel_log {
        None if wants_initcalls => Some(&initcalls_log),
        other => other.as_ref(),
    };
    let console = match console {
        Some(path) => {
            let (log, end) = KernelLog::start(path)?;
            held.kernel_log = Some(log);
            Some(end)
        }
        None => None,
    };
    let options = start::options(made, true, console.as_ref());
    let shim = held
        .shim
        .insert(Shim::start(settings, &made.dir, &options)?);
    drop(console);

    let mut streams = Attached::open(&fifos)?;
    held.raw = terminal::Raw::enter_for(process)?;
    let request = start::request(settings, made, fifos)?;
    shim.create(&request).await.map_err(not_started)?;
    streams.shim_is_there();
    let init = ProcessId::first_of(&made.meta.id);
    shim.client().start(init).await.map_err(not_started)?;
    if let Some(format) = args.timing {
        print_times(dir, format, begun)?;
        if wants_initcalls {
            let report = initcalls::report(&initcalls_log, &settings.kernel).await?;
            eprint!("\n{report}");
        }
    }
    Ok((made.meta.id.clone(), streams))
}

fn print_times(dir: &Path, format: TimingFormat, begun: u64) -> anyhow::Result<()> {
    let path = dir.join(crate::shim::timing::FILE_NAME);
    let bytes = std::fs::read(&path).context("the shim told no times")?;
    let timing = serde_json::from_slice(&bytes).context("the shim's times can't be read")?;
    eprint!("{}", timing::render(format, begun, &timing));
    Ok(())
}

/// Docker's exit codes for a process that didn't start.
pub(super) fn not_started(error: ttrpc::Error) -> Failure {
    let (code, message) = rpc::parts(&error);
    Failure {
        error: anyhow::anyhow!(message),
        code: match code {
            Code::NOT_FOUND => NOT_FOUND,
            Code::PERMISSION_DENIED => NOT_EXECUTABLE,
            _ => FAILED,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_started_gives_dockers_codes() {
        let code = |c| not_started(rpc::status(c, "x")).code;
        assert_eq!(code(Code::NOT_FOUND), 127);
        assert_eq!(code(Code::PERMISSION_DENIED), 126);
        assert_eq!(code(Code::INTERNAL), 125);
    }
}
