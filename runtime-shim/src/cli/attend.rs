//! A process of a container, attended: its streams are ours, our signals are its own, until its end.

use super::args::ProcessArgs;
use super::client::{Client, ProcessId};
use super::streams::{self, InputEnd, Output, OutputEnd};
use super::terminal;
use crate::rpc;
use anyhow::{Context, bail};
use std::collections::VecDeque;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

/// Docker's: the engine itself failed.
const FAILED: u8 = 125;
/// 128 + SIGPIPE: nobody reads the output any more.
const READER_GONE: u8 = 128 + libc::SIGPIPE as u8;
/// Interrupts in a row after which a workload that doesn't listen is killed.
const PATIENCE: usize = 3;
/// What counts as in a row.
const IN_A_ROW: Duration = Duration::from_secs(10);
const SIGHUP: u8 = libc::SIGHUP as u8;
const SIGINT: u8 = libc::SIGINT as u8;
const SIGKILL: u8 = libc::SIGKILL as u8;
const SIGTERM: u8 = libc::SIGTERM as u8;
/// The terminal's window changed its size.
const WINDOW_CHANGE: u8 = libc::SIGWINCH as u8;

/// FIFOs for the streams that a process gets, as the Task API names them; empty: no such stream.
#[derive(Debug, Default)]
pub(super) struct Fifos {
    /// Standard input.
    pub(super) stdin: String,
    /// Standard output.
    pub(super) stdout: String,
    /// Standard error.
    pub(super) stderr: String,
}

impl Fifos {
    /// Makes them in `dir`. A terminal has no stderr of its own.
    pub(super) fn make(dir: &Path, args: &ProcessArgs) -> anyhow::Result<Self> {
        Self::wanted(dir, [args.interactive, true, !args.tty])
    }

    /// Those of a tool, which may read something.
    pub(super) fn for_tool(dir: &Path, input: bool) -> anyhow::Result<Self> {
        Self::wanted(dir, [input, true, true])
    }

    fn wanted(dir: &Path, wanted: [bool; 3]) -> anyhow::Result<Self> {
        let make = |name: &str, wanted: bool| -> anyhow::Result<String> {
            if !wanted {
                return Ok(String::new());
            }
            let path = streams::make_fifo(dir, name)?;
            Ok(path.to_str().context("the path is not UTF-8")?.to_owned())
        };
        let [stdin, stdout, stderr] = wanted;
        Ok(Self {
            stdin: make("stdin", stdin)?,
            stdout: make("stdout", stdout)?,
            stderr: make("stderr", stderr)?,
        })
    }

    /// Those of a container whose output is only logged. It may have been started before.
    pub(super) fn stdin_only(dir: &Path, interactive: bool) -> anyhow::Result<Self> {
        let mut fifos = Self::default();
        if interactive {
            let path = dir.join("stdin");
            if !path.exists() {
                streams::make_fifo(dir, "stdin")?;
            }
            fifos.stdin = path.to_str().context("the path is not UTF-8")?.to_owned();
        }
        Ok(fifos)
    }
}

/// Our ends of a process's streams.
#[derive(Debug)]
pub(super) struct Attached {
    outputs: Vec<JoinHandle<anyhow::Result<OutputEnd>>>,
    input: Option<streams::Input>,
    relation: Relation,
}

/// What a process is to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    /// It works for us alone: without a reader, for nobody.
    Ours,
    /// It runs by itself.
    LookingOn {
        /// Its standard input ends with ours.
        ends_input: bool,
        /// Our signals are its own.
        hands_on_signals: bool,
    },
}

/// How attending ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The process did, with this exit code.
    Exited(u8),
    /// It is left to itself.
    Detached,
    /// It had ended before we asked.
    Gone,
}

impl Attached {
    /// Opens our ends and starts copying.
    pub(super) fn open(fifos: &Fifos) -> anyhow::Result<Self> {
        let mut outputs = Vec::new();
        for (path, output) in [
            (&fifos.stdout, Output::Stdout),
            (&fifos.stderr, Output::Stderr),
        ] {
            if !path.is_empty() {
                let fifo = streams::open_output(Path::new(path))?;
                outputs.push(tokio::spawn(streams::copy_output(fifo, output)));
            }
        }
        let input = match fifos.stdin.as_str() {
            "" => None,
            path => Some(streams::copy_input(Path::new(path), None)?),
        };
        Ok(Self::new(outputs, input, Relation::Ours))
    }

    /// Streams that are being copied already.
    pub(super) fn new(
        outputs: Vec<JoinHandle<anyhow::Result<OutputEnd>>>,
        input: Option<streams::Input>,
        relation: Relation,
    ) -> Self {
        let mut streams = Self {
            outputs,
            input,
            relation,
        };
        if relation != Relation::Ours {
            streams.shim_is_there();
        }
        streams
    }

    /// The shim has opened its ends: what is in them can't get lost any more.
    pub(super) fn shim_is_there(&mut self) {
        if let Some(input) = &mut self.input {
            input.keeper = None;
        }
    }
}

impl End {
    /// For the shell.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Detached => 0,
            Self::Gone => FAILED,
        }
    }
}

/// The signals that we act upon.
pub(super) struct Signals {
    all: Vec<(u8, Signal)>,
}

