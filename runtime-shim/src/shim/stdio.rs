//! Standard streams: pumps between the FIFOs of a front door and the
//! connections that end in the guest.
//!
//! A pump holds at most one buffer, so a slow reader slows the workload and
//! nothing grows. An output FIFO is opened for reading and writing: a reader that
//! goes away and comes back loses nothing. Standard input ends once the front
//! door called CloseIO and every writer of the FIFO is gone, as with runc's shim.

use super::logger::{self, Whose};
use crate::log::{self, Stream};
use crate::state::now_ns;
use rustix::fs::{FileType, Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Of a file that output goes to: others may read it, as with runc's shim.
const LOG_MODE: Mode = Mode::RUSR
    .union(Mode::WUSR)
    .union(Mode::RGRP)
    .union(Mode::ROTH);
/// A pipe's own capacity: larger moves don't fit through a FIFO anyway.
const BUFFER: usize = 64 << 10;

/// Where a process's streams go; an empty path: nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    /// One pty for all.
    pub(super) terminal: bool,
    /// FIFO that we read.
    pub(super) stdin: String,
    /// FIFO or file that we write.
    pub(super) stdout: String,
    /// The same for standard error; unused with a terminal.
    pub(super) stderr: String,
}

/// Why streams can't be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum StdioError {
    /// A path of a kind we don't serve.
    #[error("stdio {0:?}: only FIFOs, file:// and binary:// are supported")]
    Unsupported(String),
    /// It can't be opened.
    #[error("can't open {path:?} for stdio")]
    Open {
        /// The path.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// No socket pair.
    #[error("can't make a socket pair for stdio")]
    Socket(#[source] io::Error),
}

/// A container's log, which its first process's outputs share.
pub(super) type SharedLog = Arc<Mutex<log::Writer>>;

/// The other ends, for the VMM: a port is opened for each.
#[derive(Debug, Default)]
pub(super) struct GuestEnds {
    /// For standard input.
    pub(super) stdin: Option<OwnedFd>,
    /// For standard output.
    pub(super) stdout: Option<OwnedFd>,
    /// For standard error.
    pub(super) stderr: Option<OwnedFd>,
}

/// The running pumps of one process.
#[derive(Debug)]
pub(super) struct Streams {
    stdin: Option<JoinHandle<()>>,
    /// Our own writing end of stdin's FIFO: while it is open, stdin doesn't end.
    stdin_keeper: Mutex<Option<OwnedFd>>,
    outputs: Mutex<Vec<JoinHandle<()>>>,
    /// While it is there, a program that takes the output waits for more.
    _more: Option<oneshot::Sender<()>>,
}

impl Streams {
    /// Opens everything that `paths` names and starts pumping; what is written goes to the log too, if there is one.
    pub(super) async fn open(
        paths: &Paths,
        log: Option<&SharedLog>,
        whose: Whose<'_>,
    ) -> Result<(Self, GuestEnds), StdioError> {
        let mut ends = GuestEnds::default();
        let mut streams = Self {
            stdin: None,
            stdin_keeper: Mutex::new(None),
            outputs: Mutex::new(Vec::new()),
            _more: None,
        };
        let mut outputs = Vec::new();
        // One program takes both.
        let mut logger = [None, None];
        if logger::is_meant(&paths.stdout) {
            let started = logger::start(&paths.stdout, whose).await?;
            logger = [Some(started.stdout), Some(started.stderr)];
            streams._more = Some(started.more);
        }
        let [logged_stdout, logged_stderr] = logger;
        if !paths.stdin.is_empty() {
            let path = fifo_path(&paths.stdin)?;
            let fifo = open_fifo(path, OFlags::RDONLY)?;
            let keeper = open_fifo(path, OFlags::WRONLY)?;
            let (ours, theirs) = socket_pair()?;
            let (end, into_guest) = ours.into_split();
            // The guest never talks back on stdin.
            drop(end);
            streams.stdin = Some(tokio::spawn(pump_in(readable(fifo)?, into_guest)));
            streams.stdin_keeper = Mutex::new(Some(keeper));
            ends.stdin = Some(theirs);
        }
        for (path, end, stream, wanted, logged) in [
            (
                &paths.stdout,
                &mut ends.stdout,
                Stream::Stdout,
                true,
                logged_stdout,
            ),
            (
                &paths.stderr,
                &mut ends.stderr,
                Stream::Stderr,
                !paths.terminal,
                logged_stderr,
            ),
        ] {
            if (path.is_empty() && log.is_none() && logged.is_none()) || !wanted {
                continue;
            }
            let outlet = Outlet {
                sink: match (logged, path.as_str()) {
                    (Some(pipe), _) => Some(Sink::of(pipe)?),
                    (None, "") => None,
                    (None, path) => Some(Sink::open(path)?),
                },
                log: log.map(|log| (log.clone(), stream)),
            };
            let (ours, theirs) = socket_pair()?;
            let (from_guest, other) = ours.into_split();
            outputs.push(tokio::spawn(pump_out(from_guest, other, outlet)));
            *end = Some(theirs);
        }
        streams.outputs = Mutex::new(outputs);
        Ok((streams, ends))
    }

    /// Standard input ends as soon as all other writers are gone.
    pub(super) fn close_stdin(&self) {
        lock(&self.stdin_keeper).take();
    }

    /// The process is gone: nobody reads its input any more.
    pub(super) fn stop_stdin(&self) {
        self.close_stdin();
        if let Some(pump) = &self.stdin {
            pump.abort();
        }
    }

    /// Waits until everything the process wrote has reached its FIFO, but no longer than `limit`.
    pub(super) async fn drained(&self, limit: Duration) {
        let pumps = std::mem::take(&mut *lock(&self.outputs));
        let _ = tokio::time::timeout(limit, async {
            for pump in pumps {
                let _ = pump.await;
            }
        })
        .await;
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.stop_stdin();
        for pump in lock(&self.outputs).iter() {
            pump.abort();
        }
    }
}

/// A poisoned lock holds a list: always usable.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

pub(super) fn socket_pair() -> Result<(UnixStream, OwnedFd), StdioError> {
    let (ours, theirs) = StdUnixStream::pair().map_err(StdioError::Socket)?;
    let ours = ours
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(ours))
        .map_err(StdioError::Socket)?;
    theirs.set_nonblocking(true).map_err(StdioError::Socket)?;
    Ok((ours, theirs.into()))
}

