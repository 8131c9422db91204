//! Moves bytes between a process's pipes or terminal and the host, losing none at exit.
//!
//! Back-pressure comes from the kernel: a pump reads only when the other side took the last bytes.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::coop::consume_budget;

use crate::conn::Conn;

/// Most bytes moved by one splice: the pipe's size decides in the end.
const CHUNK: usize = 1 << 20;

/// Buffer for a terminal, whose own buffers are 4 KiB.
const TTY_CHUNK: usize = 8 << 10;

/// Host to pipe, until the host half-closes or the process closes its end.
pub(crate) async fn input(host: Conn, pipe: Conn) {
    loop {
        match step(&host, &pipe) {
            Ok(0) => return,
            Ok(_) => consume_budget().await,
            Err(Errno::AGAIN) => {
                // A reader that is gone shows as an error on the pipe's write end.
                if host.ready(Interest::READABLE).await.is_err()
                    || pipe.ready(Interest::WRITABLE).await.is_err()
                {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Pipe to host, until every writer closed it; or, once `exited` is true, until it is empty:
/// a background child may hold the pipe for ever, but what the process wrote is in it by then.
pub(crate) async fn output(pipe: Conn, host: Conn, mut exited: watch::Receiver<bool>) {
    loop {
        match step(&pipe, &host) {
            Ok(0) => return,
            Ok(_) => consume_budget().await,
            Err(Errno::AGAIN) => {
                if !more_to_read(&pipe, &mut exited).await
                    || host.ready(Interest::WRITABLE).await.is_err()
                {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Host to terminal. The end of the input isn't told to the terminal: hanging up is the user's to do.
pub(crate) async fn terminal_input(host: Conn, terminal: Arc<Conn>) {
    let mut buffer = vec![0; TTY_CHUNK];
    while let Ok(count @ 1..) = host.read(&mut buffer).await {
        if terminal.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// Terminal to host, with the rule of [`output`].
pub(crate) async fn terminal_output(
    terminal: Arc<Conn>,
    host: Conn,
    mut exited: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; TTY_CHUNK];
    loop {
        match rustix::io::read(&*terminal, &mut buffer[..]) {
            Ok(0) => return,
            Ok(count) => {
                if host.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
                consume_budget().await;
            }
            Err(Errno::AGAIN) => {
                if !more_to_read(&terminal, &mut exited).await {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            // EIO: no process has the terminal open any more.
            Err(_) => return,
        }
    }
}

/// Waits for input; false when there is none and none will be waited for.
async fn more_to_read(source: &Conn, exited: &mut watch::Receiver<bool>) -> bool {
    loop {
        if *exited.borrow_and_update() {
            return matches!(source.holds(Interest::READABLE), Ok(true));
        }
        tokio::select! {
            result = source.ready(Interest::READABLE) => return result.is_ok(),
            changed = exited.changed() => if changed.is_err() {
                return matches!(source.holds(Interest::READABLE), Ok(true));
            },
        }
    }
}

fn step(from: &Conn, to: &Conn) -> Result<usize, Errno> {
    splice(
        from,
        None,
        to,
        None,
        CHUNK,
        SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
    )
}

/// A pipe with room for a burst; its size is asked for but not insisted on.
pub(crate) fn pipe() -> io::Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    const ROOM: usize = 256 << 10;
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let _ = rustix::pipe::fcntl_setpipe_size(&write, ROOM);
    Ok((read, write))
}