impl Signals {
    /// Begins to listen.
    pub(super) fn new() -> anyhow::Result<Self> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
            SignalKind::window_change(),
        ];
        let all = kinds
            .into_iter()
            .map(|kind| Ok((kind.as_raw_value() as u8, signal(kind)?)))
            .collect::<std::io::Result<_>>()
            .context("can't listen for signals")?;
        Ok(Self { all })
    }

    /// The next signal's number.
    async fn next(&mut self) -> u8 {
        std::future::poll_fn(|cx| {
            for (number, signal) in &mut self.all {
                if signal.poll_recv(cx).is_ready() {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// The next one that ends a program which does nothing about it.
    pub(super) async fn terminating(&mut self) -> u8 {
        loop {
            let number = self.next().await;
            if number != WINDOW_CHANGE {
                return number;
            }
        }
    }
}

/// Stays with a running process until its end.
pub(super) async fn attend(
    client: &Client,
    process: ProcessId<'_>,
    mut streams: Attached,
    signals: &mut Signals,
) -> anyhow::Result<End> {
    let mut impatience = Impatience::default();
    let mut status = None;
    let wait = client.wait(process);
    tokio::pin!(wait);
    let outputs = drain(std::mem::take(&mut streams.outputs));
    tokio::pin!(outputs);
    // One after the other, but never in the way of what else happens: a guest that hangs answers late.
    let mut owed = VecDeque::new();
    let mut call: Option<Pin<Box<dyn Future<Output = ()> + '_>>> = None;
    let mut drained = false;
    while status.is_none() || !drained {
        if call.is_none()
            && let Some(next) = owed.pop_front()
        {
            call = Some(Box::pin(deliver(client, process, next)));
        }
        tokio::select! {
            exit = &mut wait, if status.is_none() => match exit {
                Ok(code) => status = Some(End::Exited(u8::try_from(code).unwrap_or(u8::MAX))),
                // Its output is complete by then, and its exit code written down.
                Err(_) if streams.relation != Relation::Ours => status = Some(End::Gone),
                Err(error) => bail!("the shim is gone: {}", rpc::parts(&error).1),
            },
            end = &mut outputs, if !drained => {
                drained = true;
                if end? == OutputEnd::ReaderGone {
                    if streams.relation == Relation::Ours {
                        let _ = client.kill(process, SIGKILL.into()).await;
                    }
                    return Ok(End::Exited(READER_GONE));
                }
            }
            number = signals.next() => {
                if let Relation::LookingOn { hands_on_signals, .. } = streams.relation
                    && number != WINDOW_CHANGE
                {
                    if number == SIGHUP || impatience.at(number, Instant::now()) {
                        return Ok(End::Detached);
                    }
                    if hands_on_signals {
                        owed.push_back(Call::Signal(number));
                    }
                } else if !impatience.at(number, Instant::now()) {
                    owed.push_back(Call::Signal(number));
                } else if status.is_some() {
                    // It ended: only its output is still awaited.
                    break;
                } else {
                    call = Some(Box::pin(deliver(client, process, Call::Signal(SIGKILL))));
                }
            }
            () = ended(&mut call) => call = None,
            end = stdin_ended(&mut streams.input) => match end {
                InputEnd::Detached => return Ok(End::Detached),
                InputEnd::Complete => match streams.relation {
                    Relation::LookingOn { ends_input: false, .. } => {}
                    _ => owed.push_back(Call::CloseStdin),
                },
            },
        }
    }
    Ok(status.unwrap_or(End::Gone))
}

/// Returns once the call was answered; never without one.
async fn ended(call: &mut Option<Pin<Box<dyn Future<Output = ()> + '_>>>) {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}

/// What we owe the process.
enum Call {
    Signal(u8),
    CloseStdin,
}

/// A process that ended meanwhile needs nothing any more: errors are no news.
async fn deliver(client: &Client, process: ProcessId<'_>, call: Call) {
    let _ = match call {
        Call::CloseStdin => client.close_stdin(process).await,
        Call::Signal(WINDOW_CHANGE) => match terminal::size() {
            Some((rows, columns)) => client.resize(process, rows, columns).await,
            None => Ok(()),
        },
        Call::Signal(number) => client.kill(process, number.into()).await,
    };
}

/// Tells a user who wants it to end at once from one who ends it now and then.
#[derive(Debug, Default)]
struct Impatience {
    recent: VecDeque<Instant>,
}

impl Impatience {
    /// Whether the signal is the last of too many in too short a time.
    fn at(&mut self, number: u8, now: Instant) -> bool {
        if !matches!(number, SIGINT | SIGTERM) {
            return false;
        }
        self.recent.push_back(now);
        self.recent.retain(|at| now.duration_since(*at) <= IN_A_ROW);
        self.recent.len() >= PATIENCE
    }
}

/// Waits for all outputs; the first whose reader left ends the waiting.
async fn drain(outputs: Vec<JoinHandle<anyhow::Result<OutputEnd>>>) -> anyhow::Result<OutputEnd> {
    for output in outputs {
        if output.await.context("an output's task failed")?? == OutputEnd::ReaderGone {
            return Ok(OutputEnd::ReaderGone);
        }
    }
    Ok(OutputEnd::Complete)
}

/// Returns once when our standard input ended; never without one.
async fn stdin_ended(input: &mut Option<streams::Input>) -> InputEnd {
    match input {
        Some(running) => {
            let end = (&mut running.ended).await;
            *input = None;
            end.unwrap_or(InputEnd::Complete)
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impatience_counts_interrupts_in_a_row_only() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut now_and_then = Impatience::default();
        assert!((0..20).all(|n| !now_and_then.at(SIGINT, at(n * 6))));
        let mut at_once = Impatience::default();
        let signals = [SIGINT, WINDOW_CHANGE, SIGTERM, libc::SIGUSR1 as u8, SIGINT];
        let told = signals.map(|number| at_once.at(number, at(1)));
        assert_eq!(told, [false, false, false, false, true]);
    }
}