fn fifo_path(text: &str) -> Result<&str, StdioError> {
    let path = text.strip_prefix("fifo://").unwrap_or(text);
    if path.starts_with('/') {
        Ok(path)
    } else {
        Err(StdioError::Unsupported(text.to_owned()))
    }
}

fn open_fifo(path: &str, flags: OFlags) -> Result<OwnedFd, StdioError> {
    let error = |source: io::Error| StdioError::Open {
        path: path.to_owned(),
        source,
    };
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| error(e.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| error(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode).is_fifo() {
        Ok(fd)
    } else {
        Err(error(io::Error::other("it is no FIFO")))
    }
}

fn readable(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, StdioError> {
    crate::fds::watched(fd, Interest::READABLE).map_err(StdioError::Socket)
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Fifo(AsyncFd<OwnedFd>),
    File(OwnedFd),
}

impl Sink {
    fn open(text: &str) -> Result<Self, StdioError> {
        if let Some(path) = text.strip_prefix("file://") {
            if let Some(dir) = Path::new(path).parent() {
                // As runc's shim does; what fails here, the next call tells.
                let _ = std::fs::create_dir_all(dir);
            }
            let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, LOG_MODE).map_err(|e| StdioError::Open {
                path: path.to_owned(),
                source: e.into(),
            })?;
            return Ok(Self::File(fd));
        }
        Self::of(open_fifo(fifo_path(text)?, OFlags::RDWR)?)
    }

    /// A pipe that doesn't block.
    fn of(pipe: OwnedFd) -> Result<Self, StdioError> {
        let watched = crate::fds::watched(pipe, Interest::WRITABLE);
        Ok(Self::Fifo(watched.map_err(StdioError::Socket)?))
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Self::Fifo(fifo) => {
                    fifo.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
                        .await?
                }
                Self::File(file) => rustix::io::write(file, bytes)?,
            };
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

/// Everything that one output goes to.
struct Outlet {
    /// None any more once it failed.
    sink: Option<Sink>,
    log: Option<(SharedLog, Stream)>,
}

impl Outlet {
    /// What fails (a full disk) must not stop the process: its output is dropped there from then on.
    async fn write_all(&mut self, bytes: &[u8]) {
        if let Some((log, stream)) = &self.log {
            // There may be room for later lines.
            let _ = lock(log).append(now_ns(), *stream, bytes);
        }
        if let Some(sink) = &self.sink
            && sink.write_all(bytes).await.is_err()
        {
            self.sink = None;
        }
    }
}

/// From the guest to the outlet, until the guest's end closes.
async fn pump_out(mut from: OwnedReadHalf, _keep_open: OwnedWriteHalf, mut outlet: Outlet) {
    // Most streams of most processes carry nothing: the buffer comes with the first byte.
    if from.readable().await.is_err() {
        return;
    }
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => outlet.write_all(&buffer[..n]).await,
        }
    }
}

