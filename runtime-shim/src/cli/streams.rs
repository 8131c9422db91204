//! The command line's end of a container's standard streams.

use super::detach_keys::{DetachKeys, Watch};
use crate::fds;
use anyhow::Context;
use rustix::fs::{FileType, Mode, OFlags};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::io::Interest;
use tokio::sync::oneshot;

const BUFFER: usize = 64 << 10;

/// One of our own output streams.
#[derive(Debug, Clone, Copy)]
pub(super) enum Output {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Output {
    /// Writes everything; a reader that left is no error.
    pub(super) fn write(self, bytes: &[u8]) -> io::Result<OutputEnd> {
        match self.write_all(bytes) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(OutputEnd::ReaderGone),
            other => other.map(|()| OutputEnd::Complete),
        }
    }

    fn write_all(self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(bytes)?;
                out.flush()
            }
            Self::Stderr => io::stderr().lock().write_all(bytes),
        }
    }
}

/// How the copying of an output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OutputEnd {
    /// Everything was passed on.
    Complete,
    /// Nobody reads our output any more.
    ReaderGone,
}

/// Makes a FIFO.
pub(super) fn make_fifo(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, mode, 0)
        .with_context(|| format!("can't make the FIFO {}", path.display()))?;
    Ok(path)
}

fn open(path: &Path, flags: OFlags) -> anyhow::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("can't open the FIFO {}", path.display()))
}

/// Opens the reading end before there is a writer.
pub(super) fn open_output(path: &Path) -> anyhow::Result<OwnedFd> {
    open(path, OFlags::RDONLY | OFlags::NONBLOCK)
}

/// Copies a FIFO to our output until its writers are gone.
///
/// Most streams carry little: a thread is started with the first byte only, so
/// that a slow reader of ours holds up nothing but this stream.
pub(super) async fn copy_output(fifo: OwnedFd, output: Output) -> anyhow::Result<OutputEnd> {
    let watched = fds::watched(fifo, Interest::READABLE)?;
    let mut first = vec![0; 4096];
    let got = loop {
        let mut ready = watched.readable().await?;
        match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut first[..])?)) {
            Ok(result) => break result?,
            Err(_would_block) => {}
        }
    };
    if got == 0 {
        return Ok(OutputEnd::Complete);
    }
    first.truncate(got);
    let fifo = watched.into_inner();
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = tell.send(copy_blocking(&first, fifo, output));
    });
    Ok(told
        .await
        .context("the thread that copies output ended")??)
}

fn copy_blocking(first: &[u8], fifo: OwnedFd, output: Output) -> io::Result<OutputEnd> {
    rustix::io::ioctl_fionbio(&fifo, false)?;
    let mut fifo = std::fs::File::from(fifo);
    let mut buffer = vec![0; BUFFER];
    let mut chunk = first;
    let mut got;
    loop {
        if output.write(chunk)? == OutputEnd::ReaderGone {
            return Ok(OutputEnd::ReaderGone);
        }
        got = fifo.read(&mut buffer)?;
        if got == 0 {
            return Ok(OutputEnd::Complete);
        }
        chunk = &buffer[..got];
    }
}

/// How the copying of our input ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputEnd {
    /// It is over, or nobody wants it.
    Complete,
    /// The keys were typed that leave the container to itself.
    Detached,
}

/// Our standard input on its way into a FIFO.
#[derive(Debug)]
pub(super) struct Input {
    /// Hears when it ended.
    pub(super) ended: oneshot::Receiver<InputEnd>,
    /// What a FIFO holds is lost when nobody has it open: to be kept until the shim has.
    pub(super) keeper: Option<OwnedFd>,
}

/// Starts copying our standard input into a FIFO, until `keys` are typed.
///
/// The thread can't be stopped, as a blocked read can't: it ends with us.
pub(super) fn copy_input(path: &Path, keys: Option<DetachKeys>) -> anyhow::Result<Input> {
    // For reading too: before the shim has opened its end, opening for writing alone would block.
    let fifo = open(path, OFlags::RDWR)?;
    let keeper = Some(fifo.try_clone()?);
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || {
        let mut fifo = std::fs::File::from(fifo);
        let end = copy_typed(&mut io::stdin().lock(), &mut fifo, keys);
        drop(fifo);
        let _ = tell.send(end);
    });
    Ok(Input {
        ended: told,
        keeper,
    })
}

fn copy_typed(from: &mut impl Read, to: &mut impl Write, keys: Option<DetachKeys>) -> InputEnd {
    let mut watch = keys.map(Watch::new);
    let mut buffer = vec![0; BUFFER];
    loop {
        let got = match from.read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Ok(got) if got > 0 => &buffer[..got],
            _ => return InputEnd::Complete,
        };
        let written = match &mut watch {
            None => to.write_all(got),
            Some(watch) => {
                let verdict = watch.take(got);
                if verdict.detach {
                    let _ = to.write_all(&verdict.pass);
                    return InputEnd::Detached;
                }
                to.write_all(&verdict.pass)
            }
        };
        if written.is_err() {
            return InputEnd::Complete;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn copy_output_without_a_byte_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = make_fifo(dir.path(), "out").unwrap();
        let reader = open_output(&path).unwrap();
        let writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        drop(writer);
        let end = copy_output(reader, Output::Stdout).await.unwrap();
        assert_eq!(end, OutputEnd::Complete);
    }
}
