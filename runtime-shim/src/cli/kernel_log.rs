//! `--kernel-log`: the guest kernel's console on its way to a file or to standard error.
//!
//! The VMM gets a pipe that never blocks it; what the pipe can't take is lost, not waited for.
//! The bytes are the guest's: they are bounded, and a terminal gets no control characters.

use anyhow::Context;
use casemate_protocol::text::printable_lines;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::JoinHandle;

/// A kernel that boots says some 20 KiB; one that says more than this is flooding us.
const MAX_BYTES: u64 = 64 << 20;
/// Takes a whole boot at once.
const PIPE_SIZE: usize = 1 << 20;

/// A copy under way.
pub(super) struct KernelLog {
    copy: JoinHandle<io::Result<()>>,
}

impl KernelLog {
    /// Starts to copy to `path`, or to standard error for `-`. Gives the end for the VMM.
    pub(super) fn start(path: &Path) -> anyhow::Result<(Self, OwnedFd)> {
        let failed = || format!("--kernel-log: can't write {}", path.display());
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).with_context(failed)?;
        // Users without the right to a larger pipe lose some of a flood, no more.
        let _ = fcntl_setpipe_size(&theirs, PIPE_SIZE);
        rustix::io::ioctl_fionbio(&theirs, true).with_context(failed)?;
        let from = File::from(ours).take(MAX_BYTES);
        let copy = if path.as_os_str() == "-" {
            let on_terminal = io::stderr().is_terminal();
            std::thread::spawn(move || copy(from, io::stderr(), on_terminal))
        } else {
            let file = File::create(path).with_context(failed)?;
            std::thread::spawn(move || copy(from, file, false))
        };
        Ok((Self { copy }, theirs))
    }

    /// Waits for the last line. The guest is gone: nobody holds the other end any more.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        let copied = self.copy.join();
        let copied = copied.map_err(|_| anyhow::anyhow!("the thread that copies it failed"));
        copied
            .and_then(|result| Ok(result?))
            .context("--kernel-log")
    }
}

fn copy(mut from: impl Read, mut to: impl Write, to_terminal: bool) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => return to.flush(),
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        match to_terminal {
            true => to.write_all(for_terminal(&buffer[..got]).as_bytes())?,
            false => to.write_all(&buffer[..got])?,
        }
    }
}

/// Nothing that steers the terminal, and whole line ends: it may be in raw mode.
fn for_terminal(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace('\r', "");
    printable_lines(&text).replace('\n', "\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_to_a_terminal_defuses_control_characters() {
        let mut out = Vec::new();
        copy(
            &b"[ 0.1] \x1b]0;owned\x07 \xc2\x9b ok\r\n"[..],
            &mut out,
            true,
        )
        .unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "[ 0.1] \\u001b]0;owned\\u0007 \\u009b ok\r\n"
        );
    }

    #[test]
    fn writer_is_never_blocked_by_a_slow_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (log, end) = KernelLog::start(&path).unwrap();
        let mut guest = File::from(end);
        let mut sent = 0;
        let flood = [b'x'; 65_536];
        while sent < 8 << 20 {
            match guest.write(&flood) {
                Ok(taken) => sent += taken as u64,
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
        }
        drop(guest);
        log.finish().unwrap();
        assert_eq!(std::fs::metadata(path).unwrap().len(), sent);
    }
}