/// From the FIFO to the guest, until the FIFO's writers are gone.
async fn pump_in(fifo: AsyncFd<OwnedFd>, mut into: OwnedWriteHalf) {
    // Before a writer comes, a read would already say "end".
    let Ok(guard) = fifo.readable().await else {
        return;
    };
    drop(guard);
    let mut buffer = vec![0; BUFFER];
    loop {
        let got = fifo
            .async_io(Interest::READABLE, |fd| {
                Ok(rustix::io::read(fd, &mut buffer[..])?)
            })
            .await;
        match got {
            Ok(n) if n > 0 => {
                if into.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    let _ = into.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::{Read, Write};

    const NOBODY: Whose<'static> = Whose {
        namespace: "n",
        id: "i",
    };

    fn make_fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn output_with_slow_reader_loses_no_byte() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdout: make_fifo(dir.path(), "out"),
            ..Paths::default()
        };
        // The front door opens before it calls.
        let opener = paths.stdout.clone();
        let mut reader = OpenOptions::new()
            .read(true)
            .write(true)
            .open(opener)
            .unwrap();
        let (streams, ends) = Streams::open(&paths, None, NOBODY).await.unwrap();
        let mut guest = StdUnixStream::from(ends.stdout.unwrap());
        guest.set_nonblocking(false).unwrap();
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || guest.write_all(&copy).unwrap());
        let slow = std::thread::spawn(move || {
            let mut got = vec![0; 1_000_000];
            for piece in got.chunks_mut(30_011) {
                reader.read_exact(piece).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
            got
        });
        streams.drained(Duration::from_secs(20)).await;
        writer.join().unwrap();
        assert!(slow.join().unwrap() == sent);
    }

    #[tokio::test]
    async fn stdin_ends_only_after_close_io_and_the_last_writer() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: make_fifo(dir.path(), "in"),
            ..Paths::default()
        };
        let (streams, ends) = Streams::open(&paths, None, NOBODY).await.unwrap();
        let guest = StdUnixStream::from(ends.stdin.unwrap());
        let mut guest = UnixStream::from_std(guest).unwrap();
        let mut buffer = [0; 64];

        let mut first = OpenOptions::new().write(true).open(&paths.stdin).unwrap();
        first.write_all(b"one").unwrap();
        drop(first);
        assert_eq!(guest.read(&mut buffer).await.unwrap(), 3);
        let still_open = tokio::time::timeout(Duration::from_millis(50), guest.read(&mut buffer));
        assert!(still_open.await.is_err());

        let mut second = OpenOptions::new().write(true).open(&paths.stdin).unwrap();
        streams.close_stdin();
        second.write_all(b"two!").unwrap();
        assert_eq!(guest.read(&mut buffer).await.unwrap(), 4);
        drop(second);
        assert_eq!(guest.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn open_of_odd_paths_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let regular = dir.path().join("regular");
        std::fs::write(&regular, "x").unwrap();
        for path in [
            "relative",
            "binary:///no/such",
            "binary://relative",
            regular.to_str().unwrap(),
            "/no/such",
        ] {
            let paths = Paths {
                stdout: path.into(),
                ..Paths::default()
            };
            assert!(Streams::open(&paths, None, NOBODY).await.is_err(), "{path}");
        }
    }

    #[tokio::test]
    async fn log_gets_both_outputs_without_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let log = log::Writer::open(dir.path(), log::Limits::default()).unwrap();
        let log = Arc::new(Mutex::new(log));
        let (streams, ends) = Streams::open(&Paths::default(), Some(&log), NOBODY)
            .await
            .unwrap();
        for (end, bytes) in [(ends.stdout, b"out\n"), (ends.stderr, b"err\n")] {
            StdUnixStream::from(end.unwrap()).write_all(bytes).unwrap();
        }
        streams.drained(Duration::from_secs(5)).await;
        let mut reader = log::Reader::open(dir.path()).unwrap().unwrap();
        let mut read = || reader.read().unwrap().unwrap();
        let mut entries = [read(), read()];
        entries.sort_by_key(|e| e.stream == Stream::Stderr);
        assert_eq!(entries[0].content, b"out\n");
        assert_eq!(entries[1].content, b"err\n");
    }

    #[tokio::test]
    async fn file_uri_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let paths = Paths {
            stdout: format!("file://{}", log.display()),
            ..Paths::default()
        };
        let (streams, ends) = Streams::open(&paths, None, NOBODY).await.unwrap();
        StdUnixStream::from(ends.stdout.unwrap())
            .write_all(b"line\n")
            .unwrap();
        streams.drained(Duration::from_secs(5)).await;
        assert_eq!(std::fs::read(log).unwrap(), b"line\n");
    }
}
