//! What agent and child say to each other over their socket (SEQPACKET: a message is a packet).
//!
//! Child: `R` + number of its terminal's master (or -1), or `E` + error. Agent: `G`, go on.
//! The socket's end without a message means that the execve succeeded.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;

use crate::conn::Conn;
use crate::error::Error;

const READY: u8 = b'R';
const ERROR: u8 = b'E';
const GO: u8 = b'G';

/// Longest message; longer error texts are cut.
const MAX: usize = 4096;

/// What the agent hears from a child.
#[derive(Debug)]
pub(super) enum Report {
    /// All is done but the execve. In the child its terminal's master has this number.
    Ready(Option<i32>),
    /// It failed.
    Failed(Error),
    /// The socket closed.
    Gone,
}

pub(super) fn send_error(sync: &OwnedFd, error: &Error) -> io::Result<()> {
    let mut message = vec![ERROR];
    message.extend(error.to_bytes());
    message.truncate(MAX);
    rustix::io::write(sync, &message)?;
    Ok(())
}

pub(super) fn send_ready(sync: &OwnedFd, master: Option<&OwnedFd>) -> io::Result<()> {
    let number = master.map_or(-1, AsRawFd::as_raw_fd);
    let mut message = vec![READY];
    message.extend(number.to_ne_bytes());
    rustix::io::write(sync, &message)?;
    Ok(())
}

/// Blocks the child until the agent says go. An agent that is gone ends the child.
pub(super) fn await_go(sync: &OwnedFd) -> io::Result<()> {
    loop {
        let mut message = [0];
        match rustix::io::read(sync, &mut message) {
            Ok(1) if message[0] == GO => return Ok(()),
            Err(Errno::INTR) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

pub(super) async fn send_go(sync: &Conn) -> io::Result<()> {
    sync.write_all(&[GO]).await
}

pub(super) async fn hear(sync: &Conn) -> Report {
    let mut buffer = [0; MAX];
    match sync
        .read(&mut buffer)
        .await
        .map(|length| buffer[..length].split_first())
    {
        Ok(Some((&READY, number))) => {
            let number = number.try_into().map_or(-1, i32::from_ne_bytes);
            Report::Ready(Some(number).filter(|n| *n >= 0))
        }
        Ok(Some((&ERROR, error))) => Report::Failed(Error::from_bytes(error)),
        _ => Report::Gone,
    }
}
